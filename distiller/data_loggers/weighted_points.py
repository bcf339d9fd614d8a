"""A distribution as few weighted points, for sums of absolute deviations from any centre.

Neighbouring values are replaced by one point at their mean, a group at a time. The sum S(c) = sum |x - c| is
what it was but for the group that c falls into, and shrinks by a share of less than 2 g where that group has
the share g of all weight, whatever the values are: with P and N the parts of the group's sum above and below
c it loses 2 min(P, N), and the values outside the group, which lie farther from c, add at least
min(P, N) (1 - g) / g to what is left. Knows nothing about tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, slots=True, eq=False)
class WeightedPoints:
    """Points and how many values each stands for.

    Attributes:
        values: (points,), float64, ascending.
        weights: (points,), float64, positive.
    """

    values: np.ndarray
    weights: np.ndarray

    def deviation_sum(self, centre: float) -> float:
        """Sum over the points of weight * |value - centre|."""
        return float(np.dot(self.weights, np.abs(self.values - centre)))


def points_of(sample: np.ndarray, weight: float, groups: int) -> WeightedPoints:
    """A sample as a few points.

    Args:
        sample: (values,), at least one, in any order.
        weight: how many values each of the sample stands for.
        groups: most points to make, of equal shares.
    """
    ordered = np.sort(sample)
    starts, sizes = _cuts(len(ordered), min(groups, len(ordered)))
    return WeightedPoints(np.add.reduceat(ordered, starts, dtype=np.float64) / sizes, sizes * weight)


@lru_cache(maxsize=4)  # an output and the input that it becomes are merged one after the other
def merged(parts: tuple[WeightedPoints, ...], groups: int, border: float) -> WeightedPoints:
    """All points together as a few.

    Args:
        parts: at least one.
        groups: most points to make, but for one; a group has at most this share, and one point more.
        border: no group has values on both sides of it, so that S(border) stays exact.
    """
    values = np.concatenate([part.values for part in parts])
    weights = np.concatenate([part.weights for part in parts])
    order = np.argsort(values)
    values, weights = values[order], weights[order]
    reached = np.cumsum(weights)
    group = np.minimum((reached - weights / 2) / reached[-1] * groups, groups - 1).astype(np.int64)
    group += values > border
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    sums = np.add.reduceat(weights, starts)
    return WeightedPoints(np.add.reduceat(values * weights, starts) / sums, sums)


@lru_cache(maxsize=64)
def _cuts(length: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each of so many groups of a range begins, and how long it is."""
    starts = np.arange(groups) * length // groups
    return starts, np.diff(starts, append=length)
