"""Flags of the step from a sweep to a schedule that contradict each other, or have no effect. See `usage`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Set

from distiller.apputils.quantization_usage import flag_of

GOALS = ("max_drop", "target_sparsity", "target_macs")
_SETTINGS = (*GOALS, "recommend_axis", "recommend_pruner", "recommend_epochs", "verify")


def recommend_rules(args: Namespace, given: Set[str]) -> Iterator[tuple[bool, str]]:
    """Every rule: whether it is broken, and what is told then.

    Args:
        args: the flags by name.
        given: the names of those that were given.
    """
    asked = [flag_of(name) for name in GOALS if getattr(args, name) is not None]
    if args.recommend:
        got = " and ".join(asked) or "none"
        wanted = ", ".join(map(flag_of, GOALS))
        yield len(asked) != 1, f"--recommend: needs exactly one of {wanted}; got {got}"
    for name in _SETTINGS:
        yield name in given and not args.recommend, f"{flag_of(name)}: goes with --recommend"
