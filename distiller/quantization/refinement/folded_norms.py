"""What a batch norm told of its channels, kept with the layer that it was folded into.

Behind a batch norm a channel has mean beta and standard deviation |gamma|. They are kept as buffers that are
not saved: they go with the layer when it is copied or moved, and are no part of its state.
Knows nothing about what they are good for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distiller.graph import AdjacencyMap, SummaryGraph
from distiller.model_transforms import fold_batch_norms
from distiller.names import named_modules

_MEAN, _STD = "folded_norm_mean", "folded_norm_std"


def fold_keeping_norms(model: nn.Module, dummy_input: Any = None, graph: SummaryGraph | None = None) -> None:
    """`fold_batch_norms`, after which `norm_statistics` knows the layers' outputs.

    Args:
        model: changed in place.
        dummy_input: input to trace the model with; not needed with `graph`.
        graph: of the model; it is of the past afterwards.

    Raises:
        GraphTraceError, DistillerError: as `fold_batch_norms`.
    """
    adjacency: AdjacencyMap | None = None if graph is None else graph.adjacency_map()
    norms = {name: norm for name, norm in named_modules(model) if isinstance(norm, _BatchNorm)}
    fold_batch_norms(model, dummy_input, adjacency)
    for _, layer in named_modules(model):
        for name in getattr(layer, "fused_modules", ()):
            if name in norms:
                keep_norm_statistics(layer, *_of(norms[name]))


def norm_statistics(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation of the layer's outputs, (channels,) each; None if no norm was folded."""
    mean, std = getattr(layer, _MEAN, None), getattr(layer, _STD, None)
    return None if mean is None or std is None else (mean, std)


def keep_norm_statistics(layer: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Set what `norm_statistics` returns."""
    layer.register_buffer(_MEAN, mean, persistent=False)
    layer.register_buffer(_STD, std, persistent=False)


def _of(norm: Any) -> tuple[Tensor, Tensor]:
    shape = norm.running_mean
    mean = torch.zeros_like(shape) if norm.bias is None else norm.bias.detach().clone()
    std = torch.ones_like(shape) if norm.weight is None else norm.weight.detach().abs()
    return mean, std
