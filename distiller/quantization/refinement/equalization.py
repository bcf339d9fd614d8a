"""Cross-layer equalization: the weights' ranges made alike over the channels between two layers.

For positive s, W2 f(W1 x + b1) = W2 S f(S^-1 (W1 x + b1)), f being a ReLU or another function that keeps
positive factors. With r1 and r2 the largest absolute weights of each channel in the two layers,

    s_i = sqrt(r1_i / r2_i)        r1_i / s_i = r2_i s_i = sqrt(r1_i r2_i)

so that one scale for a whole weight serves all its channels well. In evaluation mode the model computes the
same as before.
Knows nothing about bits or data.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
arXiv 1906.04721, section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distiller.errors import QuantizationError, UsageError
from distiller.graph import SummaryGraph
from distiller.names import named_modules, unwrap
from distiller.quantization.refinement.channel_scaling import ChannelMagnitudes, scaled_weight
from distiller.quantization.refinement.equalization_pairs import ChannelPair, channel_pairs
from distiller.quantization.refinement.folded_norms import (
    fold_keeping_norms,
    keep_norm_statistics,
    norm_statistics,
)
from distiller.quantization.refinement.high_bias import absorb_high_bias
from distiller.quantization.refinement.structure import replace_relu6s

_INSIGNIFICANT = 1e-6


@dataclass(frozen=True, slots=True)
class EqualizedPair:
    """Two layers, and how the channels between them were scaled.

    Attributes:
        first: its output channels were divided by `scales`.
        second: what it reads of them was multiplied.
        through: the operations between them.
        scales: (channels,).
        absorbed: what was taken from the bias of the first and put into that of the second, (channels,);
            None where nothing was.
    """

    first: str
    second: str
    through: tuple[str, ...]
    scales: Tensor
    absorbed: Tensor | None


@dataclass(frozen=True, slots=True)
class EqualizationReport:
    """What was equalized, and what not.

    Attributes:
        pairs: in the order of execution.
        left: why the outputs of other layers were left as they are, by name.
        sweeps: how often all pairs were gone through.
        converged: whether the last time changed no range by more than the tolerance.
        replaced_relu6s: names of the ReLU6s that are ReLUs now.
        not_absorbed: why high biases were not absorbed, by the first layer's name; empty if that was not
            asked.
        new_biases: layers that had no bias and got one.
    """

    pairs: tuple[EqualizedPair, ...]
    left: Mapping[str, str]
    sweeps: int
    converged: bool
    replaced_relu6s: tuple[str, ...]
    not_absorbed: Mapping[str, str]
    new_biases: tuple[str, ...]


def equalize(
    model: nn.Module,
    dummy_input: Any,
    *,
    replace_relu6: bool = False,
    absorb_bias: bool = False,
    tolerance: float = 0.01,
    max_sweeps: int = 200,
) -> EqualizationReport:
    """Equalize all pairs of layers of a model, its batch norms folded first.

    A pair are convolutions (1d to 3d, grouped, depthwise, transposed) or linear layers, the second the only
    reader of the first, with ReLU, LeakyReLU, PReLU, pooling or flattening between them; chains are pairs
    that share layers, and are gone through until nothing changes. Layers whose outputs are added to others
    are left. Weights that are 0 stay 0. A channel without weights on one side is left, and one that
    contributes next to nothing (r1 r2 below a millionth of the layer's largest) is never made larger in the
    first layer: its bias and its activations would grow with it.

    Args:
        model: changed in place, for evaluation; its layers get new parameters.
        dummy_input: an input, or a tuple of them, to trace the model with.
        replace_relu6: make nn.ReLU of nn.ReLU6 modules between layers that are pairs without them. That
            changes what the model computes where they clipped.
        absorb_bias: then shift c = max(0, mean - 3 std) of each channel from the first bias to the second,
            where mean and std are known from a folded batch norm: narrower activations; exact for
            activations that are never below c.
        tolerance: of |log s| in the last sweep, > 0.
        max_sweeps: at least 1.

    Returns:
        The report.

    Raises:
        GraphTraceError: the model cannot be traced.
        DistillerError: a batch norm cannot be folded.
        QuantizationError: a weight is not finite.
        UsageError: `tolerance` or `max_sweeps` out of range.
    """
    if not tolerance > 0 or max_sweeps < 1:
        raise UsageError(
            f"equalize: tolerance must be > 0 and max_sweeps at least 1, got {tolerance!r} and {max_sweeps!r}"
        )
    model = unwrap(model)
    graph = SummaryGraph(model, dummy_input, purpose="cross-layer equalization")
    fold_keeping_norms(model, graph=graph)
    modules = dict(named_modules(model))
    found, left = channel_pairs(graph, modules, replace_relu6)
    scaled = _equalized(found, modules, tolerance, max_sweeps)
    for pair, factors in zip(found, scaled.scales, strict=True):
        _divide_outputs(modules[pair.first], factors)
    for name, known in scaled.layers.items():
        layer: Any = modules[name]
        weight = scaled_weight(
            layer.weight.detach(), layer, known.output_factors, known.input_factors, scaled.blocks[name]
        )
        layer.weight = nn.Parameter(weight, layer.weight.requires_grad)
    relu6s = _relu6s(found, modules)
    replace_relu6s(model, relu6s)
    absorbed, not_absorbed, new_biases = absorb_high_bias(found, modules) if absorb_bias else ({}, {}, ())
    return EqualizationReport(
        tuple(
            EqualizedPair(
                pair.first,
                pair.second,
                tuple(op.name for op in pair.through),
                factors.float(),
                absorbed.get(pair.first),
            )
            for pair, factors in zip(found, scaled.scales, strict=True)
        ),
        left,
        scaled.sweeps,
        scaled.converged,
        relu6s,
        not_absorbed,
        new_biases,
    )


def equalizing_scales(first: Tensor, second: Tensor) -> Tensor:
    """s = sqrt(r1 / r2); 1 where one of them is 0, not below 1 where the channel is insignificant.

    Args:
        first: r1, (channels,), >= 0.
        second: r2, the same shape.
    """
    product = first * second
    scales = torch.where(product > 0, torch.sqrt(first / second), torch.ones_like(first))
    is_insignificant = product < _INSIGNIFICANT * product.max()
    return torch.where(is_insignificant, scales.clamp(min=1), scales)


@dataclass(frozen=True, slots=True)
class _Scaled:
    """Layers with their factors, and each pair's scales."""

    layers: dict[str, ChannelMagnitudes]
    blocks: dict[str, int]
    scales: list[Tensor]
    sweeps: int
    converged: bool


def _equalized(
    pairs: list[ChannelPair], modules: Mapping[str, nn.Module], tolerance: float, max_sweeps: int
) -> _Scaled:
    """Go through the pairs until nothing changes."""
    blocks = {pair.first: 1 for pair in pairs} | {pair.second: pair.block for pair in pairs}
    layers: dict[str, ChannelMagnitudes] = {}
    for name, block in blocks.items():
        weight: Tensor = modules[name].weight  # type: ignore[assignment]
        if not bool(weight.isfinite().all()):
            raise QuantizationError(f"{name}: its weight is not finite; training has diverged")
        layers[name] = ChannelMagnitudes(weight, modules[name], block)
    totals = [torch.ones_like(layers[pair.first].output_factors) for pair in pairs]
    sweeps, change = 0, float("inf") if pairs else 0.0
    while change > tolerance and sweeps < max_sweeps:
        sweeps, change = sweeps + 1, 0.0
        for index, pair in enumerate(pairs):
            first, second = layers[pair.first], layers[pair.second]
            scales = equalizing_scales(first.output_ranges(), second.input_ranges())
            first.output_factors = first.output_factors / scales
            second.input_factors = second.input_factors * scales
            totals[index] = totals[index] * scales
            change = max(change, float(scales.log().abs().max()))
    return _Scaled(layers, blocks, totals, sweeps, change <= tolerance)


def _divide_outputs(layer: Any, factors: Tensor) -> None:
    """Divide by factors what else belongs to the output channels of a layer."""
    if layer.bias is not None:
        bias = (layer.bias.detach().double() / factors).to(layer.bias.dtype)
        layer.bias = nn.Parameter(bias, layer.bias.requires_grad)
    known = norm_statistics(layer)
    if known is not None:
        mean, std = ((value.double() / factors).to(value.dtype) for value in known)
        keep_norm_statistics(layer, mean, std)


def _relu6s(pairs: list[ChannelPair], modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    between = (op.module_name for pair in pairs for op in pair.through if not op.is_functional)
    return tuple(dict.fromkeys(name for name in between if isinstance(modules[name], nn.ReLU6)))
