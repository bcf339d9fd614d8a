"""Batches for a model's forward, made of the samples of an example, and the mode to run it in.

Knows nothing about what the model computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distiller.errors import UsageError


def forward_arguments(model: nn.Module, dummy_input: Any) -> tuple[Any, ...]:
    """The model's positional arguments, where its weights are."""
    arguments = tuple(dummy_input) if isinstance(dummy_input, (tuple, list)) else (dummy_input,)
    state = next(model.parameters(), None)
    if state is None:
        return arguments
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(state.device), arguments)


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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without the model's own `train`, no gradients, no fused attention."""
    modes = {module: module.training for module in model.modules()}
    is_fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for module in modes:
            module.training = False
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fast)
        for module, is_training in modes.items():
            module.training = is_training
