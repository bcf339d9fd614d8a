"""The quantized layers of a model: what there is to put into the model in floating point, one by one.

Of a model that was quantized after training a layer is what `PostTrainLinearQuantizer` put in its place; of
one that was trained with quantization it is a layer with quantized parameters, inputs or output, or what took
the place of an activation function.
Knows nothing about data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distiller.errors import QuantizationError, did_you_mean
from distiller.graph import SummaryGraph
from distiller.names import named_modules, unwrap
from distiller.quantization.activation_quant import ActivationQuantizer
from distiller.quantization.ptq_precision import FPWrapper
from distiller.quantization.ptq_weights import QuantizedWeightWrapper, filters_first
from distiller.quantization.ptq_wrapper import RangeLinearQuantWrapper
from distiller.quantization.report_rows import Levels, RunningFigures, TensorFigures
from distiller.quantization.stats_propagation import read_ranges
from distiller.quantization.training.attachments import INPUT_QUANTIZER, OUTPUT_QUANTIZER
from distiller.quantization.training.binary_activations import BinaryActivations, HandedOn
from distiller.quantization.training.dorefa import DorefaWeightQuantizer
from distiller.quantization.training.folded_parameters import parameter_quantizer
from distiller.quantization.training.sim_bn_fold import SimulatedFoldedBatchNorm
from distiller.quantization.training.weight_quantizers import OutputChannels

__all__ = [
    "QuantizedLayer",
    "bits_of",
    "float_layer_of",
    "levels_of",
    "read_layers",
    "unrounded",
    "was_trained_quantized",
    "with_read_ranges",
]

MODEL_INPUT = "(input)"
WRAPPERS = (FPWrapper, RangeLinearQuantWrapper)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedLayer:
    """A layer of a quantized model.

    Attributes:
        name: its canonical name; `MODEL_INPUT` for what quantizes the model's input.
        kind: its class in floating point.
        parts: what takes the place of which module of the float model, by name, in the order of their calls:
            the layer, and the batch norm that is folded into it in training. None for the model's input.
        weight: figures of its weight.
        input_quantizers: the quantizers of inputs that it calls.
        output_quantizer: that of its output; None where it is not quantized.
        told_apart: values of the output beyond these two are as good as these: the quantizer is a ReLU as
            well, or all that reads the output are functions that are flat there (ReLU6, tanh).
        dynamic_sources: quantizers of other layers' outputs whose scale, found for each batch, the layer
            computes with, by the name of the other layer.
    """

    name: str
    kind: str
    parts: Mapping[str, nn.Module]
    weight: TensorFigures = field(default_factory=TensorFigures)
    input_quantizers: tuple[nn.Module, ...] = ()
    output_quantizer: nn.Module | None = None
    told_apart: tuple[float, float] = (-math.inf, math.inf)
    dynamic_sources: Mapping[str, nn.Module] = field(default_factory=dict)


def was_trained_quantized(model: nn.Module) -> bool:
    """Whether a training quantizer has prepared the model."""
    return any(hasattr(module, "quantizes") for module in model.modules())


def read_layers(floats: Mapping[str, nn.Module], model: nn.Module) -> list[QuantizedLayer]:
    """The quantized layers of a model, in its order.

    Modules of post-training quantization that stay on the grid of what they read (as max pooling) are none:
    they round nothing.

    Args:
        floats: the modules of the model in floating point, by name.
        model: the quantized model.

    Raises:
        QuantizationError: there are none, or the models do not fit.
    """
    read = _trained_layers if was_trained_quantized(model) else _wrapped_layers
    with torch.no_grad():
        layers = list(read(floats, unwrap(model)))
    if not layers:
        raise QuantizationError(
            "quantization_report: nothing of the model is quantized; prepare it with a quantizer first"
        )
    return layers


def with_read_ranges(
    layers: Iterable[QuantizedLayer], float_model: nn.Module, dummy_input: Any
) -> list[QuantizedLayer]:
    """The layers with what those that read them can tell apart, to which their grids were narrowed.

    Args:
        layers: of one model.
        float_model: that model in floating point.
        dummy_input: an input, or a tuple of them; the model is traced with it, if any grid was narrowed.

    Raises:
        GraphTraceError: the model cannot be traced.
    """
    layers = list(layers)
    if not any(_has_fixed_range(layer.output_quantizer) for layer in layers):
        return layers
    graph = SummaryGraph(float_model, dummy_input, purpose="the quantization report")
    ranges = read_ranges(graph.adjacency_map(), {}, dict(named_modules(float_model)))
    return [
        replace(layer, told_apart=(max(read.lo, layer.told_apart[0]), read.hi))
        if (read := ranges.get(layer.name)) is not None and _has_fixed_range(layer.output_quantizer)
        else layer
        for layer in layers
    ]


def bits_of(quantizers: Iterable[nn.Module | None]) -> int | None:
    """The smallest width of some quantizers of activations; None if they have none."""
    widths: list[int] = []
    for quantizer in quantizers:
        if isinstance(quantizer, ActivationQuantizer):
            widths.append(quantizer.settings.num_bits)
        elif isinstance(quantizer, BinaryActivations):
            widths.append(1)
        elif quantizer is not None and hasattr(quantizer, "num_bits"):
            widths.append(int(quantizer.num_bits))  # type: ignore[arg-type]
    return min(widths, default=None)


def levels_of(quantizer: nn.Module | None) -> Levels | None:
    """The values that a quantizer of activations rounds to, as it did last; None if it has no even grid."""
    if isinstance(quantizer, ActivationQuantizer):
        qmin, qmax = quantizer.settings.qrange
        if quantizer.settings.clip_half_range:
            qmin = int(quantizer.zero_point)
        return Levels.of(quantizer.scale, quantizer.zero_point, qmin, qmax)
    if quantizer is None or not hasattr(type(quantizer), "grid"):
        return None
    grid: Any = quantizer.grid
    return Levels.of(grid.scale, grid.zero_point, grid.qmin, grid.qmax)


def _wrapped_layers(floats: Mapping[str, nn.Module], model: nn.Module) -> Iterator[QuantizedLayer]:
    """Those of post-training quantization."""
    modules = dict(named_modules(model))
    sources = {
        wrapper.output_quant: name
        for name, wrapper in modules.items()
        if isinstance(wrapper, RangeLinearQuantWrapper) and not wrapper.keeps_grid
    }
    for name, module in modules.items():
        if isinstance(module, nn.Identity) and isinstance(floats.get(name), _BatchNorm):
            raise QuantizationError(
                f"float_model: '{name}' is a batch norm, which the quantized model has folded; "
                "make the model with float_twin(model, dummy_input)"
            )
        if not isinstance(module, WRAPPERS):
            continue
        wrapped = module.wrapped_module
        float_layer = float_layer_of(floats, name, type(wrapped))
        parts, kind, weight = (
            {name: module},
            type(wrapped).__name__,
            _wrapped_weight(module, float_layer, name),
        )
        if isinstance(module, FPWrapper):
            yield QuantizedLayer(name, kind, parts, weight)
        elif not module.keeps_grid:
            own = tuple(module.inputs_quant.values())
            output = module.output_quant
            yield QuantizedLayer(
                name,
                kind,
                parts,
                weight,
                own,
                output,
                told_apart=(
                    0.0 if output is not None and output.settings.clip_half_range else -math.inf,
                    math.inf,
                ),
                dynamic_sources={
                    sources[grid]: grid
                    for grid in module.input_grids.values()
                    if grid.is_dynamic and not any(grid is other for other in own)
                },
            )


def _trained_layers(floats: Mapping[str, nn.Module], model: nn.Module) -> Iterator[QuantizedLayer]:
    """Those of a training quantizer."""
    modules = dict(named_modules(model))
    names = {module: name for name, module in modules.items()}
    for name, module in modules.items():
        role = getattr(module, "quantizes", None)
        before, after = (module._modules.get(key) for key in (INPUT_QUANTIZER, OUTPUT_QUANTIZER))
        inputs = () if before is None else (before,)
        if not name:
            if before is not None:
                yield QuantizedLayer(MODEL_INPUT, "Input", {}, input_quantizers=inputs)
            continue
        # One that hands on its input rounds nothing, and is what it is in the float model, too.
        is_activation = role == "activation" and not isinstance(module, HandedOn)
        has_parameters = any(parameter_quantizer(module, key) is not None for key in ("weight", "bias"))
        if role in ("input", "output") or not (is_activation or has_parameters or before or after):
            continue
        float_layer = float_layer_of(floats, name, None if is_activation else type(module))
        parts = {name: module}
        if isinstance(module, SimulatedFoldedBatchNorm):
            norm = names[module.bn]
            float_layer_of(floats, norm, type(module.bn))
            parts[norm] = module.bn
        kind, weight = type(float_layer).__name__, _trained_weight(module)
        yield QuantizedLayer(name, kind, parts, weight, inputs, module if is_activation else after)


def float_layer_of(floats: Mapping[str, nn.Module], name: str, kind: type[nn.Module] | None) -> nn.Module:
    """The layer of a name in floating point, if it is of a kind that `kind` is, or comes of."""
    found = floats.get(name)
    if found is None:
        raise QuantizationError(
            f"float_model: has no '{name}', which is quantized in the other{did_you_mean(name, floats)}; "
            "make modules of functional operations first (to_modules), if any, and quantize a copy of the "
            "float model"
        )
    if kind is not None and not issubclass(kind, type(found)):
        raise QuantizationError(
            f"float_model: '{name}' is {type(found).__name__}, in the quantized model {kind.__name__}; "
            "quantize a copy of the float model"
        )
    return found


def _wrapped_weight(wrapper: Any, float_layer: Any, name: str) -> TensorFigures:
    layer, running = wrapper.wrapped_module, RunningFigures()
    if not isinstance(getattr(layer, "weight", None), Tensor) or layer.weight.dim() < 2:
        return TensorFigures()
    if not isinstance(wrapper, QuantizedWeightWrapper | FPWrapper):
        return TensorFigures()
    if float_layer.weight.shape != layer.weight.shape:
        raise QuantizationError(
            f"float_model: the weight of '{name}' is {tuple(float_layer.weight.shape)}, in the quantized "
            f"model {tuple(layer.weight.shape)}; quantize a copy of the float model"
        )
    rows = [filters_first(weight, layer).flatten(1) for weight in (float_layer.weight, layer.weight)]
    if isinstance(wrapper, FPWrapper):
        running.add(rows[0], rows[1])
        return running.result(torch.finfo(layer.weight.dtype).bits)
    settings = wrapper.wts_quant_settings
    scale, zero_point = _as_column(wrapper.weight_scale), _as_column(wrapper.weight_zero_point)
    running.add(rows[0], rows[1], Levels.of(scale, zero_point, *settings.qrange))
    return running.result(settings.num_bits)


def _trained_weight(layer: Any) -> TensorFigures:
    quantizer: Any = parameter_quantizer(layer, "weight")
    if quantizer is None:
        return TensorFigures()
    channels, original, running = (
        OutputChannels.of(layer),
        layer.parametrizations.weight.original,
        RunningFigures(),
    )
    if isinstance(layer, SimulatedFoldedBatchNorm):
        original = layer.folding.folded_weight(original)
    smooth, levels = unrounded(quantizer, original), None
    if hasattr(quantizer, "weight_grid"):
        grid = quantizer.weight_grid(original)
        levels = Levels.of(_as_column(grid.scale), _as_column(grid.zero_point), grid.qmin, grid.qmax)
    running.add(channels.rows(smooth), channels.rows(layer.weight), levels)
    return running.result(getattr(quantizer, "num_bits", None))


def unrounded(quantizer: nn.Module, weight: Tensor) -> Tensor:
    """What a quantizer makes of a weight, but for the rounding: DoReFa-Net's squashes it onto [-1, 1]."""
    if not isinstance(quantizer, DorefaWeightQuantizer) or quantizer.num_bits == 1:
        return weight
    squashed = torch.tanh(weight)
    largest = squashed.abs().amax()
    return squashed / torch.where(largest > 0, largest, 1)


def _has_fixed_range(quantizer: nn.Module | None) -> bool:
    """Whether the range of a quantizer of post-training quantization is that of statistics."""
    return isinstance(quantizer, ActivationQuantizer) and not quantizer.is_dynamic


def _as_column(values: Tensor) -> Tensor:
    """Values of the output channels in a shape that broadcasts with (output channels, elements)."""
    return values[:, None] if values.dim() else values
