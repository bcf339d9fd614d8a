"""Axes of width: a layer's weight, or what it reads, rounded to so many bits.

    weight-bits        symmetric, a scale for each output channel: bit for bit what
                       `PostTrainLinearQuantizer` makes of it with `per_channel_wts`
    activation-bits    asymmetric, one scale in all, from the range that calibration saw

Nothing else of the model is quantized. Knows nothing about how a compressed model is judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distiller.errors import UsageError
from distiller.quantization import affine
from distiller.quantization.activation_quant import QuantSettings
from distiller.quantization.affine import MAX_BITS, MIN_BITS, LinearQuantMode
from distiller.quantization.clipping import clipped_range, tensor_stats
from distiller.quantization.ptq_build import kind_of
from distiller.quantization.ptq_weights import filters_back, filters_first
from distiller.replay import Variant
from distiller.sensitivity.axes.axis import AxisContext, ParameterAxis, WeightVariants, naming, no_note
from distiller.sensitivity.axes.levels import bit_levels
from distiller.sensitivity.units import Unit

__all__ = ["ActivationBitsAxis", "QuantizedInput", "WeightBitsAxis", "quantized_input", "quantized_weight"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class _BitsAxis(ParameterAxis):
    """What both axes of width have in common."""

    dense_level = 32.0
    default_range = (8.0, 2.0, 1.0)
    is_sparsity = False

    def levels(self, start: float, stop: float, step: float) -> tuple[float, ...]:
        """The widths of a range, both ends included; downwards or upwards."""
        return bit_levels(start, stop, step)

    def check_level(self, level: float) -> None:
        """Refuse what is no width; 32 is that of the dense model."""
        is_width = MIN_BITS <= level <= MAX_BITS and float(level).is_integer()
        if not is_width and level != self.dense_level:
            raise UsageError(
                f"sensitivity: a level of {self.name} must be a whole number of bits, {MIN_BITS} to "
                f"{MAX_BITS} (32: dense), got {level:g}"
            )


class WeightBitsAxis(_BitsAxis):
    """Level b rounds a layer's weight to b bits."""

    name = "weight-bits"
    takes = "weights of convolutions and linear layers"
    label = "Bits of the weight"

    def _unit(
        self,
        name: str,
        weight: Tensor,
        layers: Mapping[str, nn.Module],
        levels: tuple[float, ...],
        context: AxisContext,
    ) -> Unit | None:
        layer = next((layer for layer in layers.values() if kind_of(layer) == "param"), None)
        if layer is None:
            return None
        make = WeightVariants(name, weight.clone(), _Rounding(_layout_of(layer)))
        return Unit(self.name, name, levels, make, tensors=(name,), note=no_note)


class ActivationBitsAxis(_BitsAxis):
    """Level b rounds the input of a layer to b bits."""

    name = "activation-bits"
    takes = "weights of convolutions and linear layers that the images reach"
    label = "Bits of the layer's input"

    def _unit(
        self,
        name: str,
        weight: Tensor,
        layers: Mapping[str, nn.Module],
        levels: tuple[float, ...],
        context: AxisContext,
    ) -> Unit | None:
        if context.activation_ranges is None:
            raise UsageError(
                f"sensitivity: axis '{self.name}' needs the ranges of the layers' inputs, got none; measure "
                "them with input_ranges(model, batches) and give them as activation_ranges"
            )
        ranges = {
            layer_name: context.activation_ranges[layer_name]
            for layer_name, layer in layers.items()
            if kind_of(layer) == "param" and layer_name in context.activation_ranges
        }
        if not ranges:
            return None
        return Unit(self.name, name, levels, _InputVariants(name, ranges), inputs=tuple(ranges), note=no_note)


def quantized_weight(weight: Tensor, bits: int, layer: nn.Module) -> Tensor:
    """A layer's weight on the grid of `bits` bits, symmetric, a scale for each output channel.

        scale = max |w| / ((2^bits - 1) / 2)
        w' = scale clamp(round(w / scale), -2^(bits - 1), 2^(bits - 1) - 1)

    Args:
        weight: of the layer, in its layout.
        bits: 2 to 16.
        layer: says by its type which dimension the output channels are; its own weight is not looked at.

    Returns:
        A new tensor.

    Raises:
        QuantizationError: the weight holds NaN or infinity.
    """
    settings = QuantSettings(bits, LinearQuantMode.SYMMETRIC, per_channel=True)
    rows = filters_first(weight, layer)
    stats = tensor_stats(rows, settings.clip_mode, settings.per_channel)
    lo, hi = clipped_range(stats, settings.clip_mode, bits, settings.quant_mode.is_symmetric)
    grid = affine.scale_and_zero_point(lo, hi, bits, settings.quant_mode)
    return filters_back(affine.fake_quantize(rows, *grid, *settings.qrange, axis=0), layer).to(weight.dtype)


@dataclass(frozen=True, slots=True)
class QuantizedInput:
    """x -> the values on a grid nearest to it: a new tensor, NaN where x is.

    Attributes:
        scale: the width of a step.
        zero_point: the integer that 0 is laid onto.
        qmin: the smallest integer.
        qmax: the largest.
    """

    scale: float
    zero_point: int
    qmin: int
    qmax: int

    def __call__(self, x: Tensor) -> Tensor:
        """The real values on the grid."""
        scale, zero_point = torch.tensor(self.scale), torch.tensor(self.zero_point)
        return affine.fake_quantize(x, scale, zero_point, self.qmin, self.qmax)


def quantized_input(lo: float, hi: float, bits: int) -> QuantizedInput:
    """The asymmetric grid of `bits` bits over [lo, hi], which is widened to contain 0.

    Args:
        lo: the least value, finite.
        hi: the largest, not below.
        bits: 2 to 16.

    Raises:
        QuantizationError: this is no range.
    """
    settings = QuantSettings(bits, LinearQuantMode.ASYMMETRIC_UNSIGNED)
    scale, zero_point = affine.scale_and_zero_point(
        torch.tensor(lo, dtype=torch.float32),
        torch.tensor(hi, dtype=torch.float32),
        bits,
        settings.quant_mode,
    )
    return QuantizedInput(float(scale), int(zero_point), *settings.qrange)


@dataclass(frozen=True, slots=True)
class _Rounding:
    """(weight, bits) -> `quantized_weight`."""

    layout: nn.Module

    def __call__(self, weight: Tensor, level: float) -> Tensor:
        return quantized_weight(weight, int(level), self.layout)


@dataclass(frozen=True, slots=True)
class _InputVariants:
    """Bits -> the variant in which the inputs of layers are rounded."""

    parameter: str
    ranges: Mapping[str, tuple[float, float]]

    def __call__(self, level: float) -> Variant:
        with naming(self.parameter):
            inputs = {name: quantized_input(lo, hi, int(level)) for name, (lo, hi) in self.ranges.items()}
        return Variant(inputs=inputs)


def _layout_of(layer: nn.Module) -> nn.Module:
    """A layer of no size whose weight is laid out as that of `layer`."""
    if isinstance(layer, _TRANSPOSED):
        return nn.ConvTranspose1d(
            layer.groups, layer.groups, 1, groups=layer.groups, bias=False, device="meta"
        )
    return nn.Identity()
