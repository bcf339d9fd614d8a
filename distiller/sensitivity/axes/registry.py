"""The axes by name.

Knows nothing about what they do.
"""

from __future__ import annotations

from distiller.errors import UnknownNameError, did_you_mean
from distiller.sensitivity.axes.axis import Axis
from distiller.sensitivity.axes.bit_axes import ActivationBitsAxis, WeightBitsAxis
from distiller.sensitivity.axes.group_axis import GroupAxis
from distiller.sensitivity.axes.pruning_axes import ChannelAxis, ElementAxis, FilterAxis, NMAxis
from distiller.sensitivity.axes.rank_axis import RankAxis

__all__ = ["AXES", "find_axis"]

AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        ElementAxis(),
        FilterAxis(),
        ChannelAxis(),
        GroupAxis(),
        NMAxis(),
        WeightBitsAxis(),
        ActivationBitsAxis(),
        RankAxis(),
    )
}
"""What `--sense` takes."""


def find_axis(name: str) -> Axis:
    """The axis called `name`; case does not matter.

    Raises:
        UnknownNameError: there is none.
    """
    if name.lower() not in AXES:
        raise UnknownNameError(
            f"sensitivity: unknown axis '{name}', not one of {', '.join(AXES)}"
            f"{did_you_mean(name.lower(), AXES)}"
        )
    return AXES[name.lower()]
