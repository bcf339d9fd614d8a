"""How much of a tensor is zero: its elements and the structures it is made of.

A structure (row, column, filter, channel, kernel, block) is zero when all its elements are.
Sparsity is the fraction of zero structures, density the fraction of the others; both 0..1.
A tensor that has no structure of the kind asked for has sparsity 0.
Shapes: linear weights (out, in); convolution weights (filters, channels, *kernel).
Knows nothing about models or masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from distiller.errors import UsageError

__all__ = [
    "count_nonzeros",
    "density",
    "density_2D",
    "density_3D",
    "density_ch",
    "density_cols",
    "density_rows",
    "non_zero_channels",
    "sparsity",
    "sparsity_2D",
    "sparsity_3D",
    "sparsity_blocks",
    "sparsity_ch",
    "sparsity_cols",
    "sparsity_rows",
    "to_np",
    "volume",
]


def sparsity(tensor: Tensor) -> float:
    """The fraction of elements that are zero."""
    return 1 - density(tensor)


def density(tensor: Tensor) -> float:
    """The fraction of elements that are not zero."""
    if tensor.numel() == 0:
        return 1.0
    return int(torch.count_nonzero(tensor)) / tensor.numel()


def sparsity_3D(tensor: Tensor) -> float:
    """The fraction of zero filters (dimension 0) of a convolution's weights."""
    return _zero_fraction(tensor.flatten(1)) if tensor.dim() >= 3 else 0.0


def density_3D(tensor: Tensor) -> float:
    """1 - `sparsity_3D`."""
    return 1 - sparsity_3D(tensor)


def sparsity_ch(tensor: Tensor) -> float:
    """The fraction of zero input channels (dimension 1) of a convolution's weights."""
    return _zero_fraction(tensor.transpose(0, 1).flatten(1)) if tensor.dim() >= 3 else 0.0


def density_ch(tensor: Tensor) -> float:
    """1 - `sparsity_ch`."""
    return 1 - sparsity_ch(tensor)


def sparsity_2D(tensor: Tensor) -> float:
    """The fraction of zero kernels of a convolution's weights, or of zero rows as stored of a matrix."""
    if tensor.dim() == 2:
        return _zero_fraction(tensor)
    return _zero_fraction(tensor.flatten(0, 1).flatten(1)) if tensor.dim() >= 3 else 0.0


def density_2D(tensor: Tensor) -> float:
    """1 - `sparsity_2D`."""
    return 1 - sparsity_2D(tensor)


def sparsity_cols(tensor: Tensor, transposed: bool = True) -> float:
    """The fraction of zero columns of a matrix.

    Args:
        tensor: a matrix; anything else has sparsity 0.
        transposed: whether the matrix is stored transposed, as linear weights (out, in) are:
            then a column is an output, `tensor[i, :]`. Default True.
    """
    if tensor.dim() != 2:
        return 0.0
    return _zero_fraction(tensor if transposed else tensor.t())


def density_cols(tensor: Tensor, transposed: bool = True) -> float:
    """1 - `sparsity_cols`."""
    return 1 - sparsity_cols(tensor, transposed)


def sparsity_rows(tensor: Tensor, transposed: bool = True) -> float:
    """The fraction of zero rows of a matrix.

    Args:
        tensor: a matrix; anything else has sparsity 0.
        transposed: whether the matrix is stored transposed, as linear weights (out, in) are:
            then a row is an input, `tensor[:, i]`. Default True.
    """
    return sparsity_cols(tensor, not transposed)


def density_rows(tensor: Tensor, transposed: bool = True) -> float:
    """1 - `sparsity_rows`."""
    return 1 - sparsity_rows(tensor, transposed)


def sparsity_blocks(tensor: Tensor, block_shape: Sequence[int]) -> float:
    """The fraction of zero blocks of a convolution's weights.

    The kernels, in the order stored, are cut into groups of `repetitions * depth`; a block is
    one position of the kernel in all kernels of a group.

    Args:
        tensor: (filters, channels, height, width).
        block_shape: (repetitions, depth, 1, 1); repetitions * depth divides filters * channels.

    Raises:
        UsageError: the tensor is not of 4 dimensions, or cannot be cut so.
    """
    shape = tuple(tensor.shape)
    if tensor.dim() != 4:
        raise UsageError(f"sparsity_blocks: needs a tensor of 4 dimensions, got shape {shape}")
    if len(block_shape) != 4 or tuple(block_shape[2:]) != (1, 1) or min(block_shape) < 1:
        raise UsageError(
            f"sparsity_blocks: block_shape must be [repetitions, depth, 1, 1], got {list(block_shape)}"
        )
    kernels_per_block = block_shape[0] * block_shape[1]
    if (shape[0] * shape[1]) % kernels_per_block:
        raise UsageError(
            f"sparsity_blocks: blocks of {kernels_per_block} kernels do not divide "
            f"the {shape[0] * shape[1]} kernels of shape {shape}"
        )
    groups = tensor.reshape(-1, kernels_per_block, shape[2] * shape[3])  # (groups, kernels, positions)
    return _zero_fraction(groups.transpose(1, 2).flatten(0, 1))


def non_zero_channels(tensor: Tensor) -> Tensor:
    """The indices, ascending, of the input channels (dimension 1) that are not zero; 1-d, int64.

    Raises:
        UsageError: the tensor is not a convolution's weights.
    """
    if tensor.dim() < 3:
        raise UsageError(
            f"non_zero_channels: needs the weights of a convolution, got shape {tuple(tensor.shape)}"
        )
    return torch.nonzero(tensor.transpose(0, 1).flatten(1).ne(0).any(dim=1)).flatten()


def count_nonzeros(tensors: Iterable[Tensor]) -> list[int]:
    """The number of non-zero elements of each tensor, fetched from the device at once.

    Args:
        tensors: all on one device.
    """
    counts = [torch.count_nonzero(tensor) for tensor in tensors]
    return torch.stack(counts).tolist() if counts else []


def volume(tensor: Tensor | Sequence[int]) -> int:
    """The number of elements of a tensor, or of a shape."""
    return math.prod(tensor.shape if isinstance(tensor, Tensor) else tensor)


def to_np(tensor: Tensor) -> np.ndarray:
    """The values of a tensor as an array in main memory."""
    return tensor.detach().cpu().numpy()


def _zero_fraction(
    structures: Tensor,  # (structures, elements)
) -> float:
    if structures.shape[0] == 0:
        return 0.0
    return 1 - int(structures.ne(0).any(dim=1).sum()) / structures.shape[0]
