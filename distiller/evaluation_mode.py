"""A model in evaluation mode for a while, every module's own mode back in the end.

Knows nothing about what the model is run for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distiller.errors import UsageError


@contextmanager
def evaluating(
    model: nn.Module, *, training: Collection[nn.Module] = (), is_decomposed: bool = False
) -> Iterator[None]:
    """Evaluation mode without the model's own `train`, which may do more than to set modes; no gradients.

    Args:
        model: its modules may have modes of their own; some may be frozen.
        training: modules that are in training mode meanwhile.
        is_decomposed: run attention as the operations that it consists of, without torch's fused kernel.
    """
    modes = {module: module.training for module in model.modules()}
    is_fused = torch.backends.mha.get_fastpath_enabled()
    try:
        for module in modes:
            module.training = module in training
        torch.backends.mha.set_fastpath_enabled(is_fused and not is_decomposed)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fused)
        for module, is_training in modes.items():
            module.training = is_training


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers, such as the statistics of batch norms, are afterwards what they were before."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def answer(model: nn.Module, images: Tensor) -> Tensor:
    """What a model answers that has seen nothing before: its buffers, and the images, stay as they are.

    Raises:
        UsageError: that is no tensor.
    """
    with buffers_kept(model):
        logits = model(images.clone())
    if not isinstance(logits, Tensor):
        raise UsageError(
            f"{type(model).__name__} must answer with logits, a tensor (batch, classes), in evaluation mode, "
            f"got {type(logits).__name__}; wrap it in a module that returns these alone"
        )
    return logits
