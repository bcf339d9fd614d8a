"""The levels of a range START STOP STEP, checked and without the noise of float arithmetic.

Knows nothing about what a level does.
"""

from __future__ import annotations

import math

from distiller.errors import UsageError
from distiller.quantization.affine import MAX_BITS, MIN_BITS
from distiller.sensitivity.curves import clean_level

__all__ = ["bit_levels", "share_levels", "sparsity_levels"]

_SMALLEST_STEP = 1e-6


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
    return share_levels(start, stop, step, "sparsity")


def share_levels(start: float, stop: float, step: float, what: str) -> tuple[float, ...]:
    """`sparsity_levels` of something else that is a fraction.

    Args:
        start: as there.
        stop: as there.
        step: as there.
        what: the fraction, named in errors.

    Raises:
        UsageError: a number outside of its range.
    """
    if not 0 <= start <= stop <= 1:
        raise UsageError(
            "sensitivity range: start and stop must satisfy 0 <= start <= stop <= 1, "
            f"got {start:g} and {stop:g}; {what} is a fraction, as in '0 0.95 0.05'"
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


def bit_levels(start: float, stop: float, step: float) -> tuple[float, ...]:
    """The widths start, start - step, ... and `stop` itself; upwards where `stop` is more.

    `bit_levels(8, 2, 1)` are 8, 7, ..., 2.

    Args:
        start: the first width, 2 to 16.
        stop: the last width, 2 to 16.
        step: the distance of two widths, 1 or more.

    Raises:
        UsageError: a number that is not whole, or outside of its range.
    """
    if not (_is_width(start) and _is_width(stop)):
        raise UsageError(
            f"sensitivity range: start and stop must be whole numbers of bits, {MIN_BITS} to {MAX_BITS}, "
            f"got {start:g} and {stop:g}; as in '8 2 1'"
        )
    if not (step >= 1 and float(step).is_integer()):
        raise UsageError(
            f"sensitivity range: step must be a whole number of bits, 1 or more, got {step:g}; as in '8 2 1'"
        )
    by = int(step) if start <= stop else -int(step)
    grid = [float(width) for width in range(int(start), int(stop), by)]
    return (*grid, float(stop))


def _is_width(bits: float) -> bool:
    return MIN_BITS <= bits <= MAX_BITS and float(bits).is_integer()
