"""A trained model as an integer one will compute it: plain layers with weights on grids, and their integers.

Batch norms behind quantized layers become part of them, exactly: the scale of each output channel's weights
takes the batch norm's factor, and the integers change their sign where the factor is negative.
Knows nothing about file formats.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distiller.errors import QuantizationError
from distiller.names import named_modules, unwrap
from distiller.quantization import affine
from distiller.quantization.training.attachments import OUTPUT_QUANTIZER, detach_input_quantizers
from distiller.quantization.training.bn_pairs import NORMS, batch_norms_behind
from distiller.quantization.training.example_input import example_input
from distiller.quantization.training.fake_quant import Grid
from distiller.quantization.training.folded_parameters import parameter_quantizer
from distiller.quantization.training.sim_bn_fold import (
    SimulatedFoldedBatchNorm,
    is_passed_over,
)
from distiller.quantization.training.weight_quantizers import OutputChannels

__all__ = ["FoldedCopy", "GridQuantizer", "IntegerWeight", "folded_copy"]


@dataclass(frozen=True, slots=True)
class IntegerWeight:
    """The weight of a layer as integers: weight = (integers - zero_point) * scale.

    Attributes:
        integers: int32, in the shape of the weight.
        scale: scalar, or (output channels,); positive.
        zero_point: int32, in the shape of `scale`.
        qmin: smallest integer of the grid.
        qmax: largest integer of the grid.
        channels: where the output channels are in the weight.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    channels: OutputChannels

    @property
    def values(self) -> Tensor:
        """The weight."""
        zero_point = self.channels.spread(self.zero_point, self.integers)
        return (self.integers - zero_point) * self.channels.spread(self.scale, self.integers)


@dataclass(frozen=True, slots=True)
class FoldedCopy:
    """A deployed model.

    Attributes:
        model: plain modules, in evaluation mode; what was an activation quantizer is a `GridQuantizer`.
            Layers whose input or output is quantized have it as the child `input_quantizer` or
            `output_quantizer`, called by a hook, and so has the model itself.
        weights: the integers of each quantized weight, by the layer's canonical name.
        kept_batch_norms: batch norms behind quantized layers that could not become part of them: why, by
            name.
    """

    model: nn.Module
    weights: dict[str, IntegerWeight]
    kept_batch_norms: dict[str, str]


