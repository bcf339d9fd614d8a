"""The scale of a weight that loses least: its range clipped where that makes the mean squared error smaller.

Rounding finer is worth clipping a few large values, the more so the fewer the bits.
Knows nothing about layers, data or how weights are rounded afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distiller.errors import UsageError
from distiller.quantization import affine
from distiller.quantization.affine import LinearQuantMode

_CLIPPED = 100


def mse_scale(weight: Tensor, bits: int, mode: LinearQuantMode, per_channel: bool) -> tuple[Tensor, Tensor]:
    """Scale and zero point, from the range [r min, r max], of least mean squared error over some ratios r.

    The ratios are 0.01, 0.02, ... 1. In mode SYMMETRIC, whose largest value lies half a step beyond the
    largest integer, also eight more, up to where it is that integer exactly.

    Args:
        weight: (output channels, ...), finite, floating point; of transposed convolutions as
            `ptq_layers.filters_first` gives it.
        bits: 2 to 16.
        mode: the layout.
        per_channel: a scale for each output channel.

    Returns:
        scale, zero_point: scalars, or (output channels,), as `affine.scale_and_zero_point` gives them; their
        error is never above that of the full range.

    Raises:
        UsageError: bits out of range.
        QuantizationError: the weight is not finite.
    """
    if not affine.MIN_BITS <= bits <= affine.MAX_BITS:
        raise UsageError(f"mse_scale: bits must be {affine.MIN_BITS} to {affine.MAX_BITS}, got {bits!r}")
    rows = weight.detach().flatten(1) if per_channel else weight.detach().reshape(1, -1)
    scale, zero_point = best_scale(
        rows, bits, mode, lambda scale, zero_point: scale_errors(rows, scale, zero_point, bits, mode)
    )
    return (scale, zero_point) if per_channel else (scale.squeeze(0), zero_point.squeeze(0))


def best_scale(
    rows: Tensor, bits: int, mode: LinearQuantMode, error_of: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Of the scales that `mse_scale` tries, for each row the one of least error.

    Args:
        rows: (n, values).
        bits: width.
        mode: the layout.
        error_of: from scales and zero points, (n,) each, to an error of each row, (n,).

    Returns:
        scale, zero_point: (n,); the full range where nothing is better.

    Raises:
        QuantizationError: the rows are not finite.
    """
    lo, hi = rows.amin(1), rows.amax(1)
    scale, zero_point = affine.scale_and_zero_point(lo, hi, bits, mode)
    least = error_of(scale, zero_point)
    for ratio in _ratios(bits, mode):
        other, offset = affine.scale_and_zero_point(lo * ratio, hi * ratio, bits, mode)
        error = error_of(other, offset)
        is_better = error < least
        least = torch.where(is_better, error, least)
        scale, zero_point = torch.where(is_better, other, scale), torch.where(is_better, offset, zero_point)
    return scale, zero_point


def scale_errors(rows: Tensor, scale: Tensor, zero_point: Tensor, bits: int, mode: LinearQuantMode) -> Tensor:
    """Mean squared error of rounding each row to nearest.

    Args:
        rows: (n, values).
        scale: (n,).
        zero_point: (n,).
        bits: width.
        mode: the layout.

    Returns:
        (n,).
    """
    grid = affine.quantized_range(bits, mode)
    return (affine.fake_quantize(rows, scale, zero_point, *grid, axis=0) - rows).square_().mean(1)


def _ratios(bits: int, mode: LinearQuantMode) -> list[float]:
    ratios = [count / _CLIPPED for count in range(_CLIPPED - 1, 0, -1)]
    if mode is LinearQuantMode.SYMMETRIC:
        widest = affine.steps(bits, mode) / affine.quantized_range(bits, mode)[1]
        ratios += [1 + (widest - 1) * count / 8 for count in range(1, 9)]
    return ratios
