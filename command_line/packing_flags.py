"""Flags of packed files."""

from __future__ import annotations

import argparse

from command_line.argument_types import not_empty, path


def add_packing_flags(parser: argparse.ArgumentParser) -> None:
    """Packed files, written and read."""
    group = parser.add_argument_group("packed files")
    group.add_argument("--pack", nargs="?", const="model.dsz", type=not_empty, metavar="FILE",
        help="write the model into a file that is as small as its zeros, codes and entropy allow: what "
        "training ended with, what --evaluate tested, or, with --resume-from or --exp-load-weights-from and "
        "neither of the two (no --compress, no --kd-teacher), the checkpoint, and exit; a bare name is put "
        "into the run folder (default: model.dsz)")  # fmt: skip
    group.add_argument("--unpack", type=path, metavar="FILE",
        help="write the checkpoint that a packed file holds into the run folder, and exit; --resume-from and "
        "--exp-load-weights-from take a packed file as it is, too")  # fmt: skip
