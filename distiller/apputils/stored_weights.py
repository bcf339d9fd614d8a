"""Weights of few values that are quantized like full-precision ones, to be stored in their place.

What is stored is quantized to the very same weight. That is the quantized weight itself, where quantizing it
again changes nothing. Scales are often of the range of the full-precision weight, or of its mean; so
these are tried as well:

    averaged     one magnitude, of the whole weight or of each row (index of dimension 0), but for one element
                 that makes their mean what it was (scales by a mean)
    extremes     the quantized weight, but for the largest and the smallest element, of all or of each row
                 (scales by a range)
    chosen       of all elements of one quantized value one full-precision value (scales of anything that the
                 extremes decide, and values that are bent, as by a tanh)

Knows nothing about layers, files, or how a weight is quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["same_numbers", "stored_weight"]

_DIGITS = 24  # of float32
_TINY = 1e-300
_NEAR = (0, 1, -1, 2, -2)


def stored_weight(original: Tensor, computed: Tensor, quantized: Callable[[Tensor], Tensor]) -> Tensor | None:
    """A weight of few values that is quantized to the same one.

    Args:
        original: the full-precision weight.
        computed: what it is quantized to; same shape and type.
        quantized: quantizes any other weight in its place.

    Returns:
        The first of the ways above that holds in every element; None: none does.
    """
    for candidate in _candidates(original, computed):
        if same_numbers(quantized(candidate), computed):
            return candidate
    return None


def same_numbers(one: Tensor, other: Tensor) -> bool:
    """Equal, NaN to NaN."""
    return torch.equal(one, other) or bool(torch.isclose(one, other, 0, 0, equal_nan=True).all())


def _candidates(original: Tensor, computed: Tensor) -> Iterator[Tensor]:
    yield computed
    if not original.numel() or not original.isfinite().all():
        return
    for rows in sorted({1, original.shape[0] if original.dim() > 1 else 1}):
        yield from _averaged(computed, rows)
        yield _with_extremes(computed, original, rows)
    yield _with_extremes(_chosen(original, computed), original, 1)


def _averaged(computed: Tensor, rows: int) -> Iterator[Tensor]:
    """One magnitude in all or in each row, less by the last bits than the computed one, but for one element.

    Sums of so short numbers are exact in any order; that element makes up for what they lack, so that their
    sum over their number is rounded to the computed magnitude.
    """
    own = computed.reshape(rows, -1)
    is_there = own != 0
    mean, count = own.abs().amax(1).double(), is_there.sum(1).double()
    if computed.dtype != torch.float32 or not torch.equal(
        own.abs(), torch.where(is_there, mean[:, None].float(), 0)
    ):
        return
    unit = torch.exp2(torch.ceil(torch.log2((count * mean).clamp_min(_TINY))) - _DIGITS)
    short = torch.floor(mean / unit) * unit
    total = torch.zeros_like(mean)
    for off in _NEAR:
        near = (torch.round(count * mean / unit) + off) * unit
        total = torch.where((total == 0) & (near.float() / count.float() == mean.float()), near, total)
    values = own.sign() * short[:, None]
    first = is_there.int().argmax(1, keepdim=True)
    makes_up = (total - (count - 1) * short)[:, None] * own.sign().gather(1, first)
    yield values.scatter(1, first, makes_up).float().reshape(computed.shape)


def _with_extremes(values: Tensor, original: Tensor, rows: int) -> Tensor:
    """The values with the range of the original, of all or of each row, and its extremes where they were."""
    own = original.reshape(rows, -1)
    low, high = own.aminmax(dim=1, keepdim=True)
    ranged = values.reshape(rows, -1).clamp(low, high)
    for place, extreme in ((own.argmin(1, keepdim=True), low), (own.argmax(1, keepdim=True), high)):
        ranged = ranged.scatter(1, place, extreme)
    return ranged.reshape(values.shape)


def _chosen(original: Tensor, computed: Tensor) -> Tensor:
    """Of all elements of one quantized value the middle one; 0, where 0 is among them."""
    values, order = original.flatten().sort()
    levels, codes = computed.flatten()[order].unique(return_inverse=True)
    by_level = codes.argsort(stable=True)  # of each level its elements, ascending
    counts = codes.bincount(minlength=levels.numel())
    middles = values[by_level[counts.cumsum(0) - counts + counts // 2]]
    middles[codes[values == 0].unique()] = 0
    chosen = torch.empty_like(values)
    chosen[order] = middles[codes]
    return chosen.reshape(original.shape)
