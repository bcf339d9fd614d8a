"""Sequences of modules become one: batch norms folded into the layers before them.

Knows nothing about quantization or pruning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distiller.errors import DistillerError, UsageError
from distiller.graph import AdjacencyMap, AdjacentsEntry, SummaryGraph
from distiller.names import named_modules, unwrap

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)

FuseFn = Callable[[list[Any]], nn.Module | None]


def fuse_modules(
    model: nn.Module,
    types_sequence: Sequence[type[nn.Module] | Sequence[type[nn.Module]]],
    fuse_fn: FuseFn,
    dummy_input: Any = None,
    adjacency_map: AdjacencyMap | None = None,
) -> nn.Module:
    """Replace every sequence of modules of the given types by what `fuse_fn` makes of it.

    A sequence is a chain in the graph: each module but the last has one reader, the next in
    the chain, and is not an output of the model; each but the first reads one operation. No
    module of it is called more than once. The first module is replaced by the fused one,
    whose attribute `fused_modules` lists the names of the others; the others become nn.Identity.

    Args:
        model: changed in place.
        types_sequence: at least two items, each a type or several types of module.
        fuse_fn: called with the modules of a sequence; returns the module that takes their
            place (may be the first of them), or None to leave them alone.
        dummy_input: input to trace the model with; not needed when `adjacency_map` is given.
        adjacency_map: `SummaryGraph(...).adjacency_map()` of the model.

    Returns:
        `model`.

    Raises:
        UsageError: neither `dummy_input` nor `adjacency_map`, or fewer than two types.
        GraphTraceError: the model cannot be traced.
    """
    if len(types_sequence) < 2:
        raise UsageError(f"types_sequence: at least two module types wanted, got {len(types_sequence)}")
    adjacency_map = _adjacency_map(model, dummy_input, adjacency_map, "fusing modules")
    modules = dict(named_modules(model))
    types = [item if isinstance(item, type) else tuple(item) for item in types_sequence]
    for names in list(_chains(modules, types, adjacency_map)):
        fused = fuse_fn([modules[name] for name in names])
        if fused is None:
            continue
        fused.fused_modules = list(names[1:])  # type: ignore[assignment]
        _replace(model, modules[names[0]], fused)
        for name in names[1:]:
            _replace(model, modules[name], nn.Identity().train(modules[name].training))
    return model


def fold_batch_norms(
    model: nn.Module, dummy_input: Any = None, adjacency_map: AdjacencyMap | None = None
) -> nn.Module:
    """Fold batch norms into the convolutions and linear layers before them, for inference.

        weight' = weight * gamma / sqrt(running_var + eps)
        bias' = (bias - running_mean) * gamma / sqrt(running_var + eps) + beta

    Folded are convolutions in 1, 2 or 3 dimensions, transposed and grouped ones included, and
    linear layers whose only reader is a batch norm over their output channels. In evaluation
    mode the model computes the same as before. Folded layers get new parameters (those they
    had stay as they were, for others that hold them) and list their batch norm in
    `fused_modules`; the batch norms become nn.Identity.

    Args:
        model: changed in place.
        dummy_input: input to trace the model with; not needed when `adjacency_map` is given.
        adjacency_map: `SummaryGraph(...).adjacency_map()` of the model; it is of the past afterwards.

    Returns:
        `model`.

    Raises:
        UsageError: neither `dummy_input` nor `adjacency_map`.
        GraphTraceError: the model cannot be traced.
        DistillerError: a batch norm without running statistics, or a layer with a parametrized
            weight, which cannot be folded; the model is unchanged.
    """
    adjacency_map = _adjacency_map(model, dummy_input, adjacency_map, "folding batch norms")
    modules = dict(named_modules(model))
    ranks = {
        _called(entry): len(entry.output_shape)
        for entry in adjacency_map.values()
        if entry.output_shape is not None
    }
    types = (_FOLDABLE, _BatchNorm)
    foldable = {
        (modules[layer], modules[norm])
        for layer, norm in _chains(modules, types, adjacency_map)
        if _is_over_output_channels(modules[layer], modules[norm], ranks.get(layer))
        and _check_foldable(modules[layer], layer, modules[norm], norm)
    }

    def fold(pair: list[Any]) -> nn.Module | None:
        return _folded(*pair) if tuple(pair) in foldable else None

    return fuse_modules(model, types, fold, adjacency_map=adjacency_map)


def folded_parameters(
    weight: Tensor, bias: Tensor | None, norm: _BatchNorm, channel_dim: int = 0, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that does what it and the batch norm after it did.

    Args:
        weight: (out, in / groups, ...), or (in, out / groups, ...) when `channel_dim` is 1.
        bias: (out,) or None.
        norm: the batch norm, with running statistics over `out` channels.
        channel_dim: dimension of `weight` that holds the output channels (of a group).
        groups: groups of a transposed convolution; 1 when `channel_dim` is 0.

    Returns:
        weight and bias, of the weight's type; computed in float64.
    """
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None, "the caller has seen to it"
    assert variance is not None, "the caller has seen to it"
    gamma = torch.ones_like(variance) if norm.weight is None else norm.weight
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias
    factor = gamma.double() / torch.sqrt(variance.double() + norm.eps)  # (out,)
    old_bias = torch.zeros_like(mean) if bias is None else bias
    new_bias = (old_bias.double() - mean.double()) * factor + beta.double()
    grouped = weight.double().unflatten(0, (groups, -1))  # (groups, ..., out / groups, ...)
    shape = [groups] + [1] * weight.dim()
    shape[channel_dim + 1] = -1
    new_weight = (grouped * factor.reshape(shape)).flatten(0, 1)
    return new_weight.to(weight.dtype), new_bias.to(weight.dtype)


