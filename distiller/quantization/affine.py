"""Linear (affine) quantization: ranges, scales, zero points, and the way there and back.

    q = clamp(round(x / scale) + zero_point, qmin, qmax)        x' = (q - zero_point) * scale

Rounding is half to even, and x / scale is computed as x * (1 / scale), as PyTorch's own
kernels do: results agree with theirs bit for bit. Distiller's files hold the inverse scale
and the negative zero point; `to_distiller` and `from_distiller` are the only way across.
Knows nothing about layers, statistics or clipping.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from distiller.errors import QuantizationError

MIN_BITS, MAX_BITS = 2, 16


class LinearQuantMode(enum.Enum):
    """How a range of real numbers is laid onto integers of b bits.

    Attributes:
        SYMMETRIC: [-a, a] onto [-2^(b-1), 2^(b-1) - 1], zero point 0, 2^b - 1 steps of width 2a / (2^b - 1).
        SYMMETRIC_RESTRICTED: [-a, a] onto [-(2^(b-1) - 1), 2^(b-1) - 1], zero point 0.
        ASYMMETRIC_UNSIGNED: [lo, hi] onto [0, 2^b - 1]; the range is widened to contain 0.
        ASYMMETRIC_SIGNED: [lo, hi] onto [-2^(b-1), 2^(b-1) - 1]; the same.
    """

    SYMMETRIC = enum.auto()
    SYMMETRIC_RESTRICTED = enum.auto()
    ASYMMETRIC_UNSIGNED = enum.auto()
    ASYMMETRIC_SIGNED = enum.auto()

    @property
    def is_symmetric(self) -> bool:
        """Whether the zero point is always 0."""
        return self in (LinearQuantMode.SYMMETRIC, LinearQuantMode.SYMMETRIC_RESTRICTED)


def is_linear_quant_mode_symmetric(quant_mode: LinearQuantMode) -> bool:
    """Whether the mode's zero point is always 0."""
    return quant_mode.is_symmetric


def is_linear_quant_mode_asymmetric(quant_mode: LinearQuantMode) -> bool:
    """Whether the mode has a zero point of its own."""
    return not quant_mode.is_symmetric


def get_quantized_range(num_bits: int, signed: bool = True, restrict: bool = False) -> tuple[int, int]:
    """The smallest and the largest integer of `num_bits` bits.

    Args:
        num_bits: at least 1.
        signed: [-2^(b-1), 2^(b-1) - 1] rather than [0, 2^b - 1].
        restrict: leave out -2^(b-1), so that a signed range is symmetric.
    """
    if not signed:
        return 0, 2**num_bits - 1
    largest = 2 ** (num_bits - 1) - 1
    return (-largest if restrict else -largest - 1), largest


def quantized_range(num_bits: int, mode: LinearQuantMode) -> tuple[int, int]:
    """The smallest and the largest integer that a mode uses at `num_bits` bits."""
    return get_quantized_range(
        num_bits,
        signed=mode is not LinearQuantMode.ASYMMETRIC_UNSIGNED,
        restrict=mode is LinearQuantMode.SYMMETRIC_RESTRICTED,
    )


def steps(num_bits: int, mode: LinearQuantMode) -> float:
    """How many steps of one scale a range spans: [0, a] in the symmetric modes, [lo, hi] in the others."""
    if mode is LinearQuantMode.SYMMETRIC:
        return (2**num_bits - 1) / 2
    if mode is LinearQuantMode.SYMMETRIC_RESTRICTED:
        return float(2 ** (num_bits - 1) - 1)
    return float(2**num_bits - 1)


