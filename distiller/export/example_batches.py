"""Batches for a model's forward, made of the samples of an example.

Knows nothing about what the model computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from distiller.errors import UsageError


def batch_of(arguments: tuple[Any, ...], size: int, dim: int) -> tuple[Any, ...]:
    """As many samples as wanted of each tensor, in turn; shifted where they are taken again."""

    def of(tensor: Tensor) -> Tensor:
        if tensor.dim() <= dim:
            return tensor
        count = tensor.shape[dim]
        if count == 0:
            raise UsageError(f"ONNX: the input must have a sample, got shape {tuple(tensor.shape)}")
        samples = [tensor.select(dim, i % count) for i in range(size)]
        step = samples[0].numel() // 3 + 1
        return torch.stack([sample.roll(step * (i // count)) for i, sample in enumerate(samples)], dim)

    return pytree.tree_map_only(Tensor, of, arguments)
