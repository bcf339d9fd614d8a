"""Flags of the step from a sensitivity sweep to a schedule."""

from __future__ import annotations

import argparse

from command_line.argument_types import at_least, fraction, path


def add_recommend_flags(parser: argparse.ArgumentParser) -> None:
    """The sweep, what is asked for, and how it is pruned."""
    group = parser.add_argument_group("from a sensitivity sweep to a schedule")
    group.add_argument("--recommend", type=path, metavar="SWEEP",
        help="find a level for each layer from a finished sweep, its run folder or CSV file, write "
        "schedule.yaml, and exit; give the sweep's model, and one of the next three")  # fmt: skip
    group.add_argument("--max-drop", type=fraction(0, up_to=100), metavar="POINTS",
        help="remove as much as costs no more points of top-1, the single drops added up")  # fmt: skip
    group.add_argument("--target-sparsity", type=fraction(above=0, below=1), metavar="S",
        help="this share of the swept weights' elements is zero, at the least summed drop")  # fmt: skip
    group.add_argument("--target-macs", type=fraction(above=0, below=1), metavar="SHARE",
        help="this share of the MACs stays, at the least summed drop (of elements: of multiplications by "
        "what is not zero)")  # fmt: skip
    group.add_argument("--recommend-axis", type=str.lower, metavar="AXIS",
        help="which axis of the sweep, if it has several")  # fmt: skip
    group.add_argument("--recommend-pruner", type=str.lower, choices=("agp", "sensitivity"), default="agp",
        help="elements go gradually, or by SensitivityPruner with a sensitivity for each layer "
        "(default: %(default)s)")  # fmt: skip
    group.add_argument("--recommend-epochs", type=at_least(2, up_to=10_000), default=10, metavar="N",
        help="epochs of the schedule; the first 60 %% of them prune (default: %(default)s)")  # fmt: skip
    group.add_argument("--verify", action="store_true",
        help="with --recommend: test the levels all together, in one shot without training")  # fmt: skip
