"""Flags of sensitivity sweeps."""

from __future__ import annotations

import argparse
from typing import Any

from command_line.argument_types import at_least, path

_AXES = "element, filter, channel, group, n:m, weight-bits, activation-bits, rank"


def add_sensitivity_flags(parser: argparse.ArgumentParser) -> None:
    """How accuracy is swept against compression."""
    group = parser.add_argument_group("sensitivity sweeps")
    group.add_argument("--sense", dest="sensitivity", type=_names, metavar="AXIS[,AXIS]",
        help="test with one layer after the other compressed, ever more strongly, and exit; axes: "
        f"{_AXES}")  # fmt: skip
    group.add_argument("--sense-range", nargs="+", action=_Range, metavar="LEVEL",
        help="[AXIS] A B STEP: levels of the sweep, both ends included; of several axes, name the one that "
        "is meant, and repeat (default: 0 0.95 0.05; of widths 8 2 1; of n:m all)")  # fmt: skip
    group.add_argument("--sense-params", nargs="+", metavar="NAME",
        help="parameters to sweep, names or patterns (default: all that the axis is meant for)")  # fmt: skip
    group.add_argument("--sense-error", type=float, metavar="POINTS",
        help="end each point as soon as its drop of top-1 is known to so many points, or a tenth of it, with "
        "95 %% confidence; 0.5 is a usual value (default: look at all images)")  # fmt: skip
    group.add_argument("--sense-jobs", type=at_least(1), metavar="N",
        help="processes of a sweep (default: one for each processor, or one where all is soon "
        "done)")  # fmt: skip
    group.add_argument("--sense-fast", action="store_true",
        help="allow bfloat16, which may change rare decisions, where it is faster; says how "
        "many")  # fmt: skip
    group.add_argument("--sense-block", type=at_least(2), default=4, metavar="M",
        help="M of the axis n:m (default: %(default)s)")  # fmt: skip
    group.add_argument("--sense-valid", action="store_true",
        help="sweep on the validation images, so that what is chosen by the curves leaves the test images "
        "unseen")  # fmt: skip
    group.add_argument("--sense-resume", type=path, metavar="RUN_FOLDER",
        help="go on with a sweep that was interrupted")  # fmt: skip


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip().lower() for name in text.split(","))


class _Range(argparse.Action):
    """`A B STEP` of the one axis, or `AXIS A B STEP`, which may be repeated: {axis or "": numbers}."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: Any = None,
    ) -> None:
        axis, numbers = ("", values) if len(values) == 3 else (values[0].lower(), values[1:])
        try:
            if len(numbers) != 3:
                raise ValueError
            found = tuple(float(number) for number in numbers)
        except ValueError:
            parser.error(
                f"argument {option_string}: expected [AXIS] A B STEP, as in '0 0.95 0.05' or "
                f"'weight-bits 8 2 1', got '{' '.join(values)}'"
            )
        ranges = dict(getattr(namespace, self.dest) or {})
        setattr(namespace, self.dest, {**ranges, axis: found})
