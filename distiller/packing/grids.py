"""Finding the grid that float32 values are on: whole multiples of a scale, exactly as float32 multiplies.

Quantized weights are; how they came about need not be known. What is found is a guess that the caller checks.
Knows nothing about files.
"""

from __future__ import annotations

import numpy as np

__all__ = ["grid_scale", "on_grid", "row_scales"]

_DIVISORS = range(1, 9)
_NEIGHBOURS = range(-3, 4)


def on_grid(steps: np.ndarray, scales: np.ndarray | np.float32) -> np.ndarray:
    """The patterns (uint32) of steps * scales, in float32.

    Args:
        steps: whole numbers of a magnitude up to 2^24, which float32 has exactly.
        scales: one, or one for each step.
    """
    with np.errstate(all="ignore"):
        return (steps.astype(np.float32) * scales).astype(np.float32).view(np.uint32)


def grid_scale(values: np.ndarray, sample: np.ndarray) -> np.float32 | None:
    """The scale of a grid that holds all values; None when none is found.

    Args:
        values: float32, (count,).
        sample: some of them.
    """
    if not bool(np.isfinite(values).all()):
        return None
    found = _scale_of(sample)
    if found is None:
        return None
    if _holds(values, found):
        return found
    for scale in _candidates(float(np.abs(values).max()), float(found)):
        if _holds(values, scale):
            return scale
    return None


def row_scales(values: np.ndarray, rows: np.ndarray, row_count: int) -> np.ndarray | None:
    """A scale for each row, float32, (row_count,); None when a row is on no grid.

    A row without other values than 0 has the scale 1.

    Args:
        values: float32, (count,).
        rows: the row of each.
        row_count: how many rows there are.
    """
    if not bool(np.isfinite(values).all()):
        return None
    order = np.argsort(rows, kind="stable")
    ends = np.cumsum(np.bincount(rows, minlength=row_count))
    scales = np.ones(row_count, dtype=np.float32)
    for row, own in enumerate(np.split(values[order], ends[:-1])):
        if not own.size or not own.any():
            continue
        found = grid_scale(own, own)
        if found is None:
            return None
        scales[row] = found
    return scales


def _scale_of(values: np.ndarray) -> np.float32 | None:
    """A scale of which all these values are multiples."""
    different = np.unique(np.abs(values))
    different = different[different > 0].astype(np.float64)
    if not different.size:
        return None
    step = float(np.diff(different, prepend=0).min())
    largest = float(different[-1])
    for divisor in _DIVISORS:
        fine = step / divisor
        if not fine > 0 or largest / fine > 1 << 17:
            return None
        # From near to far each value is a known number of steps, which makes the step more precise.
        for value in different:
            count = np.rint(value / fine)
            if count and abs(value / fine - count) < 0.2:
                fine = value / count
        for scale in _candidates(largest, fine):
            if _holds(values, scale):
                return scale
    return None


def _candidates(largest: float, scale: float) -> list[np.float32]:
    """Float32 numbers near the largest value over its number of steps."""
    count = np.rint(largest / scale)
    if not count:
        return []
    bits = int(np.float32(largest / count).view(np.int32))
    near = [np.int32(bits + off).view(np.float32) for off in sorted(_NEIGHBOURS, key=abs) if bits + off > 0]
    return [scale for scale in near if np.isfinite(scale)]


def _holds(values: np.ndarray, scale: np.float32) -> bool:
    with np.errstate(all="ignore"):
        steps = np.rint(values.astype(np.float64) / float(scale))
    if float(np.abs(steps).max()) > 1 << 24:
        return False
    return np.array_equal(on_grid(steps, scale), np.ascontiguousarray(values).view(np.uint32))
