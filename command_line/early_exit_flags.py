"""Flags of early exit."""

from __future__ import annotations

import argparse

from command_line.argument_types import fraction, not_empty

CRITERIA = ("entropy", "confidence")
LARGEST_ENTROPY = 100.0


def add_early_exit_flags(parser: argparse.ArgumentParser) -> None:
    """Networks that answer easy images before their end."""
    group = parser.add_argument_group("early exit")
    group.add_argument("--earlyexit-layers", nargs="+", type=not_empty, metavar="LAYER",
        help="attach an exit behind each of these layers, in the order of execution; checkpoints keep them, "
        "and resnet*_earlyexit has exits of its own")  # fmt: skip
    group.add_argument("--earlyexit_lossweights", "--earlyexit-lossweights", dest="earlyexit_lossweights",
        nargs="+", type=fraction(0, below=1), metavar="W",
        help="when training: the weight of each exit's loss; the final output has the rest of 1")  # fmt: skip
    group.add_argument("--earlyexit_thresholds", "--earlyexit-thresholds", dest="earlyexit_thresholds",
        nargs="+", type=_threshold, metavar="T",
        help="in the last test, an image leaves at the first exit whose answer has at most this entropy, in "
        "nats (with --earlyexit-criterion confidence: at least this highest probability); 'never' closes an "
        "exit. Labels are not looked at")  # fmt: skip
    group.add_argument("--earlyexit-criterion", type=str.lower, choices=CRITERIA, default="entropy",
        help="(default: %(default)s)")  # fmt: skip
    group.add_argument("--earlyexit-max-drop", type=fraction(0, up_to=100), metavar="POINTS",
        help="choose the thresholds on the validation set: the least work at which top-1 is at most so many "
        "percentage points below that of the final output")  # fmt: skip
    group.add_argument("--earlyexit-shares", nargs="+", type=fraction(0, up_to=1), metavar="P",
        help="choose the thresholds on the validation set: this share of all images leaves at each "
        "exit")  # fmt: skip


def _threshold(text: str) -> float | None:
    """An entropy or a confidence, or None for `never`."""
    if text.lower() == "never":
        return None
    try:
        return fraction(0, up_to=LARGEST_ENTROPY)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or never") from error
