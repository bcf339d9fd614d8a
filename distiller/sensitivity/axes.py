"""The axes of a sensitivity sweep: what one level of compression does to one weight.

    axis      | applies to                                     | level s prunes
    element   | weights of two and more dimensions             | the floor(s n) smallest of n elements
    filter    | weights of convolutions, (out, in/groups, ...) | the floor(s n) of n filters, dim 0
    channel   | the same                                       | the floor(s n) of n channels, dim 1

Filters and channels are ranked by their mean |w|. A convolution with a single one is left out:
there is nothing to choose from, and its flat curve would look like insensitivity.

Knows nothing about models or how a compressed model is judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from distiller.errors import UnknownNameError, UsageError, did_you_mean
from distiller.pruning.criteria import create_mask_level_criterion
from distiller.pruning.ranking import ranked_structure_mask
from distiller.sensitivity.curves import clean_level

_SMALLEST_STEP = 1e-6
_CONVOLUTION_DIMS = range(3, 6)  # Conv1d, Conv2d, Conv3d


@dataclass(frozen=True, slots=True)
class Axis:
    """One way to compress a weight by a level.

    Attributes:
        name: the name that `--sense` takes.
        applies_to: (canonical parameter name, parameter) -> whether the axis is meant for it.
        compress: (dense weight, level) -> compressed weight, a new tensor. Pure.
        takes: which parameters those are, in words.
    """

    name: str
    applies_to: Callable[[str, Tensor], bool]
    compress: Callable[[Tensor, float], Tensor]
    takes: str


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


def sparsity_levels(start: float, stop: float, step: float) -> tuple[float, ...]:
    """The levels start, start + step, ... and `stop` itself, on the grid or not.

    `sparsity_levels(0, 0.95, 0.05)` are the 20 levels 0.0, 0.05, ..., 0.95 without float noise.
    (Distiller's default left out 0.95.)

    Args:
        start: the first level, 0..1.
        stop: the last level, `start`..1; 1 prunes the whole parameter.
        step: the distance of two levels, 1e-6..1.

    Raises:
        UsageError: a number outside of its range.
    """
    if not 0 <= start <= stop <= 1:
        raise UsageError(
            "sensitivity range: start and stop must satisfy 0 <= start <= stop <= 1, "
            f"got {start:g} and {stop:g}; sparsity is a fraction, as in '0 0.95 0.05'"
        )
    if not _SMALLEST_STEP <= step <= 1:
        raise UsageError(
            f"sensitivity range: step must lie between {_SMALLEST_STEP:g} and 1, got {step:g}; "
            "as in '0 0.95 0.05'"
        )
    tolerance = 1e-6  # of a step: what float noise may take from a whole number of steps
    steps = math.floor((stop - start) / step + tolerance)
    grid = [clean_level(start + index * step) for index in range(steps + 1)]
    end = clean_level(stop)
    if end == grid[-1] or (len(grid) > 1 and end - grid[-1] <= tolerance * step):
        grid.pop()
    return (*grid, end)


def _is_weight(name: str, dims: int) -> bool:
    return dims >= 2 and "weight" in name.rpartition(".")[2]


def _is_matrix_or_kernel(name: str, weight: Tensor) -> bool:
    return _is_weight(name, weight.dim())


def _has_several(dim: int) -> Callable[[str, Tensor], bool]:
    def applies_to(name: str, weight: Tensor) -> bool:
        return _is_weight(name, weight.dim()) and weight.dim() in _CONVOLUTION_DIMS and weight.shape[dim] > 1

    return applies_to


def _prune_elements(weight: Tensor, level: float) -> Tensor:
    return _masked(weight, create_mask_level_criterion(weight, level))


def _prune_structures(group_type: str) -> Callable[[Tensor, float], Tensor]:
    def prune(weight: Tensor, level: float) -> Tensor:
        return _masked(weight, ranked_structure_mask(weight, group_type, level))

    return prune


def _masked(weight: Tensor, mask: Tensor) -> Tensor:
    # Not weight * mask: that leaves -0.0, and NaN where a weight is infinite.
    return weight.masked_fill(mask == 0, 0.0)


AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis("element", _is_matrix_or_kernel, _prune_elements, "weights of two or more dimensions"),
        Axis(
            "filter", _has_several(0), _prune_structures("Filters"), "convolution weights of several filters"
        ),
        Axis(
            "channel",
            _has_several(1),
            _prune_structures("Channels"),
            "convolution weights of several channels",
        ),
    )
}