def _adjacency_map(
    model: nn.Module, dummy_input: Any, adjacency_map: AdjacencyMap | None, purpose: str
) -> AdjacencyMap:
    if adjacency_map is not None:
        return adjacency_map
    if dummy_input is None:
        raise UsageError(f"{purpose}: neither dummy_input nor adjacency_map given; give one")
    remedy = "give an adjacency_map made by hand"
    return SummaryGraph(model, dummy_input, purpose=purpose, remedy=remedy).adjacency_map()


def _chains(
    modules: dict[str, nn.Module], types: Sequence[Any], adjacency_map: AdjacencyMap
) -> Iterator[tuple[str, ...]]:
    """Names of the modules of each sequence of `types`, none in two of them."""
    calls = Counter(_called(entry) for entry in adjacency_map.values())
    used: set[str] = set()
    for start in adjacency_map:
        chain = [start]
        for item in types:
            entry = adjacency_map.get(chain[-1])
            if entry is None or chain[-1] in used or not isinstance(modules.get(chain[-1]), item):
                break
            if calls[chain[-1]] > 1 or (len(chain) > 1 and len(entry.predecessors) != 1):
                break
            if len(chain) == len(types):
                used.update(chain)
                yield tuple(chain)
                break
            if entry.is_output or len(entry.successors) != 1:
                break
            chain.append(entry.successors[0].name)


def _called(entry: AdjacentsEntry) -> str:
    return entry.module_name or entry.op_meta.name


def _is_over_output_channels(layer: Any, norm: Any, output_rank: int | None) -> bool:
    # After a linear layer on (N, L, C) a norm runs over L, and so it does after an unbatched (C, L).
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return channels == norm.num_features and output_rank in (None, layer.weight.dim())


def _check_foldable(layer: Any, layer_name: str, norm: Any, norm_name: str) -> bool:
    if norm.running_mean is None or norm.running_var is None:
        raise DistillerError(
            f"{norm_name}: cannot be folded into '{layer_name}', it has no running statistics; "
            "make it with track_running_stats=True"
        )
    if any(p is not None and not isinstance(p, nn.Parameter) for p in (layer.weight, layer.bias)):
        raise DistillerError(
            f"{layer_name}: '{norm_name}' cannot be folded into it, its weight or bias is computed; "
            "make it a parameter first (torch.nn.utils.parametrize.remove_parametrizations)"
        )
    return True


def _folded(layer: Any, norm: _BatchNorm) -> nn.Module:
    """`layer` with new parameters."""
    is_transposed = isinstance(layer, _TRANSPOSED)
    weight, bias = folded_parameters(
        layer.weight.detach(),
        None if layer.bias is None else layer.bias.detach(),
        norm,
        channel_dim=int(is_transposed),
        groups=layer.groups if is_transposed else 1,
    )
    requires_grad = layer.weight.requires_grad
    layer.weight = nn.Parameter(weight, requires_grad)
    layer.bias = nn.Parameter(bias, requires_grad)
    return layer


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` is registered."""
    if new is old:
        return
    for parent in unwrap(model).modules():
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