def scale_and_zero_point(
    lo: Tensor, hi: Tensor, num_bits: int, mode: LinearQuantMode
) -> tuple[Tensor, Tensor]:
    """Scale and zero point that lay [lo, hi] onto the integers of a mode.

    Symmetric: scale = max(|lo|, |hi|) / steps, zero point 0. Asymmetric: scale = (hi - lo) / steps,
    zero_point = qmin - round(lo / scale), after lo = min(lo, 0), hi = max(hi, 0): zero is exact.
    An empty range (or one too narrow for floating point) gets scale 1.

    Args:
        lo: lower ends, floating point, scalar for per-tensor or (channels,).
        hi: upper ends, same shape, not below `lo`.
        num_bits: 1 to 16.
        mode: the layout.

    Returns:
        Scale in the dtype of `lo`, zero point as int32; both in the shape of `lo`.

    Raises:
        QuantizationError: a range is upside down or not finite.
    """
    if not bool(torch.all(torch.isfinite(lo) & torch.isfinite(hi) & (lo <= hi))):
        raise QuantizationError(f"quantization range: must be finite with min <= max, got {_show(lo, hi)}")
    if mode.is_symmetric:
        scale = _divided(torch.maximum(lo.abs(), hi.abs()), steps(num_bits, mode))
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    scale = _divided(hi - lo, steps(num_bits, mode))
    qmin, qmax = quantized_range(num_bits, mode)
    zero_point = qmin - torch.round(lo / scale)
    return scale, zero_point.clamp(qmin, qmax).to(torch.int32)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None = None,
) -> Tensor:
    """clamp(round(x / scale) + zero_point, qmin, qmax) as int32.

    Args:
        x: real values, any shape.
        scale: scalar, or (x.shape[axis],) with `axis`.
        zero_point: in the shape of `scale`.
        qmin: smallest integer.
        qmax: largest integer.
        axis: the dimension that each has its own scale; None for one scale in all.
    """
    scale, zero_point = _along(scale, x, axis), _along(zero_point, x, axis)
    return (torch.round(x * (1 / scale)) + zero_point).clamp_(qmin, qmax).to(torch.int32)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None) -> Tensor:
    """(q - zero_point) * scale; arguments as in `quantize`."""
    return (q - _along(zero_point, q, axis)) * _along(scale, q, axis)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    axis: int | None = None,
) -> Tensor:
    """`dequantize` of `quantize`: the real values on the grid that are nearest to x.

    A few elementwise passes over a new tensor. (PyTorch's fused fake-quantize operator is not
    vectorized on CPUs: some eighty times slower.) NaN stays NaN. Arguments as in `quantize`.
    """
    scale, zero_point = _along(scale, x, axis), _along(zero_point, x, axis)
    q = x.mul(1 / scale).round_().add_(zero_point).clamp_(qmin, qmax)
    return q.sub_(zero_point).mul_(scale)


def approximate_scale(scale: Tensor, multiplier_bits: int) -> Tensor:
    """The factor nearest from below that integer hardware can apply: a multiplication and a shift.

    scale ~ A / 2^n with n = floor(log2((2^m - 1) / scale)), A = floor(scale * 2^n), an integer of m bits.

    Args:
        scale: positive, any shape.
        multiplier_bits: m, at least 1.
    """
    shift = torch.floor(torch.log2((2**multiplier_bits - 1) / scale))
    return torch.floor(scale * 2**shift) / 2**shift


def to_distiller(scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """(1 / scale, -zero_point) in floating point: Distiller's q = round(scale * x - zero_point)."""
    return 1 / scale, (-zero_point).to(scale.dtype)


def from_distiller(scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `to_distiller`; the zero point as int32."""
    return 1 / scale, -zero_point.to(torch.int32)


def check_bits(bits: int | None, what: str) -> int | None:
    """`bits` if it is a width that can be quantized to; None for None and 0, which mean "not quantized".

    Raises:
        QuantizationError: neither of these.
    """
    is_number = isinstance(bits, int) and not isinstance(bits, bool)
    if bits is None or (is_number and bits == 0):
        return None
    if not is_number or not MIN_BITS <= bits <= MAX_BITS:
        raise QuantizationError(
            f"{what}: must be {MIN_BITS} to {MAX_BITS} bits, or 0 or null for none, got {bits!r}"
        )
    return bits


def _divided(width: Tensor, number_of_steps: float) -> Tensor:
    scale = width / number_of_steps
    return torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)


def _along(values: Tensor, x: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return values
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


def _show(lo: Tensor, hi: Tensor) -> str:
    wrong = ~(torch.isfinite(lo) & torch.isfinite(hi) & (lo <= hi))
    return f"[{lo[wrong].flatten()[0].item():g}, {hi[wrong].flatten()[0].item():g}]"