class GridQuantizer(nn.Module):
    """Rounds activations to a fixed grid; what lies beyond its ends becomes the ends (a ReLU's negative
    values too).

    Args:
        grid: the integers, and what they stand for.

    Attributes:
        scale: scalar buffer.
        zero_point: scalar buffer, int32.
        qmin: smallest integer.
        qmax: largest integer.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.register_buffer("scale", grid.scale.detach().clone())
        self.register_buffer("zero_point", grid.zero_point.clone())
        self.qmin, self.qmax = grid.qmin, grid.qmax

    def forward(self, x: Tensor) -> Tensor:
        """The values on the grid nearest to x."""
        return affine.fake_quantize(x, self.scale, self.zero_point, self.qmin, self.qmax)

    def extra_repr(self) -> str:
        """The grid, for `print(model)`."""
        return f"[{self.qmin}, {self.qmax}], scale={self.scale.item():g}, zp={int(self.zero_point)}"


def folded_copy(model: nn.Module, dummy_input: Any = None) -> FoldedCopy:
    """A copy of a model that was trained with quantization, as it is deployed.

    In evaluation mode it computes what the model does, but for the rounding of floating-point numbers.

    Args:
        model: prepared by a training quantizer, and trained; stays as it is.
        dummy_input: an input of it, or a tuple of them, to see which batch norm follows which layer; default
            of the model's `input_shape`. Not needed by a model without batch norms to fold.

    Raises:
        QuantizationError: the model is not prepared, not trained, has quantizers without integers, or there
            is no input.
        GraphTraceError: the model cannot be traced.
    """
    source = unwrap(model)
    if not hasattr(source, "quantizer_metadata"):
        raise QuantizationError("folded_copy: the model is not prepared by a training quantizer")
    deployed = copy.deepcopy(source).eval()
    del deployed.quantizer_metadata
    with torch.no_grad():
        weights = _made_plain(deployed)
        kept = _fold_batch_norms(deployed, weights, dummy_input)
        _replace(deployed, {m: _fixed(m, name) for name, m in _activation_quantizers(deployed).items()})
    return FoldedCopy(deployed, weights, kept)


def fold_into(weight: IntegerWeight, factor: Tensor) -> IntegerWeight | None:
    """The weight with each output channel times a factor; None if an integer's opposite is not on the grid.

    Args:
        weight: on any grid. Where its zero point may be other than 0, negative factors move it.
        factor: (output channels,).
    """
    integers, channels = weight.integers, weight.channels
    # A signed grid whose zero points are all 0 keeps them there.
    moves = weight.qmin == 0 or bool((weight.zero_point != 0).any())
    mirror = weight.qmin + weight.qmax if moves else 0
    is_negative = factor < 0
    integers = torch.where(channels.spread(is_negative, integers), mirror - integers, integers)
    if bool(((integers < weight.qmin) | (integers > weight.qmax)).any()):
        return None
    zero_point = weight.zero_point.expand(factor.shape)
    zero_point = torch.where(is_negative, mirror - zero_point, zero_point).to(torch.int32)
    scale = (weight.scale.double() * factor.double().abs()).to(weight.scale.dtype)
    is_dead = scale < torch.finfo(scale.dtype).tiny
    nothing = channels.spread(zero_point, integers)
    return replace(
        weight,
        integers=torch.where(channels.spread(is_dead, integers), nothing, integers),
        scale=torch.where(is_dead, torch.ones_like(scale), scale),
        zero_point=zero_point,
    )


def _made_plain(model: nn.Module) -> dict[str, IntegerWeight]:
    """Give every layer with quantized parameters plain ones; returns the integers of the weights, by name."""
    weights: dict[str, IntegerWeight] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for name, layer in list(named_modules(model)):
        if isinstance(layer, SimulatedFoldedBatchNorm):
            bias = layer.folding.folded_bias(layer.bias).to(layer.weight.dtype)
            weights[name] = _integer_weight(layer, name)
            replacements[layer] = layer.unfolded_layer(weights[name].values, bias)
            continue
        if is_passed_over(layer):
            replacements[layer] = nn.Identity()
        if parameter_quantizer(layer, "weight") is not None:
            weights[name] = _integer_weight(layer, name)
            _take_parametrizations_off(layer, {"weight": weights[name].values})
        elif parameter_quantizer(layer, "bias") is not None:
            _take_parametrizations_off(layer, {})
    _replace(model, replacements)
    return weights


def _take_parametrizations_off(layer: Any, values: dict[str, Tensor]) -> None:
    """Make the computed tensors of a layer parameters, of given values or of those that they have.

    PyTorch's `remove_parametrizations` would take the tensors away from the model that the layer is a copy
    of: copies of a parametrized module share its class.
    """
    computed: dict[str, Any] = {key: getattr(layer, key) for key in layer.parametrizations} | values
    layer.__class__ = parametrize.type_before_parametrizations(layer)
    del layer._modules["parametrizations"]
    kept = dict(layer._parameters)
    layer._parameters.clear()
    for key, value in computed.items():
        layer._parameters[key] = nn.Parameter(value.detach().clone())
    layer._parameters.update(kept)


def _integer_weight(layer: Any, name: str) -> IntegerWeight:
    quantizer, original = (
        cast(Any, parameter_quantizer(layer, "weight")),
        layer.parametrizations.weight.original,
    )
    if not hasattr(quantizer, "weight_grid"):
        raise QuantizationError(
            f"folded_copy: the weight of '{name}', by {type(quantizer).__name__}, has no integers: its "
            "values are not equally far apart, and integer kernels know one scale for all of them; train it "
            "on linear levels (QuantAwareTrainRangeLinearQuantizer, LSQQuantizer), or keep the checkpoint"
        )
    if isinstance(layer, SimulatedFoldedBatchNorm):
        original = layer.folding.folded_weight(original)
    grid: Grid = quantizer.weight_grid(original)
    channels = OutputChannels.of(layer)
    steps = quantizer(original) / channels.spread(grid.scale, original)
    integers = torch.round(steps) + channels.spread(grid.zero_point, original)
    is_off = (torch.round(steps) - steps).abs() > 0.01
    if bool((is_off | (integers < grid.qmin) | (integers > grid.qmax)).any()):
        raise QuantizationError(
            f"folded_copy: the weight of '{name}' is not on the grid that {type(quantizer).__name__} says"
        )
    return IntegerWeight(
        integers.to(torch.int32), grid.scale.detach(), grid.zero_point, grid.qmin, grid.qmax, channels
    )


def _fold_batch_norms(
    model: nn.Module, weights: dict[str, IntegerWeight], dummy_input: Any
) -> dict[str, str]:
    """Make batch norms part of the quantized layers before them; returns those that are not, and why."""
    candidates = {name for name in weights if not hasattr(model.get_submodule(name), OUTPUT_QUANTIZER)}
    if not candidates or not any(isinstance(module, NORMS) for module in model.modules()):
        return {}
    skeleton = copy.deepcopy(model)
    detach_input_quantizers(skeleton)  # with them a layer is no leaf of the graph
    names = {module: name for name, module in named_modules(skeleton)}
    if dummy_input is None:
        dummy_input = example_input(model, "folded_copy without dummy_input")
    pairs = batch_norms_behind(skeleton, dummy_input)
    kept: dict[str, str] = {}
    for layer_name, norm_name in (
        (layer, names[norm]) for layer, norm in pairs.items() if layer in candidates
    ):
        layer, norm = model.get_submodule(layer_name), cast(Any, model.get_submodule(norm_name))
        if norm.running_var is None:
            kept[norm_name] = "it has no running statistics"
            continue
        gamma = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
        factor = gamma.double() / torch.sqrt(norm.running_var.double() + norm.eps)
        folded = fold_into(weights[layer_name], factor)
        if folded is None:
            kept[norm_name] = (
                f"its negative factors turn {weights[layer_name].qmin}, which '{layer_name}' uses, into "
                f"{-weights[layer_name].qmin}, which is not on the grid; train with simulate_bn_folding, "
                "or on a grid that is its own mirror image (SYMMETRIC_RESTRICTED)"
            )
            continue
        weights[layer_name] = folded
        _set_folded(cast(Any, layer), norm, folded, factor)
        _replace(model, {norm: nn.Identity().eval()})
    return kept


def _set_folded(layer: Any, norm: Any, folded: IntegerWeight, factor: Tensor) -> None:
    beta = 0.0 if norm.bias is None else norm.bias.double()
    bias = 0.0 if layer.bias is None else layer.bias.double()
    layer.weight = nn.Parameter(folded.values.to(layer.weight.dtype))
    layer.bias = nn.Parameter(((bias - norm.running_mean.double()) * factor + beta).to(layer.weight.dtype))


def _activation_quantizers(model: nn.Module) -> dict[str, nn.Module]:
    roles = ("activation", "input", "output")
    return {
        name: module for name, module in named_modules(model) if getattr(module, "quantizes", "") in roles
    }


def _fixed(quantizer: nn.Module, name: str) -> nn.Module:
    if not hasattr(type(quantizer), "grid"):
        raise QuantizationError(
            f"folded_copy: the activations of '{name}', by {type(quantizer).__name__}, have no integers"
        )
    return GridQuantizer(cast(Any, quantizer).grid).eval()


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put each module at every place of the one that it replaces."""
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, child_name, replacements[child])
