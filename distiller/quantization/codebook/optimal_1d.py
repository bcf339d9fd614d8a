"""Exact k-means of numbers: the partition of sorted values into intervals that has the least squared error.

    D[q, i] = min over j <= i of D[q - 1, j] + cost(j, i)

D[q, i] is the error of the first i values in at most q clusters, cost(j, i) that of values j to i - 1 about
their mean. The best j never falls as i grows, so that divide and conquer looks at O(n log n) pairs for each
q; all positions of one depth, of all rows, are one operation.
Source: Wang and Song, Ckmeans.1d.dp, The R Journal 3/2 (2011); divide and conquer as in its later versions.
Knows nothing about weights of networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["optimal_centroids"]

Array = NDArray[np.float64]


def optimal_centroids(values: Array, weights: Array, count: int, has_zero: bool = False) -> Array:
    """The centroids of least sum of weights * (value - nearest centroid)^2, of each row by itself.

    O(rows * n * log n * count) time and O(rows * n * count) memory.

    Args:
        values: (rows, n), ascending in each row, finite.
        weights: (rows, n), from 0; what weighs nothing does not count.
        count: how many centroids, from 1.
        has_zero: 0 is a centroid too, one more, which stays where it is and is not returned.

    Returns:
        (rows, count), ascending; what is not needed repeats another one, 0 in a row where nothing counts.
    """
    shift = np.divide((values * weights).sum(1), weights.sum(1), where=weights.sum(1) > 0, out=_zeros(values))
    sums = _Sums.of(values, weights, shift)
    rows, n = values.shape
    best = np.full((rows, n + 1), np.inf)
    best[:, 0] = 0
    cuts: list[Any] = []  # for each count of clusters, where the last of them begins
    if not has_zero:
        for _ in range(count):
            best, cut = _with_one_more(best, sums)
            cuts.append(cut)
        return _filled(_traced(cuts, [], [], sums) + shift[:, None])

    about_zero = _prefix(weights * values**2)
    with_zero = about_zero
    cuts_with_zero: list[Any] = []
    zero_cuts: list[Any] = []
    for _ in range(count):
        best, cut = _with_one_more(best, sums)
        with_zero, cut_with_zero = _with_one_more(with_zero, sums)
        with_zero, zero_cut = _zero_last(best, with_zero, about_zero)
        cuts.append(cut)
        cuts_with_zero.append(cut_with_zero)
        zero_cuts.append(zero_cut)
    return _filled(_traced(cuts, cuts_with_zero, zero_cuts, sums) + shift[:, None])


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over the first 0 to n values, (rows, n + 1): of weights, and of shifted values and squares."""

    weight: Array
    value: Array
    square: Array

    @classmethod
    def of(cls, values: Array, weights: Array, shift: Array) -> _Sums:
        shifted = values - shift[:, None]  # so that differences of sums cancel little
        return cls(_prefix(weights), _prefix(weights * shifted), _prefix(weights * shifted**2))

    def cost(self, start: Any, end: Any) -> Array:
        """Squared error about the mean of the values between two flat positions in the sums."""
        weight = self.weight.take(end) - self.weight.take(start)
        value = self.value.take(end) - self.value.take(start)
        value *= value
        value /= np.maximum(weight, np.finfo(np.float64).tiny, out=weight)
        error = self.square.take(end) - self.square.take(start) - value
        return np.maximum(error, 0, out=error)


def _with_one_more(before: Array, sums: _Sums) -> tuple[Array, Any]:
    """The least errors with one cluster more, and where that begins; both (rows, n + 1)."""
    rows, positions = before.shape
    last = positions - 1
    base = np.arange(rows)[:, None] * positions  # of each row in the flat sums
    after, cuts = before.copy(), np.zeros((rows, positions), np.int32)
    stride = 1 << max(last.bit_length() - 1, 0)
    while stride and last:
        ends = np.arange(stride, last + 1, 2 * stride)
        lowest = cuts[:, ends - stride]
        right = np.minimum(ends + stride, last)
        highest = np.where(ends + stride <= last, cuts[:, right], ends)
        after[:, ends], cuts[:, ends] = _least(before, sums, base, ends, lowest, np.minimum(highest, ends))
        stride //= 2
    return after, cuts


def _least(before: Array, sums: _Sums, base: Any, ends: Any, lowest: Any, highest: Any) -> tuple[Array, Any]:
    """For each end the least `before` + cost of a cluster that begins from `lowest` to `highest`, and where.

    `base` is (rows, 1), `ends` (ends,), the others are (rows, ends).
    """
    lengths = (np.maximum(highest, lowest) - lowest + 1).ravel()
    firsts = np.cumsum(lengths) - lengths
    owner = np.repeat(np.arange(lengths.size), lengths)
    start = np.arange(owner.size) + ((lowest + base).ravel() - firsts)[owner]
    error = sums.cost(start, (ends + base).ravel()[owner])
    error += before.take(start)
    least = np.minimum.reduceat(error, firsts)
    hits = np.flatnonzero(error == least[owner])[::-1]
    cut = np.empty(lengths.size, np.int64)
    cut[owner[hits]] = start[hits]  # of equal ones the first: it comes last here
    return least.reshape(lowest.shape), cut.reshape(lowest.shape) - base


def _zero_last(best: Array, with_zero: Array, about_zero: Array) -> tuple[Array, Any]:
    """The least errors if 0 may be the last cluster, and where that begins; -1 where it is another one."""
    gain = best - about_zero
    least = np.minimum.accumulate(gain, axis=1)
    positions = np.arange(gain.shape[1])
    begins = np.maximum.accumulate(np.where(gain == least, positions, 0), axis=1)
    error = least + about_zero
    is_last = error < with_zero
    return np.where(is_last, error, with_zero), np.where(is_last, begins, -1)


def _traced(cuts: list[Any], cuts_with_zero: list[Any], zero_cuts: list[Any], sums: _Sums) -> Array:
    """The shifted means of the clusters, (rows, count), NaN of empty ones; from the last to the first."""
    rows, positions = sums.weight.shape
    row = np.arange(rows)
    end = np.full(rows, positions - 1)
    awaits_zero = np.full(rows, bool(zero_cuts))
    means = np.full((rows, len(cuts)), np.nan)
    for index in reversed(range(len(cuts))):
        start = cuts[index][row, end]
        if zero_cuts:
            zero_cut = zero_cuts[index][row, end]
            is_zero = awaits_zero & (zero_cut >= 0)
            end = np.where(is_zero, zero_cut, end)
            awaits_zero &= ~is_zero
            start = np.where(awaits_zero, cuts_with_zero[index][row, end], cuts[index][row, end])
        weight = sums.weight[row, end] - sums.weight[row, start]
        value = sums.value[row, end] - sums.value[row, start]
        means[:, index] = np.divide(value, weight, where=weight > 0, out=np.full(rows, np.nan))
        end = start
    return means


def _filled(centroids: Array) -> Array:
    """The centroids with a neighbour's value in the place of each NaN; 0 in a row of nothing else."""
    highest = np.where(np.isnan(centroids), -np.inf, centroids).max(1, keepdims=True)
    filled = np.sort(np.where(np.isnan(centroids), highest, centroids), axis=1)
    return np.where(np.isfinite(filled), filled, 0.0)


def _prefix(x: Array) -> Array:
    return np.concatenate([np.zeros((len(x), 1)), np.cumsum(x, axis=1)], axis=1)


def _zeros(values: Array) -> Array:
    return np.zeros(len(values))
