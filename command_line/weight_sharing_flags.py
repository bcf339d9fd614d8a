"""Flags of soft weight sharing."""

from __future__ import annotations

import argparse

from command_line.argument_types import path


def add_weight_sharing_flags(parser: argparse.ArgumentParser) -> None:
    """Pictures of a training that is over."""
    group = parser.add_argument_group("soft weight sharing")
    group.add_argument("--plot-mixture", type=path, metavar="RUN_FOLDER",
        help="draw the weights and mixtures of a training with SoftWeightSharing, epoch by epoch, into its "
        "run folder (mixture_*.png and mixture.gif), and exit")  # fmt: skip
