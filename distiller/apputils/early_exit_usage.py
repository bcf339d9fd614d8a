"""Flags of early exit that contradict each other, or have no use.

Knows nothing about how flags are parsed, nor about models.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Set

_SOURCES = {
    "earlyexit_thresholds": "--earlyexit-thresholds",
    "earlyexit_max_drop": "--earlyexit-max-drop",
    "earlyexit_shares": "--earlyexit-shares",
}


def leaves_early(args: Namespace) -> bool:
    """Whether images are to leave early in the last test."""
    return any(getattr(args, name) is not None for name in _SOURCES)


def early_exit_rules(args: Namespace, given: Set[str], jobs: list[str]) -> Iterator[tuple[bool, str]]:
    """Every rule: whether it is broken, and what is told then.

    Args:
        args: the flags by name.
        given: the names of those that were given.
        jobs: the flags of other jobs than training.
    """
    weights, thresholds = args.earlyexit_lossweights or (), args.earlyexit_thresholds or ()
    yield bool(weights) and bool(jobs) and jobs != ["--greedy"], "--earlyexit-lossweights: only when training"
    yield (
        not sum(weights) < 1,
        "--earlyexit-lossweights: must add up to less than 1, the rest is the weight of the final output, "
        f"got {' + '.join(f'{weight:g}' for weight in weights)} = {sum(weights):g}",
    )
    sources = [flag for name, flag in _SOURCES.items() if name in given]
    yield len(sources) > 1, f"{' and '.join(sources[:2])}: give one of them"
    for flag in sources:
        yield jobs not in ([], ["--evaluate"]), f"{flag}: only when training or evaluating"
        yield bool(args.quantize_eval), f"{flag}: not with --quantize-eval, which quantizes no exits"
        yield bool(args.kd_chain), f"{flag}: not with --kd-chain"
    yield (
        "earlyexit_criterion" in given and not sources,
        "--earlyexit-criterion: goes with --earlyexit-thresholds, --earlyexit-max-drop or --earlyexit-shares",
    )
    for threshold in thresholds if args.earlyexit_criterion == "confidence" else ():
        yield (
            threshold is not None and threshold > 1,
            f"--earlyexit-thresholds: a confidence is a number from 0 to 1, got {threshold:g}"
            if threshold is not None
            else "",
        )
    shares = args.earlyexit_shares or ()
    yield (
        sum(shares) > 1 + 1e-9,
        f"--earlyexit-shares: are shares of all images, together at most 1, got {sum(shares):g}",
    )
    yield (
        bool(args.earlyexit_layers and args.kd_chain),
        "--earlyexit-layers: not with --kd-chain, whose networks have other layers",
    )
