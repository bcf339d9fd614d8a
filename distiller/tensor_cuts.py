"""Cuts: which indices of which dimensions of which tensors stay when a model becomes smaller.

Knows nothing about why, nor about models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Kept = Mapping[int, Sequence[int]]
"""By dimension of one tensor, the indices along it that stay, ascending. Others stay whole."""

TensorCuts = Mapping[str, Kept]
"""By canonical name of a parameter or buffer, what stays of it."""


def cut(tensor: Tensor, kept: Kept) -> Tensor:
    """What stays of a tensor: a new tensor, of the same memory format.

    Args:
        tensor: any shape.
        kept: within the tensor's dimensions and sizes.
    """
    result = tensor.detach()
    for dim, indices in kept.items():
        result = result.index_select(dim, torch.tensor(indices, dtype=torch.long, device=tensor.device))
    for rank, memory_format in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        is_of_rank = tensor.dim() == rank and not tensor.is_contiguous()
        if is_of_rank and tensor.is_contiguous(memory_format=memory_format):
            return result.contiguous(memory_format=memory_format)
    return result


def replace_data(tensor: Tensor, data: Tensor) -> None:
    """Give a parameter or buffer, which stays the same object, data of another shape; its gradient goes.

    PyTorch holds the gradients to the shape that a parameter had in a graph for as long as something of that
    graph is alive, as the loss of the last mini-batch; only a change of type makes it forget.

    Args:
        tensor: a leaf.
        data: of its type.
    """
    tensor.grad = None
    other = torch.float64 if tensor.dtype != torch.float64 else torch.float32
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


def cut_shape(shape: Sequence[int], kept: Kept) -> tuple[int, ...]:
    """The shape of what stays of a tensor of that shape."""
    return tuple(len(kept[dim]) if dim in kept else size for dim, size in enumerate(shape))
