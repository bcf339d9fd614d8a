"""Distiller's quantization functions under Distiller's names, for code that calls them.

Here alone the scale multiplies: q = round(scale * x - zero_point), x' = (q + zero_point) / scale.
Everything else in this package uses PyTorch's convention (`affine.py`).
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

from distiller.quantization import affine
from distiller.quantization.affine import LinearQuantMode

Number: TypeAlias = float | Tensor


def symmetric_linear_quantization_params(
    num_bits: int, saturation_val: Number, restrict_qrange: bool = False
) -> tuple[Any, Any]:
    """Scale n / saturation_val and zero point 0, n = (2^b - 1) / 2, or 2^(b-1) - 1 when restricted.

    Args:
        num_bits: width.
        saturation_val: largest absolute value, >= 0; 0 gives scale 1. A number or a tensor.
        restrict_qrange: use the symmetric range of integers.

    Returns:
        (scale, zero_point): Python numbers for a number, tensors (at least 1-d) for a tensor.

    Raises:
        ValueError: `saturation_val` is negative.
    """
    value, is_number = _tensor(saturation_val)
    if bool((value < 0).any()):
        raise ValueError(f"saturation_val: must be >= 0, got {saturation_val}")
    mode = LinearQuantMode.SYMMETRIC_RESTRICTED if restrict_qrange else LinearQuantMode.SYMMETRIC
    count = affine.steps(num_bits, mode)
    scale = count / torch.where(value == 0, torch.full_like(value, count), value)
    return _as_given(scale, torch.zeros_like(scale), is_number)


def asymmetric_linear_quantization_params(
    num_bits: int,
    saturation_min: Number,
    saturation_max: Number,
    integral_zero_point: bool = True,
    signed: bool = False,
) -> tuple[Any, Any]:
    """Scale (2^b - 1) / (max - min) and zero point scale * min (+ 2^(b-1) when signed).

    The range is widened to contain 0; an empty range gives scale 1.

    Args:
        num_bits: width.
        saturation_min: lower end, a number or a tensor.
        saturation_max: upper end, alike.
        integral_zero_point: round the zero point, so that 0 is exact.
        signed: integers from -2^(b-1) rather than from 0.

    Returns:
        (scale, zero_point): Python numbers for numbers, tensors (at least 1-d) for tensors.

    Raises:
        ValueError: min > max.
    """
    (lo, min_is_number), (hi, max_is_number) = _tensor(saturation_min), _tensor(saturation_max)
    if bool((lo > hi).any()):
        raise ValueError(
            f"saturation_min: must not be above saturation_max, got {saturation_min}, {saturation_max}"
        )
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    mode = LinearQuantMode.ASYMMETRIC_SIGNED if signed else LinearQuantMode.ASYMMETRIC_UNSIGNED
    count, width = affine.steps(num_bits, mode), hi - lo
    scale = count / torch.where(width == 0, torch.full_like(width, count), width)
    zero_point = scale * lo
    if integral_zero_point:
        zero_point = zero_point.round()
    zero_point = zero_point - affine.quantized_range(num_bits, mode)[0]
    return _as_given(scale, zero_point, min_is_number and max_is_number)


def linear_quantize(input: Tensor, scale: Number, zero_point: Number, inplace: bool = False) -> Tensor:
    """round(scale * input - zero_point), floating point, not clamped."""
    if inplace:
        return input.mul_(scale).sub_(zero_point).round_()
    return torch.round(scale * input - zero_point)


def linear_quantize_clamp(
    input: Tensor,
    scale: Number,
    zero_point: Number,
    clamp_min: float,
    clamp_max: float,
    inplace: bool = False,
) -> Tensor:
    """`linear_quantize`, clamped to [clamp_min, clamp_max]."""
    return linear_quantize(input, scale, zero_point, inplace).clamp_(clamp_min, clamp_max)


def linear_dequantize(input: Tensor, scale: Number, zero_point: Number, inplace: bool = False) -> Tensor:
    """(input + zero_point) / scale."""
    if inplace:
        return input.add_(zero_point).div_(scale)
    return (input + zero_point) / scale


def get_tensor_min_max(t: Tensor, per_dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value: of all, or of each index of the dimensions up to `per_dim`.

    Raises:
        ValueError: the tensor has no such dimension.
    """
    rows = _rows(t, per_dim)
    return rows.amin(dim=-1), rows.amax(dim=-1)


def get_tensor_avg_min_max(t: Tensor, across_dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean over dimension `across_dim` of the smallest and the largest values; of all when None."""
    lo, hi = get_tensor_min_max(t, per_dim=across_dim)
    return lo.mean(), hi.mean()


def get_tensor_max_abs(t: Tensor, per_dim: int | None = None) -> Tensor:
    """Largest absolute value; `per_dim` as in `get_tensor_min_max`."""
    return _rows(t, per_dim).abs().amax(dim=-1)


def get_tensor_avg_max_abs(t: Tensor, across_dim: int | None = None) -> Tensor:
    """Mean over dimension `across_dim` of the largest absolute values."""
    return get_tensor_max_abs(t, per_dim=across_dim).mean()


def get_tensor_mean_n_stds_min_max(
    t: Tensor, dim: int | None = None, n_stds: float = 1
) -> tuple[Tensor, Tensor]:
    """mean -+ n_stds * std, never beyond the true extremes.

    Args:
        t: any shape.
        dim: as `per_dim` of `get_tensor_min_max`; with a dimension the results are averaged over it.
        n_stds: how many standard deviations, > 0.

    Raises:
        ValueError: `n_stds` is not positive.
    """
    if n_stds <= 0:
        raise ValueError(f"n_stds: must be > 0, got {n_stds}")
    rows = _rows(t, dim)
    mean, reach = rows.mean(dim=-1), n_stds * rows.std(dim=-1)
    lo, hi = torch.maximum(rows.amin(dim=-1), mean - reach), torch.minimum(rows.amax(dim=-1), mean + reach)
    return lo.mean(), hi.mean()


def approx_scale_as_mult_and_shift(fp32_scale: Number, mult_bits: int) -> Any:
    """floor(scale * 2^n) / 2^n with n = floor(log2((2^mult_bits - 1) / scale))."""
    if isinstance(fp32_scale, Tensor):
        return affine.approximate_scale(fp32_scale, mult_bits)
    shift = math.floor(math.log2((2**mult_bits - 1) / fp32_scale))
    return math.floor(fp32_scale * 2.0**shift) / 2.0**shift


def _rows(t: Tensor, per_dim: int | None) -> Tensor:
    if per_dim is None:
        return t.reshape(-1)
    if per_dim > t.dim() - 1:
        raise ValueError(f"per_dim: the tensor has {t.dim()} dimensions, got {per_dim}")
    return t.reshape(*t.shape[: per_dim + 1], -1)


def _tensor(value: Number) -> tuple[Tensor, bool]:
    if isinstance(value, Tensor):
        return torch.atleast_1d(value), False
    return torch.tensor(value, dtype=torch.float64), True


def _as_given(scale: Tensor, zero_point: Tensor, as_numbers: bool) -> tuple[Any, Any]:
    return (scale.item(), zero_point.item()) if as_numbers else (scale, zero_point)
