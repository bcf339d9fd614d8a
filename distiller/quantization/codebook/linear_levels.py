"""Levels that are equally far apart, and the nearest level of each value.

Source: nn-compress-haiku (`quant`), whose levels are fixed and lie strictly within the range of a weight.
Knows nothing about layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distiller.errors import QuantizationError

__all__ = ["effective_bits", "level_count", "linear_levels", "nearest_level", "quantize_by_fraction"]


def linear_levels(low: Tensor, high: Tensor, count: int, is_interior: bool = False) -> Tensor:
    """`count` levels, equally far apart.

    Args:
        low: lower ends, any shape.
        high: upper ends, alike.
        count: from 1; one level is the middle.
        is_interior: the ends are not among the levels: those of count + 2 that lie between them.

    Returns:
        (..., count), ascending; the ends are exact.
    """
    if is_interior or count == 1:
        shares = torch.arange(1, count + 1, dtype=low.dtype, device=low.device) / (count + 1)
    else:
        shares = torch.arange(count, dtype=low.dtype, device=low.device) / (count - 1)
    low, high = low.unsqueeze(-1), high.unsqueeze(-1)
    return torch.where(shares < 0.5, low + (high - low) * shares, high - (high - low) * (1 - shares))


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """Which level is nearest; of two the upper one, and of equal levels the last.

    Args:
        x: (..., n).
        levels: (..., count), ascending, the other dimensions those of `x`; or (count,).

    Returns:
        int64, (..., n).
    """
    middles = (levels[..., 1:] + levels[..., :-1]) / 2
    return torch.searchsorted(middles.contiguous(), x.contiguous(), right=True)


def level_count(distinct: int, fraction: float) -> int:
    """k = u - round(fraction * u), what is left of u distinct values; halves are rounded to even.

    Raises:
        QuantizationError: the fraction is not a finite number.
    """
    is_number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
    if not is_number or not math.isfinite(fraction):
        raise QuantizationError(
            f"level_count: fraction must be a share of the distinct values, 0 to 1, got {fraction!r}"
        )
    return distinct - round(fraction * distinct)


def effective_bits(levels: int) -> float:
    """log2 of the number of levels, from 1: what one of them takes when packed."""
    return math.log2(levels)


def quantize_by_fraction(weight: Tensor, fraction: float) -> Tensor:
    """The weight with a share of its distinct values gone: `quant(w, f)` of nn-compress-haiku.

        k = u - round(f * u) for u distinct values
        levels = linspace(min, max, k + 1) without both ends: k - 1 of them; each weight becomes the nearest

    With k = u or more the weight is unchanged, with k = 0 or less all of it is (min + max) / 2, and so with
    k = 1, where the original has no level at all and fails.

    The share is one of distinct values, of which a large weight has about as many as elements: even 0.9
    leaves far more than 8 bits; see `effective_bits`. Zeros are values as any others.

    Args:
        weight: any shape, finite, not empty.
        fraction: share of the distinct values that goes; 0 to 1.

    Returns:
        In the shape and type of `weight`.

    Raises:
        QuantizationError: a weight is not finite, there is none, or the fraction is not a number.
    """
    if weight.numel() == 0 or not bool(weight.isfinite().all()):
        raise QuantizationError("quantize_by_fraction: weight must hold numbers, all of them finite")
    distinct = weight.unique().numel()
    count = level_count(distinct, fraction)
    if count >= distinct:
        return weight.clone()
    values = weight.detach().double()
    low, high = torch.aminmax(values)
    levels = linear_levels(low, high, max(count - 1, 1), is_interior=True)
    nearest = nearest_level(values.flatten(), levels)
    return torch.empty_like(weight).copy_(levels[nearest].reshape(weight.shape))
