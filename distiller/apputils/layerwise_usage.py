"""Flags of layer-wise compression that contradict each other, or have no effect. See `usage`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Set

from distiller.apputils.quantization_usage import flag_of

_SETTINGS = ("fractions", "layerwise_bits", "layerwise_layers", "layerwise_resume")


def layerwise_rules(args: Namespace, given: Set[str]) -> Iterator[tuple[bool, str]]:
    """Every rule: whether it is broken, and what is told then.

    Args:
        args: the flags by name.
        given: the names of those that were given.
    """
    has_weights = args.resumed_checkpoint_path or args.load_model_path or args.pretrained
    yield (
        bool(args.layerwise and not has_weights),
        "--layerwise: needs trained weights: a checkpoint, given with --resume-from or "
        "--exp-load-weights-from, or --pretrained",
    )
    for name in _SETTINGS:
        yield name in given and not args.layerwise, f"{flag_of(name)}: goes with --layerwise"
