"""A weight with a fraction of it gone, four ways: smallest weights, distinct values (twice), rank.

    prune    the round(f n) smallest |w| of n are zero; of equal ones the first
    quant    k = u - round(f u) of u distinct values are left: the nearest of k - 1 levels, equally far apart
    kmeans   the nearest of k levels, found by k-means
    svd      rank round((1 - f) min(m, n)) of an (m, n) matrix is left, multiplied back

The fractions have different meanings and cannot be compared; `stored_bytes` is what can. What is sorted or
factored once serves all fractions: `SortedValues`, `Magnitudes` and `Factors` hold it.
Source: nn-compress-haiku (`prune`, `quant`, `quant_kmeans`, `svd`), whose `quant` fails at k = 1, where it
has no level: here that is (min + max) / 2, as at k = 0.
Knows nothing about models.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distiller.errors import DistillerError, UsageError
from distiller.layerwise.kmeans_levels import kmeans_levels, prefix_sum, segment_bounds
from distiller.quantization.codebook.linear_levels import level_count, linear_levels

__all__ = [
    "Factors",
    "Magnitudes",
    "SortedValues",
    "break_even_rank",
    "kmeans_by_fraction",
    "prune_by_fraction",
    "rank_left",
    "svd_by_kept_rank",
]

Array = NDArray[np.float64]


def prune_by_fraction(weight: Tensor, fraction: float) -> Tensor:
    """The weight with its round(fraction * n) smallest |w| zero; `Magnitudes` for several fractions.

    Args:
        weight: any shape, finite, not empty.
        fraction: share of the elements; from 1 all are zero, up to 0 none.

    Raises:
        DistillerError: a weight is not finite, or there is none.
    """
    return Magnitudes(weight).pruned(fraction)


def kmeans_by_fraction(weight: Tensor, fraction: float) -> Tensor:
    """The weight with a share of its distinct values gone, the others found by k-means.

    k as in `quant`; with k = u or more the weight is unchanged, with k = 0 or less it is (min + max) / 2.

    Args:
        weight: any shape, finite, not empty.
        fraction: share of the distinct values that goes.

    Raises:
        DistillerError: a weight is not finite, or there is none.
    """
    values = SortedValues(weight)
    return values.shared(values.kmeans(level_count(values.distinct, fraction)))


def svd_by_kept_rank(weight: Tensor, kept: float) -> Tensor:
    """The weight at rank round(kept * min(m, n)) as a matrix (m, n), multiplied back.

    Full rank is the weight as it is, rank 0 all zeros.

    Args:
        weight: (m, ...); beyond two dimensions the others are n together.
        kept: share of the full rank.

    Raises:
        DistillerError: a weight is not finite, or there is none.
    """
    _check_share(kept)
    factors = Factors(weight)
    return factors.product(round(kept * min(factors.shape)))


def rank_left(rows: int, columns: int, fraction: float) -> int:
    """round((1 - fraction) * min(rows, columns)), within 0 and the full rank."""
    _check_share(fraction)
    full = min(rows, columns)
    return min(full, max(0, round((1 - fraction) * full)))


def break_even_rank(rows: int, columns: int) -> float:
    """rows * columns / (rows + columns): below it two factors have fewer parameters than their product."""
    return rows * columns / (rows + columns)


class Magnitudes:
    """A weight whose elements are sorted by |w| once, to be pruned at several fractions.

    Args:
        weight: any shape, finite, not empty.

    Raises:
        DistillerError: a weight is not finite, or there is none.
    """

    def __init__(self, weight: Tensor) -> None:
        _check(weight)
        self._weight = weight.detach()
        self._order = torch.argsort(self._weight.abs().flatten(), stable=True)

    def pruned(self, fraction: float) -> Tensor:
        """The round(fraction * n) smallest are zero; of equal ones the first."""
        _check_share(fraction)
        count = round(min(max(fraction, 0.0), 1.0) * self._order.numel())
        flat = self._weight.flatten().clone()
        flat[self._order[:count]] = 0.0
        return flat.view(self._weight.shape)


class SortedValues:
    """A weight whose elements are sorted once, to share few values at several fractions.

    Args:
        weight: any shape, finite, not empty.
        keeps_zeros: elements that are exactly 0, as pruning leaves them, stay so and do not count.

    Attributes:
        distinct: how many different values there are, u.

    Raises:
        DistillerError: a weight is not finite, or there is none.
    """

    def __init__(self, weight: Tensor, keeps_zeros: bool = False) -> None:
        _check(weight)
        self._weight = weight.detach()
        flat = self._weight.flatten()
        self._places = torch.nonzero(flat).flatten() if keeps_zeros else None
        chosen = flat if self._places is None else flat[self._places]
        values, order = torch.sort(chosen.float() if chosen.dtype.itemsize < 4 else chosen)
        self._order = order if self._places is None else self._places[order]
        self._sorted = values.cpu().double().numpy()
        self.distinct = int(np.count_nonzero(np.diff(self._sorted))) + 1 if len(self._sorted) else 0

    @cached_property
    def _prefix(self) -> Array:
        return prefix_sum(self._sorted)

    @property
    def _ends(self) -> tuple[float, float]:
        return float(self._sorted[0]), float(self._sorted[-1])

    def linear(self, count: int) -> Array | None:
        """The levels of `quant` at k = `count`: linspace(min, max, k + 1) without both ends.

        Returns:
            (k - 1,), but the middle alone for k up to 1; None: nothing changes, as k is u or more.
        """
        return self._spread(count, max(count - 1, 1), is_interior=True)

    def linear_bits(self, bits: int) -> Array | None:
        """2^bits levels from the least value to the largest, both included; None: no more values."""
        return self._spread(2**bits, 2**bits, is_interior=False)

    def kmeans(self, count: int) -> Array | None:
        """Up to `count` levels by k-means; up to 0 the middle alone; None: `count` is u or more."""
        if count >= self.distinct:
            return None
        return kmeans_levels(self._sorted, self._prefix, count) if count > 0 else self.linear(0)

    def shared(self, levels: Array | None) -> Tensor:
        """The weight with each element at its nearest level, of two the upper one.

        Args:
            levels: ascending, from 1; None: the weight as it is.
        """
        flat = self._weight.flatten().clone()
        if levels is not None:
            held = np.diff(segment_bounds(self._sorted, levels))
            taken = torch.from_numpy(levels).to(flat.dtype).repeat_interleave(torch.from_numpy(held))
            flat[self._order] = taken.to(flat.device)
        return flat.view(self._weight.shape)

    def _spread(self, most: int, count: int, *, is_interior: bool) -> Array | None:
        if most >= self.distinct:
            return None
        low, high = (torch.tensor(end, dtype=torch.float64) for end in self._ends)
        return linear_levels(low, high, count, is_interior=is_interior).numpy()


class Factors:
    """The singular value decomposition of a weight as a matrix, made once, for several ranks.

    Args:
        weight: (m, ...); beyond two dimensions the others are n together. Finite, not empty.

    Attributes:
        shape: (m, n).

    Raises:
        UsageError: the weight is no matrix.
        DistillerError: a weight is not finite, or there is none.
    """

    def __init__(self, weight: Tensor) -> None:
        _check(weight)
        if weight.dim() < 2:
            raise UsageError(f"svd: a weight of two or more dimensions is needed, got {tuple(weight.shape)}")
        self._weight = weight.detach()
        matrix = self._weight.flatten(1)
        self.shape = (matrix.shape[0], matrix.shape[1])

    @cached_property
    def _decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        matrix = self._weight.flatten(1)
        return torch.linalg.svd(matrix.float() if matrix.dtype.itemsize < 4 else matrix, full_matrices=False)

    def pair(self, rank: int) -> tuple[Tensor, Tensor]:
        """U sqrt(S) and sqrt(S) V^T: (m, rank) and (rank, n), whose product is the weight at this rank."""
        u, s, vt = self._decomposed
        root = s[:rank].sqrt()
        left, right = u[:, :rank] * root, root[:, None] * vt[:rank]
        return left.to(self._weight.dtype), right.to(self._weight.dtype)

    def product(self, rank: int) -> Tensor:
        """The weight at a rank; at full rank as it is, up to rank 0 all zeros."""
        if rank >= min(self.shape):
            return self._weight.clone()
        if rank <= 0:
            return torch.zeros_like(self._weight)
        u, s, vt = self._decomposed
        return ((u[:, :rank] * s[:rank]) @ vt[:rank]).to(self._weight.dtype).view(self._weight.shape)


def _check_share(share: float) -> None:
    if not math.isfinite(share):
        raise DistillerError(f"layer-wise compression: a fraction must be a finite number, got {share}")


def _check(weight: Tensor) -> None:
    if weight.numel() == 0 or not bool(weight.isfinite().all()):
        raise DistillerError("layer-wise compression: a weight must hold numbers, all of them finite")
