"""k-means of many numbers into many levels, in seconds: exact where that is quick, else Lloyd's, begun near.

All that is looked at is the sorted values and their cumulative sum, so that an iteration of Lloyd's takes
O(levels log n), however many values there are. It begins

    up to 256 levels   at the exact centroids of the values in equally wide bins
    more               at equal shares of the integral of density^(1/3), as many optimal levels lie

Source: Wang and Song, Ckmeans.1d.dp, The R Journal 3/2 (2011); Panter and Dite, Quantization distortion in
pulse-count modulation with nonuniform spacing of levels, Proc. IRE 39/1 (1951), for the cube root.
Knows nothing about weights or layers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distiller.quantization.codebook.kmeans_1d import EXACT_WORK
from distiller.quantization.codebook.optimal_1d import optimal_centroids

__all__ = ["kmeans_levels", "prefix_sum", "segment_bounds"]

Array = NDArray[np.float64]

_LLOYD_WORK = 2**24
"""Levels times iterations: a few seconds."""
_MOST_ITERATIONS = 1000
_MOST_BINNED = 256
_DENSITY_BINS, _VALUES_OF_A_BIN = 4096, 16


def kmeans_levels(ordered: Array, prefix: Array, count: int) -> Array:
    """Levels for which the sum of (value - nearest level)^2 is small, or the least there is.

    It is the least where distinct values times levels are at most 2^20, and where there are no more distinct
    values than levels. Zeros are values as any others.

    Args:
        ordered: (n,), ascending, finite, from 1 of them.
        prefix: (n + 1,), sums of the first 0 to n of them: `prefix_sum(ordered)`.
        count: how many levels, from 1.

    Returns:
        (count,) or fewer, ascending.
    """
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    if len(starts) <= count:
        return ordered[starts]
    if len(starts) * count <= EXACT_WORK:
        counts = np.diff(np.append(starts, len(ordered))).astype(np.float64)
        return optimal_centroids(ordered[starts][None], counts[None], count)[0]
    del starts
    begun = _binned(ordered, prefix, count) if count <= _MOST_BINNED else _companded(ordered, count)
    return _lloyd(ordered, prefix, begun)


def prefix_sum(ordered: Array) -> Array:
    """(n + 1,): sums of the first 0 to n values."""
    sums = np.empty(len(ordered) + 1)
    sums[0] = 0.0
    np.cumsum(ordered, out=sums[1:])
    return sums


def segment_bounds(ordered: Array, levels: Array) -> NDArray[np.intp]:
    """Where in the sorted values those of each level begin, and the end: (levels + 1,).

    A value in the middle between two levels goes to the upper one.

    Args:
        ordered: (n,), ascending.
        levels: (levels,), ascending, from 1.
    """
    middles = (levels[1:] + levels[:-1]) / 2
    return np.concatenate([[0], np.searchsorted(ordered, middles), [len(ordered)]])


def _lloyd(ordered: Array, prefix: Array, levels: Array) -> Array:
    """Lloyd's iterations until no value changes its level, or their time is over; an empty level stays."""
    most = max(1, min(_MOST_ITERATIONS, _LLOYD_WORK // len(levels)))
    bounds = np.full(len(levels) + 1, -1)
    for _ in range(most):
        now = segment_bounds(ordered, levels)
        if np.array_equal(now, bounds):
            break
        bounds = now
        held = np.diff(bounds)
        levels = np.divide(np.diff(prefix[bounds]), held, where=held > 0, out=levels.copy())
    return levels


def _binned(ordered: Array, prefix: Array, count: int) -> Array:
    """Exact centroids of the means of the values in equally wide bins."""
    edges = np.linspace(ordered[0], ordered[-1], EXACT_WORK // count + 1)
    bounds = np.searchsorted(ordered, edges, side="left")
    bounds[-1] = len(ordered)
    held, total = np.diff(bounds), np.diff(prefix[bounds])
    used = held > 0
    weights = held[used].astype(np.float64)
    return optimal_centroids((total[used] / weights)[None], weights[None], count)[0]


def _companded(ordered: Array, count: int) -> Array:
    """Levels at equal shares of the integral of density^(1/3), between the least value and the largest."""
    bins = max(1, min(_DENSITY_BINS, len(ordered) // _VALUES_OF_A_BIN))  # of equally many values
    places = np.linspace(0, len(ordered) - 1, bins + 1).astype(np.intp)
    edges = ordered[places]
    integral = np.cbrt(np.diff(places) * np.diff(edges) ** 2)  # (values / width)^(1/3) * width
    reached = np.concatenate([[0.0], np.cumsum(integral)])
    return np.interp((np.arange(count) + 0.5) / count * reached[-1], reached, edges)
