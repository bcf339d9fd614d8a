"""Flags of knowledge distillation."""

from __future__ import annotations

import argparse
from typing import Any

from command_line.argument_types import arch, at_least, fraction, path

LARGEST = 1e6
"""Of weights."""


def add_distillation_flags(parser: argparse.ArgumentParser) -> None:
    """Learning from a teacher."""
    group = parser.add_argument_group("knowledge distillation (when training)")
    _add_teacher(group)
    _add_loss(group)
    group.add_argument("--kd-chain", type=_archs, metavar="ARCH[,ARCH...]",
        help="teacher assistants: each of these learns from the one before it, the first from the teacher, "
        "and ARCH of --arch from the last; each in a folder of its own in the run folder")  # fmt: skip
    group.add_argument("--kd-chain-resume", type=path, metavar="RUN_FOLDER",
        help="go on with a chain that was interrupted, given the same flags")  # fmt: skip


def _add_teacher(group: Any) -> None:
    group.add_argument("--kd-teacher", type=arch, metavar="ARCH",
        help="the network to learn from; its weights by --kd-resume or --kd-pretrained")  # fmt: skip
    group.add_argument("--kd-pretrained", action="store_true", help="torchvision's weights")
    group.add_argument("--kd-resume", type=path, metavar="CHECKPOINT",
        help="the teacher's; it may be thinned or quantized")  # fmt: skip
    group.add_argument("--kd-half", action="store_true",
        help="the teacher computes in 16 bits: float16 on CUDA, bfloat16 elsewhere")  # fmt: skip
    group.add_argument("--kd-no-cache", action="store_true",
        help="do not keep the teacher's answers; they are kept (64 MiB at most, in the checkpoints too) as "
        "long as images come back unchanged")  # fmt: skip


def _add_loss(group: Any) -> None:
    weight = {"type": fraction(0, up_to=LARGEST), "metavar": "W"}
    group.add_argument("--kd-temperature", "--kd-temp", type=float, default=1.0, metavar="T",
        help="of the softened probabilities (default: %(default)s)")  # fmt: skip
    group.add_argument("--kd-distill-wt", "--kd-dw", default=0.5, **weight,
        help="weight of the divergence from the teacher (default: %(default)s)")  # fmt: skip
    group.add_argument("--kd-student-wt", "--kd-sw", default=0.5, **weight,
        help="weight of the loss of the labels (default: %(default)s)")  # fmt: skip
    group.add_argument("--kd-teacher-wt", "--kd-tw", default=0.0, **weight,
        help="weight of the loss of the teacher's most likely label (default: %(default)s)")  # fmt: skip
    group.add_argument("--kd-loss", type=str.lower, choices=("kl", "cross_entropy"), default="kl",
        help="the divergence (default: %(default)s)")  # fmt: skip
    group.add_argument(
        "--kd-no-t-squared",
        action="store_true",
        help="do not multiply the divergence by the squared temperature",
    )
    group.add_argument("--kd-no-labels", action="store_true", help="learn from the teacher alone")
    group.add_argument("--kd-start-epoch", type=at_least(0), default=0, metavar="E",
        help="learn from labels alone before this epoch (default: %(default)s)")  # fmt: skip


def _archs(text: str) -> list[str]:
    """Names of architectures, comma-separated."""
    names = [arch(name.strip()) for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be names of architectures, comma-separated, got '{text}'")
    return names
