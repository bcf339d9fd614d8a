"""How many bytes a network's tensors take: as they are, stored sparse, stored at their quantized width.

Only `serialized_bytes` is the size of something written; the others are computed from
the formats stated here. They count what the tensors' data need and nothing for names
and shapes. Tensors that share memory (tied weights) are counted once.
Knows nothing about models.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from distiller.errors import QuantizationError, UnknownNameError, did_you_mean

_SCALE_BYTES = 4  # float32
_ROW_POINTER_BYTES = 4


def dense_bytes(state: Mapping[str, Tensor]) -> int:
    """Elements times bytes per element, over all tensors.

    Args:
        state: tensors by name, as from `state_dict()`.
    """
    return sum(dense_tensor_bytes(tensor) for tensor in _distinct(state).values())


def sparse_bytes(state: Mapping[str, Tensor]) -> int:
    """Each tensor in the smallest of three formats: dense, bitmap, compressed sparse rows.

    Args:
        state: tensors by name, as from `state_dict()`.
    """
    return sum(
        min(dense_tensor_bytes(tensor), bitmap_tensor_bytes(tensor), csr_tensor_bytes(tensor))
        for tensor in _distinct(state).values()
    )


def quantized_bytes(
    state: Mapping[str, Tensor], bits_by_param: Mapping[str, int], per_channel: Collection[str] = ()
) -> int:
    """The named tensors packed at their width, all others dense.

    A tensor of n elements at b bits takes ceil(n * b / 8) bytes, and for each of its
    scales 4 bytes (float32) and ceil(b / 8) bytes of zero point.

    Args:
        state: tensors by name, as from `state_dict()`.
        bits_by_param: width of each quantized tensor, from 1 to that of its elements.
        per_channel: those that have a scale for each index of dimension 0, not one in all.

    Raises:
        UnknownNameError: a name is not in `state`.
        QuantizationError: a width is out of range.
    """
    for name in (*bits_by_param, *per_channel):
        if name not in state:
            raise UnknownNameError(f"quantized size: no tensor '{name}'{did_you_mean(name, state)}", name)
    quantized_first = {name: state[name] for name in bits_by_param} | dict(state)
    total = 0
    for name, tensor in _distinct(quantized_first).items():
        bits = bits_by_param.get(name)
        if bits is None:
            total += dense_tensor_bytes(tensor)
            continue
        if not 1 <= bits <= 8 * tensor.element_size():
            raise QuantizationError(
                f"quantized size: bits of '{name}' must be 1 to {8 * tensor.element_size()}, got {bits}"
            )
        scales = tensor.shape[0] if name in per_channel and tensor.dim() else 1
        total += _ceil_div(tensor.numel() * bits, 8) + scales * (_SCALE_BYTES + _ceil_div(bits, 8))
    return total


def serialized_bytes(state: Mapping[str, Tensor]) -> int:
    """Size of the file that `torch.save` makes of the tensors: what a checkpoint spends on its weights.

    Args:
        state: tensors by name, as from `state_dict()`.
    """
    file = io.BytesIO()
    torch.save(dict(state), file)
    return file.getbuffer().nbytes


def dense_tensor_bytes(tensor: Tensor) -> int:
    """Elements times bytes per element."""
    return tensor.numel() * tensor.element_size()


def bitmap_tensor_bytes(tensor: Tensor) -> int:
    """One bit per element (zero or not), then the non-zero values: ceil(n / 8) + nnz * bytes per element."""
    return _ceil_div(tensor.numel(), 8) + _non_zero_bytes(tensor)


def csr_tensor_bytes(tensor: Tensor) -> int:
    """Compressed sparse rows of the tensor as a matrix (dimension 0, all others).

    (rows + 1) * 4 bytes of row pointers, then for each non-zero its value and the index
    of its column: 2 bytes up to 65,536 columns, 4 beyond. A vector is one row.
    """
    rows = tensor.shape[0] if tensor.dim() > 1 else 1
    columns = tensor.numel() // max(1, rows)
    index_bytes = 2 if columns <= 2**16 else 4
    nnz = int(torch.count_nonzero(tensor))
    return (rows + 1) * _ROW_POINTER_BYTES + nnz * index_bytes + _non_zero_bytes(tensor)


def _non_zero_bytes(tensor: Tensor) -> int:
    return int(torch.count_nonzero(tensor)) * tensor.element_size()


def _distinct(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those that are another one's memory, under their first names."""
    found: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        found.setdefault(place if tensor.numel() else (name,), name)
    return {name: state[name] for name in found.values()}


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)
