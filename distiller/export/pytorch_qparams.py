"""Scales, zero points and integers of Distiller's convention as those of PyTorch's quantized tensors.

Distiller: q = round(scale * x - zero_point). PyTorch: q = round(x / scale) + zero_point, int8 or uint8.
Knows nothing about layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distiller.errors import QuantizationError
from distiller.quantization import affine
from distiller.quantization.affine import LinearQuantMode

_DTYPES = (torch.qint8, torch.quint8)
_MAX_BITS = 8


def distiller_qparams_to_pytorch(
    scale: Tensor,
    zp: Tensor,
    num_bits: int,
    distiller_mode: LinearQuantMode,
    dest_dtype: torch.dtype,
    reduce_range: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the same grid in one of PyTorch's quantized types.

    scale' = 1 / scale, zero_point' = -zp, moved by 2^(b - 1) where the mode's integers have a sign and the
    type's have none, or the other way round. With `reduce_range` the same real range is laid onto one bit
    less (levels of 2^8 - 1 become 2^7 - 1): scale' / r, round(zero_point' * r), r = 127/255 or 63/127.

    Args:
        scale: in Distiller's convention, > 0, scalar or (channels,).
        zp: in Distiller's convention, in the shape of `scale`.
        num_bits: 2 to 8.
        distiller_mode: the mode that both are of.
        dest_dtype: `torch.qint8` or `torch.quint8`.
        reduce_range: for kernels whose sums of two products saturate at 16 bits (x86 without VNNI); only
            with 8 bits.

    Returns:
        Scale in float32 and zero point in int32.

    Raises:
        QuantizationError: another type or width.
    """
    where = "distiller_qparams_to_pytorch"
    if dest_dtype not in _DTYPES:
        raise QuantizationError(f"{where}: dest_dtype must be torch.qint8 or torch.quint8, got {dest_dtype}")
    _check_bits(num_bits, where)
    if reduce_range and num_bits != _MAX_BITS:
        raise QuantizationError(f"{where}: reduce_range is for 8 bits, got {num_bits}")
    torch_scale, torch_zp = affine.from_distiller(scale.float(), zp)
    is_signed = distiller_mode is not LinearQuantMode.ASYMMETRIC_UNSIGNED
    if is_signed != (dest_dtype is torch.qint8):
        torch_zp = torch_zp + (2 ** (num_bits - 1) if is_signed else -(2 ** (num_bits - 1)))
    if not reduce_range:
        return torch_scale, torch_zp
    ratio = 127 / 255 if dest_dtype is torch.quint8 else 63 / 127
    return torch_scale / ratio, torch.round(torch_zp * ratio).to(torch.int32)


def distiller_quantized_tensor_to_pytorch(
    tensor: Tensor,
    scale: Tensor,
    zp: Tensor,
    num_bits: int,
    distiller_mode: LinearQuantMode,
    dest_dtype: torch.dtype,
    per_channel: bool = False,
    channel_dim: int = 0,
) -> Tensor:
    """A tensor of Distiller's integers as a quantized tensor of PyTorch with the same real values.

    Args:
        tensor: integers, in any type.
        scale: in Distiller's convention; scalar, or (channels,) with `per_channel` (also of a shape that
            broadcasts).
        zp: in Distiller's convention, as `scale`.
        num_bits: 2 to 8.
        distiller_mode: the mode that they are of.
        dest_dtype: `torch.qint8` or `torch.quint8`.
        per_channel: each index of `channel_dim` has its own scale.
        channel_dim: the dimension of the channels.

    Raises:
        QuantizationError: the tensor holds something else than integers of `num_bits` bits.
    """
    where = "distiller_quantized_tensor_to_pytorch"
    _check_bits(num_bits, where)
    qmin, qmax = affine.quantized_range(num_bits, distiller_mode)
    lo, hi = (float(end) for end in tensor.aminmax())
    if not torch.equal(tensor, tensor.round()) or lo < qmin or hi > qmax:
        raise QuantizationError(
            f"{where}: the tensor must hold integers from {qmin} to {qmax}, got values from {lo:g} to "
            f"{hi:g}; quantize it first"
        )
    scale, zp = scale.flatten(), zp.flatten()
    torch_scale, torch_zp = distiller_qparams_to_pytorch(scale, zp, num_bits, distiller_mode, dest_dtype)
    moved = torch_zp[:1] - affine.from_distiller(scale[:1], zp[:1])[1]  # the same for all channels
    integers = (tensor.to(torch.int32) + moved).to(torch.int8 if dest_dtype is torch.qint8 else torch.uint8)
    if per_channel:
        return torch._make_per_channel_quantized_tensor(
            integers, torch_scale.double(), torch_zp.long(), channel_dim
        )
    return torch._make_per_tensor_quantized_tensor(integers, float(torch_scale), int(torch_zp))


def _check_bits(num_bits: int, where: str) -> None:
    if not 2 <= num_bits <= _MAX_BITS:
        raise QuantizationError(f"{where}: num_bits must be 2 to {_MAX_BITS}, got {num_bits}")
