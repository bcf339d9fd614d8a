"""One layer's weight, compressed by one technique or by several in turn, with the bytes that it then takes.

    svd -> prune -> quant or kmeans

In a pipeline each technique acts on what the one before would store: a matrix that is stored as two factors
is pruned and quantized factor by factor, and what is pruned stays zero while the others come to share values.
So sizes multiply.
Knows nothing about models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from distiller.errors import UsageError, did_you_mean
from distiller.layerwise.stored_bytes import part_bytes
from distiller.layerwise.techniques import (
    Factors,
    Magnitudes,
    SortedValues,
    break_even_rank,
    rank_left,
)
from distiller.quantization.codebook.linear_levels import level_count

__all__ = ["TECHNIQUES", "CompressedWeight", "WeightToCompress", "read_pipeline"]

TECHNIQUES = ("prune", "quant", "kmeans", "svd")
"""Names, as in the files of nn-compress-haiku."""

_ORDER = {"svd": 0, "prune": 1, "quant": 2, "kmeans": 2}
_ENDS_BYTES = 8
"""The least and the largest level, as float32."""


@dataclass(frozen=True, slots=True)
class CompressedWeight:
    """A weight after compression.

    Attributes:
        weight: dense, as the network computes with it.
        stored_bytes: in the smallest form.
        coded: elements that have a code.
        code_bits: log2 of the levels, summed over these elements.
        factors: (m, r) and (r, n), where that is how it is stored.
    """

    weight: Tensor
    stored_bytes: int
    coded: int = 0
    code_bits: float = 0.0
    factors: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor that is stored."""

    tensor: Tensor
    is_pruned: bool = False
    levels: int | None = None
    table_bytes: int = 0

    @property
    def stored_bytes(self) -> int:
        return part_bytes(
            self.tensor, is_pruned=self.is_pruned, levels=self.levels, table_bytes=self.table_bytes
        )

    @property
    def coded(self) -> int:
        if self.levels is None:
            return 0
        return int((self.tensor != 0).sum()) if self.is_pruned else self.tensor.numel()


def read_pipeline(text: str) -> tuple[str, ...]:
    """The techniques of `prune`, or of a pipeline such as `svd+prune+quant`.

    Raises:
        UsageError: an unknown one, the same or two kinds of the same twice, or another order than svd, prune,
            quant or kmeans.
    """
    steps = tuple(step.strip() for step in text.lower().split("+"))
    for step in steps:
        if step not in TECHNIQUES:
            raise UsageError(
                f"layerwise: unknown technique '{step}', not one of {', '.join(TECHNIQUES)}"
                f"{did_you_mean(step, TECHNIQUES)}"
            )
    ranks = [_ORDER[step] for step in steps]
    if ranks != sorted(set(ranks)):
        raise UsageError(
            f"layerwise: '{text}' cannot be combined so; the order is svd, then prune, then one of quant and "
            "kmeans, each once, as in 'svd+prune+quant'"
        )
    return steps


class WeightToCompress:
    """A weight that is compressed at several settings; what takes long is done once.

    Args:
        weight: (m, ...), finite, not empty; read, never changed.

    Raises:
        DistillerError: a weight is not finite, or there is none.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.detach().clone()

    def at_fraction(self, pipeline: Sequence[str], fraction: float) -> CompressedWeight:
        """By these techniques, one after the other, each at this fraction.

        Args:
            pipeline: as from `read_pipeline`.
            fraction: 0 to 1.
        """
        parts, factors = [_Part(self._weight)], None
        whole: Tensor | None = None
        for step in pipeline:
            if step == "svd":
                parts, factors, whole = self._low_rank(fraction)
            elif step == "prune":
                parts, whole = [self._pruned(part, fraction) for part in parts], None
            else:
                parts, whole = [self._shared(part, step, fraction) for part in parts], None
        if factors is not None:
            left, right = (part.tensor for part in parts)
            factors = (left, right)
            if whole is None:
                whole = (left @ right).view(self._weight.shape)
        return _compressed(parts, parts[0].tensor if whole is None else whole, factors)

    def at_bits(self, technique: str, bits: int) -> CompressedWeight:
        """With 2^bits levels: equally spaced from the least to the largest weight (quant), or of k-means.

        Args:
            technique: `quant` or `kmeans`.
            bits: from 1.
        """
        values = self._values
        levels = values.linear_bits(bits) if technique == "quant" else values.kmeans(2**bits)
        part = _with_levels(_Part(self._weight), values, levels, technique)
        return _compressed([part], part.tensor, None)

    @cached_property
    def _magnitudes(self) -> Magnitudes:
        return Magnitudes(self._weight)

    @cached_property
    def _values(self) -> SortedValues:
        return SortedValues(self._weight)

    @cached_property
    def _factors(self) -> Factors:
        return Factors(self._weight)

    def _low_rank(self, fraction: float) -> tuple[list[_Part], tuple[Tensor, Tensor] | None, Tensor]:
        rows, columns = self._factors.shape
        rank = rank_left(rows, columns, fraction)
        whole = self._factors.product(rank)
        if rank >= break_even_rank(rows, columns):
            return [_Part(whole)], None, whole
        pair = self._factors.pair(rank)
        return [_Part(factor) for factor in pair], pair, whole

    def _pruned(self, part: _Part, fraction: float) -> _Part:
        if part.tensor.numel() == 0:
            return part
        magnitudes = self._magnitudes if part.tensor is self._weight else Magnitudes(part.tensor)
        return replace(part, tensor=magnitudes.pruned(fraction), is_pruned=True)

    def _shared(self, part: _Part, technique: str, fraction: float) -> _Part:
        if not bool(part.tensor.any()):  # nothing is left that could share values
            return part
        if part.tensor is self._weight:
            values = self._values
        else:
            values = SortedValues(part.tensor, keeps_zeros=part.is_pruned)
        count = level_count(values.distinct, fraction)
        levels = values.linear(count) if technique == "quant" else values.kmeans(count)
        return _with_levels(part, values, levels, technique)


def _with_levels(
    part: _Part, values: SortedValues, levels: NDArray[np.float64] | None, technique: str
) -> _Part:
    if levels is None:
        return part
    table = _ENDS_BYTES if technique == "quant" else part.tensor.element_size() * len(levels)
    return replace(part, tensor=values.shared(levels), levels=len(levels), table_bytes=table)


def _compressed(
    parts: Sequence[_Part], weight: Tensor, factors: tuple[Tensor, Tensor] | None
) -> CompressedWeight:
    bits = sum(part.coded * math.log2(part.levels) for part in parts if part.levels is not None)
    return CompressedWeight(
        weight,
        sum(part.stored_bytes for part in parts),
        sum(part.coded for part in parts),
        bits,
        factors,
    )
