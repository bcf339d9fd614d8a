"""Where in a model the activations of a layer are: at the first ReLU behind it in the graph.

Knows nothing about pruning, or what is done with the activations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller.errors import DistillerError
from distiller.graph import Op, SummaryGraph
from distiller.pruning.activation_statistics import ActivationSite

__all__ = ["find_activation"]

_PASSED = ("BatchNormalization", "Add", "MaxPool")
"""What may stand between a layer and its activation; dropout is none of the graph's operations."""


def find_activation(graph: SummaryGraph, modules: Mapping[str, nn.Module], layer_name: str) -> ActivationSite:
    """Where to see the activations of a convolution's or linear layer's outputs.

    They are those of the first ReLU (or ReLU6, or another clamp, as module or as function) behind the layer
    and any batch norms, dropouts, element-wise additions and max-poolings. They are seen, in this order:

    1. at the output of the module that feeds the activation, which is then applied anew: works for
       functions, and for modules in place or in several places. A dropout in between has no part in it.
    2. at the output of the activation's own module;
    3. at the input of a module that reads nothing but the activation.

    A module is looked at only if the model calls it once.

    Args:
        graph: of the model.
        modules: the model's by canonical name.
        layer_name: canonical name of the layer.

    Raises:
        DistillerError: the layer is none of these, or is not called once; no such activation follows it; or
            there is no module to see it at.
    """
    channel_dim = _channel_dim(modules.get(layer_name), layer_name)
    calls = Counter(op.module_name for op in graph.ops.values() if not op.is_functional)
    if calls[layer_name] != 1 or layer_name not in graph.ops:
        raise DistillerError(
            f"the model must call '{layer_name}' once for its activations to be known, "
            f"got {calls[layer_name]} calls; take a pruner that does not look at activations"
        )

    def is_seen(op: Op) -> bool:
        return not op.is_functional and calls[op.module_name] == 1

    feeding, activation = _first_activation(graph, modules, graph.ops[layer_name], channel_dim)
    function = _function(activation, modules)
    if function is not None and is_seen(feeding):
        return ActivationSite(feeding.module_name, False, function, channel_dim)
    if is_seen(activation):
        return ActivationSite(activation.module_name, False, None, channel_dim)
    for name in activation.successors:
        reader = graph.ops[name]
        if is_seen(reader) and reader.predecessors == (activation.name,):
            return ActivationSite(reader.module_name, True, None, channel_dim)
    raise DistillerError(
        f"the activation '{activation.name}' behind '{layer_name}' cannot be seen: neither what feeds it nor "
        "what reads it is a module that is called once, nor is it itself; make it a module of its own, "
        "as nn.ReLU()"
    )


def _channel_dim(layer: nn.Module | None, layer_name: str) -> int:
    dims: dict[type[nn.Module], int] = {nn.Conv1d: -2, nn.Conv2d: -3, nn.Conv3d: -4, nn.Linear: -1}
    for kind, channel_dim in dims.items():
        if isinstance(layer, kind):
            return channel_dim
    raise DistillerError(
        "only filters of convolutions and linear layers have activations to rank by, "
        f"got {type(layer).__name__} '{layer_name}'"
    )


def _first_activation(
    graph: SummaryGraph, modules: Mapping[str, nn.Module], layer: Op, channel_dim: int
) -> tuple[Op, Op]:
    """The activation that is the fewest operations behind a layer, and what feeds it."""
    stopped_at: list[str] = []
    for before, op, is_passed in _behind(graph, layer, channel_dim):
        if _is_activation(op, modules):
            return before, op
        if not is_passed:
            stopped_at.append(f"{op.type} '{op.name}'")
    raise DistillerError(
        f"no ReLU follows '{layer.name}' (over batch norm, dropout, element-wise addition and max-pooling), "
        f"got {', '.join(stopped_at) or 'the output of the model'}; take a pruner that does not look at "
        "activations"
    )


def _behind(graph: SummaryGraph, layer: Op, channel_dim: int) -> Iterator[tuple[Op, Op, bool]]:
    """(what it reads, operation, whether to look behind it) of what follows a layer, the nearest first."""

    def kept(op: Op) -> tuple[int, ...]:
        return (len(op.output_shape), *op.output_shape[channel_dim:][:1])  # dimensions, channels

    known, at_hand = {layer.name}, [layer]
    while at_hand:
        further: list[Op] = []
        for before in at_hand:
            for op in (graph.ops[name] for name in before.successors if name not in known):
                known.add(op.name)
                is_passed = op.type in _PASSED and kept(op) == kept(layer)
                yield before, op, is_passed
                if is_passed:
                    further.append(op)
        at_hand = further


def _is_activation(op: Op, modules: Mapping[str, nn.Module]) -> bool:
    module = None if op.is_functional else modules[op.module_name]
    return op.type == "Relu" or (
        op.type == "Clip" and not (isinstance(module, nn.Hardtanh) and module.min_val != 0)
    )


def _function(activation: Op, modules: Mapping[str, nn.Module]) -> Callable[[Tensor], Tensor] | None:
    """What the activation computes; None where the graph does not say, as of a functional clamp."""
    if activation.type == "Relu":
        return torch.relu
    module = None if activation.is_functional else modules[activation.module_name]
    if isinstance(module, nn.Hardtanh):  # nn.ReLU6 is one
        return partial(F.hardtanh, min_val=module.min_val, max_val=module.max_val)
    return None
