"""Pairs of layers between which channels can be scaled: what the first puts out reaches the second alone.

Between the two stands nothing but what keeps positive factors of channels, f(s x) = s f(x) for s > 0.
Knows nothing about how factors are chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distiller.graph import Op, SummaryGraph
from distiller.quantization.refinement.layer_rows import LAYERS

_HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu")
_POOLINGS = ("MaxPool", "AveragePool")
_RESHAPES = ("Flatten", "Reshape", "Squeeze")
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class ChannelPair:
    """Two layers, each called once.

    Attributes:
        first: name of the layer that puts the channels out.
        second: name of the layer that alone reads them.
        through: the operations between them.
        block: how many neighbouring features of the second are one channel of the first: 1, but after
            flattening.
    """

    first: str
    second: str
    through: tuple[Op, ...]
    block: int


class _Refused(Exception):
    """Why a layer is the first of no pair."""


class _Layout(NamedTuple):
    """Where the channels are in a tensor."""

    shape: tuple[int, ...]
    is_last: bool  # as the output of a linear layer, in the last dimension; otherwise in dimension 1
    block: int | None  # features per channel, once the tensor is flat


def channel_pairs(
    graph: SummaryGraph, modules: Mapping[str, nn.Module], relu6_too: bool
) -> tuple[list[ChannelPair], dict[str, str]]:
    """All pairs of a model, in the order of execution, and why other layers are the first of none.

    Args:
        graph: of the model, perhaps from before batch norms were folded.
        modules: the model's modules by name, batch norms that were folded being nn.Identity.
        relu6_too: let nn.ReLU6 stand between, for it is to become nn.ReLU.

    Returns:
        The pairs; the reasons by name.
    """
    finder = _Finder(graph, modules, relu6_too)
    pairs: list[ChannelPair] = []
    left: dict[str, str] = {}
    for name in graph.layers_topological_order():
        if not isinstance(modules.get(name), LAYERS):
            continue
        try:
            pairs.append(finder.pair(name))
        except _Refused as reason:
            left[name] = str(reason)
    return pairs, left


class _Finder:
    """Follows the graph from a layer on."""

    def __init__(self, graph: SummaryGraph, modules: Mapping[str, nn.Module], relu6_too: bool) -> None:
        self._graph = graph
        self._modules = modules
        self._relu6_too = relu6_too
        self._calls = Counter(op.module_name for op in graph.ops.values() if not op.is_functional)

    def pair(self, name: str) -> ChannelPair:
        """The pair whose first layer is `name`."""
        self._check_usable(name)
        op = self._graph.ops[name]
        layout = _Layout(op.output_shape, isinstance(self._modules[name], nn.Linear), None)
        through: list[Op] = []
        while True:
            if op.is_output:
                raise _Refused("the model returns its output")
            if len(op.successors) != 1:
                readers = ", ".join(f"'{reader}'" for reader in op.successors[:_SHOWN])
                readers += ", ..." if len(op.successors) > _SHOWN else ""
                raise _Refused(f"{len(op.successors)} operations read its output: {readers}")
            op = self._graph.ops[op.successors[0]]
            second = self._modules.get(op.module_name)
            if not op.is_functional and isinstance(second, LAYERS):
                self._check_usable(op.module_name)
                return ChannelPair(name, op.module_name, tuple(through), _block(op, second, layout))
            layout = self._behind(op, layout)
            through.append(op)

    def _behind(self, op: Op, layout: _Layout) -> _Layout:
        """The layout behind an operation that keeps factors of channels."""
        module = None if op.is_functional else self._modules.get(op.module_name)
        where = f"'{op.name}' ({op.type})"
        if len(op.operands) != 1:
            raise _Refused(f"{where} puts it together with something else")
        if op.type == "BatchNormalization" and not isinstance(module, _BatchNorm):  # it was folded
            return layout
        if op.type in _HOMOGENEOUS:
            return layout
        if isinstance(module, nn.ReLU6):
            if self._relu6_too:
                return layout
            raise _Refused(
                f"{where} is bounded by 6 whatever the scale; pass replace_relu6=True to make it a ReLU"
            )
        if op.type in _POOLINGS and not layout.is_last and layout.block is None:
            return layout._replace(shape=op.output_shape)
        if op.type == "ReduceMean" and _is_over_positions(op, layout):
            return layout._replace(shape=op.output_shape, block=1 if len(op.output_shape) == 2 else None)
        if op.type in _RESHAPES:
            return _reshaped(op, layout, where)
        raise _Refused(f"{where} does not keep factors of single channels")

    def _check_usable(self, name: str) -> None:
        """Refuse layers whose weights cannot be changed for one use of them."""
        layer: Any = self._modules[name]
        if self._calls[name] > 1:
            raise _Refused(f"'{name}' is called {self._calls[name]} times")
        for kind in ("weight", "bias"):
            parameter = getattr(layer, kind)
            if parameter is None:
                continue
            if not isinstance(parameter, nn.Parameter):
                raise _Refused(f"the {kind} of '{name}' is computed, not a parameter")
            holders = [
                other
                for other, module in self._modules.items()
                if any(held is parameter for held in module._parameters.values())
            ]
            others = [other for other in holders if other != name] or self._readers(f"{name}.{kind}", name)
            if others:
                raise _Refused(
                    f"'{name}' shares its {kind} with " + ", ".join(f"'{other}'" for other in others)
                )

    def _readers(self, parameter: str, layer: str) -> list[str]:
        """The operations besides the layer that read a parameter."""
        source = self._graph.params.get(parameter)
        return [] if source is None else [reader for reader in source.readers if reader != layer]


def _block(op: Op, layer: Any, layout: _Layout) -> int:
    """How many features of a layer that reads a tensor are one channel of it."""
    channels = layout.shape[-1] if layout.is_last else layout.shape[1]
    where = f"'{op.name}' ({op.type})"
    if isinstance(layer, nn.Linear):
        if layout.is_last:
            return 1
        if layout.block is None:
            raise _Refused(f"{where} reads positions as features")
        return layout.block
    if layout.is_last or layout.block is not None or len(layout.shape) != layer.weight.dim():
        raise _Refused(f"{where} reads other dimensions as channels")
    assert channels == layer.in_channels, "the model would not run"
    return 1


def _reshaped(op: Op, layout: _Layout, where: str) -> _Layout:
    before, after = layout.shape, op.output_shape
    if after == before:
        return layout
    if not layout.is_last and layout.block is None and after[:1] == before[:1]:
        if len(after) == 2:
            return layout._replace(shape=after, block=after[1] // before[1])
        if after[1] == before[1]:
            return layout._replace(shape=after)
    raise _Refused(f"{where} mixes channels with other dimensions")


def _is_over_positions(op: Op, layout: _Layout) -> bool:
    """Whether a mean is one over all positions of each channel; not where its shape may mean another."""
    if layout.is_last or layout.block is not None:
        return False
    batch, channels, *sizes = layout.shape
    ones = (batch, channels, *[1] * len(sizes))
    return op.output_shape in (ones, (batch, channels)) and channels not in sizes
