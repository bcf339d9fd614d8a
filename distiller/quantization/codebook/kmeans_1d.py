"""k-means of numbers, by rows: exact where that is quick, else Lloyd's iterations from a given start.

Deterministic; in either case sorted values and their cumulative sums are all that is looked at, so that one
of Lloyd's iterations takes O(count log n).
Source: Wang and Song, Ckmeans.1d.dp, The R Journal 3/2 (2011); Lloyd, Least squares quantization in PCM
(1982); the three starts are those of Han et al., Deep Compression, ICLR 2016 (arXiv 1510.00149), section 3.2.
Knows nothing about layers.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from distiller.quantization.codebook.optimal_1d import optimal_centroids

__all__ = ["EXACT_WORK", "Start", "initial_centroids", "kmeans_1d", "lloyd"]

Array = NDArray[np.float64]
Start = Literal["exact", "linear", "quantile", "random"]

EXACT_WORK = 2**20
"""Values times centroids, up to which "exact" is: 65,536 values for 16 centroids; half a second or so."""

MOST_ITERATIONS = 1000
"""Of Lloyd's; it stops as soon as no value changes its cluster, as a rule long before."""


def kmeans_1d(rows: Array, count: int, start: Start = "exact", has_zero: bool = False) -> Array:
    """Centroids of each row by itself: sum of (value - nearest centroid)^2 is small, or the least there is.

    Values that are exactly 0 do not count: that is what pruning leaves. A row of at most `count` distinct
    values has these for centroids.

    Args:
        rows: (rows, n), finite.
        count: how many centroids, from 1.
        start: "exact": the least sum, if distinct values times centroids are at most `EXACT_WORK` (over all
            rows), else as "quantile"; the others are where Lloyd's iterations begin, see `initial_centroids`.
        has_zero: 0 is a centroid too, one more, which stays where it is and is not returned.

    Returns:
        (rows, count), ascending; what is not needed repeats another one.
    """
    ordered = np.sort(rows.astype(np.float64), axis=1)
    tallies = [np.unique(row[row != 0], return_counts=True) for row in ordered]
    most = max((len(values) for values, _ in tallies), default=0)
    if start == "exact" and len(tallies) * most * count <= EXACT_WORK:
        return _optimal(tallies, most, count, has_zero)
    centroids = np.zeros((len(tallies), count))
    for index, (values, counts) in enumerate(tallies):
        if len(values) <= count:
            centroids[index] = _repeated(values, count)
        else:
            begun = initial_centroids(values, counts, count, start)
            centroids[index] = lloyd(values, counts.astype(np.float64), begun, has_zero)
    return centroids


def initial_centroids(values: Array, counts: NDArray[np.int_], count: int, start: Start) -> Array:
    """Where Lloyd's iterations begin.

    Args:
        values: (n,), distinct and ascending, more than `count`.
        counts: (n,), how often each is there.
        count: how many centroids, from 1.
        start: "linear": equally far apart from the least value to the largest; "quantile" and "exact":
            equally many values apart (density-based); "random": values drawn at random (Forgy), always the
            same.

    Returns:
        (count,), ascending.
    """
    if start == "linear":
        return np.linspace(values[0], values[-1], count) if count > 1 else (values[:1] + values[-1:]) / 2
    if start == "random":
        drawn = np.random.default_rng(0).choice(values, count, replace=False, p=counts / counts.sum())
        return np.sort(drawn)
    reached = np.cumsum(counts)
    return values[np.searchsorted(reached, (np.arange(count) + 0.5) / count * reached[-1], side="right")]


def lloyd(values: Array, weights: Array, centroids: Array, has_zero: bool = False) -> Array:
    """Lloyd's iterations until no value changes its cluster; a centroid without values stays.

    A value in the middle between two centroids goes to the upper one.

    Args:
        values: (n,), ascending.
        weights: (n,), above 0.
        centroids: (count,), ascending.
        has_zero: 0 is a centroid too, one more, which stays where it is and is not returned.

    Returns:
        (count,), ascending; in no iteration does the error rise.
    """
    zero_at = int(np.searchsorted(centroids, 0.0))
    if has_zero:
        centroids = np.insert(centroids, zero_at, 0.0)
    weight, total = (np.concatenate([[0.0], np.cumsum(x)]) for x in (weights, weights * values))
    bounds = np.full(len(centroids) + 1, -1)
    for _ in range(MOST_ITERATIONS):
        middles = (centroids[1:] + centroids[:-1]) / 2
        now = np.concatenate([[0], np.searchsorted(values, middles), [len(values)]])
        if np.array_equal(now, bounds):
            break
        bounds = now
        held = np.diff(weight[bounds])
        centroids = np.divide(np.diff(total[bounds]), held, where=held > 0, out=centroids.copy())
        if has_zero:
            centroids[zero_at] = 0.0
    return np.delete(centroids, zero_at) if has_zero else centroids


def _optimal(tallies: list[tuple[Array, NDArray[np.int_]]], most: int, count: int, has_zero: bool) -> Array:
    centroids = np.zeros((len(tallies), count))
    values, weights = np.zeros((2, len(tallies), most))
    for index, (distinct, counts) in enumerate(tallies):
        if len(distinct):
            values[index] = _repeated(distinct, most)
            weights[index, : len(distinct)] = counts
    many = np.array([len(distinct) > count for distinct, _ in tallies], bool)
    if many.any():
        centroids[many] = optimal_centroids(values[many], weights[many], count, has_zero)
    for index in np.flatnonzero(~many):
        centroids[index] = _repeated(tallies[index][0], count)
    return centroids


def _repeated(values: Array, count: int) -> Array:
    """The values, and the last of them until there are `count`; zeros if there is none."""
    return np.pad(values, (0, count - len(values)), mode="edge") if len(values) else np.zeros(count)
