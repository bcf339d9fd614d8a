"""Which batch norm follows which layer, read off the model's graph.

Knows nothing about quantization.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import FrozenBatchNorm2d

from distiller.graph import SummaryGraph
from distiller.model_transforms import fuse_modules
from distiller.names import named_modules, unwrap

__all__ = ["NORMS", "batch_norms_behind"]

_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
NORMS = (_BatchNorm, FrozenBatchNorm2d)
"""The kinds of batch norms."""


def batch_norms_behind(model: nn.Module, dummy_input: Any) -> dict[str, nn.Module]:
    """The batch norm over the output channels of each convolution and linear layer that has no other reader.

    Args:
        model: traced as in evaluation, and left as it is. What calls its modules does not matter.
        dummy_input: an input of it, or a tuple of them.

    Returns:
        By the layer's canonical name.

    Raises:
        GraphTraceError: the model cannot be traced.
    """
    adjacency = SummaryGraph(model, dummy_input, purpose="simulated batch-norm folding").adjacency_map()
    names = {module: name for name, module in named_modules(unwrap(model))}
    found: dict[str, nn.Module] = {}

    def note(pair: list[Any]) -> None:
        layer, norm = pair
        shape = adjacency[names[layer]].output_shape
        # After a linear layer on (N, L, C) a norm runs over L, not over the output channels.
        if shape is None or len(shape) == layer.weight.dim():
            found[names[layer]] = norm

    fuse_modules(model, (_LAYERS, NORMS), note, adjacency_map=adjacency)
    return found
