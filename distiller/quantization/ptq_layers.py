"""Layers after post-training quantization: the layer itself between quantizers, simulated.

Integer hardware computes, for x and w on their grids,

    acc = sum (q_x - z_x)(q_w - z_w) + q_bias            accumulated in `bits_accum` bits
    q_y = clamp(round(acc * s_x * s_w / s_y) + z_y)      after the ReLU, where one is fused

Here the same numbers are computed in floating point, with the weights rounded to their grid
once, when the model is prepared. Scales and zero points are in PyTorch's convention; only
`output_scale`, `output_zero_point`, `w_scale` and `w_zero_point` are Distiller's, for reading.
Knows nothing about models or statistics files.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from distiller.errors import QuantizationError
from distiller.quantization import affine
from distiller.quantization.activation_quant import ActivationQuantizer, QuantSettings
from distiller.quantization.clipping import clipped_range, tensor_stats

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class RangeLinearQuantWrapper(nn.Module, ABC):
    """A module whose inputs and output are quantized. Works in evaluation mode only.

    Args:
        wrapped_module: the module.
        name: its name in the model, for messages.
        output_quant: quantizer of its output; None leaves the output as it is.
        bits_accum: width of the accumulator, which saturates; 2 to 64.
        scale_approx_mult_bits: width of the integer multiplier by which hardware rescales the
            accumulator; None for exact factors.

    Attributes:
        input_grids: the quantizer of each input, its own or that of the layer it comes from.
    """

    quantizes_inputs = True

    def __init__(
        self,
        wrapped_module: nn.Module,
        name: str,
        output_quant: ActivationQuantizer | None,
        bits_accum: int = 32,
        scale_approx_mult_bits: int | None = None,
    ) -> None:
        super().__init__()
        self.wrapped_module = wrapped_module
        self.name = name
        self.output_quant = output_quant
        self.bits_accum = bits_accum
        self.scale_approx_mult_bits = scale_approx_mult_bits
        self.inputs_quant = nn.ModuleDict()
        self.input_grids: dict[int, ActivationQuantizer] = {}  # not registered: most belong to other layers
        self.train(wrapped_module.training)

    def connect(
        self, own: Mapping[int, ActivationQuantizer], others: Mapping[int, ActivationQuantizer]
    ) -> None:
        """Tell the wrapper where its inputs come from, once.

        Args:
            own: by index of the argument, quantizers that are to be applied here.
            others: quantizers, of other layers, that were applied already.
        """
        self.inputs_quant.update({str(index): quantizer for index, quantizer in own.items()})
        self.inputs_quant.train(self.training)
        self.input_grids = {**others, **own}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The quantized module's output for its inputs, quantized or not."""
        if self.training:
            raise QuantizationError(
                f"{self.name}: a quantized model works in evaluation mode only; call model.eval()"
            )
        if self.inputs_quant:
            inputs = list(args)
            for key, quantizer in self.inputs_quant.items():
                inputs[int(key)] = quantizer(inputs[int(key)])
            args = tuple(inputs)
        output = self.compute(*args, **kwargs)
        return output if self.output_quant is None else self.output_quant(output)

    @abstractmethod
    def compute(self, *args: Any, **kwargs: Any) -> Tensor:
        """The output before it is quantized, from quantized inputs."""

    def accum_scale(self) -> Tensor:
        """The real value of one unit of the accumulator: the product of the inputs' scales."""
        scale = torch.ones(())
        for grid in self.input_grids.values():
            scale = grid.scale * scale
        return scale

    def accumulator_bits(self, terms: int = 1) -> int | None:
        """How wide an accumulator has to be that never saturates; None where nothing is accumulated.

        Args:
            terms: products in one sum of a matrix product; other layers know theirs.
        """
        return None

    def saturated(self, accumulator: Tensor, largest: float) -> Tensor:
        """The accumulator's values as far as `bits_accum` bits can hold them.

        Args:
            accumulator: real values.
            largest: the largest absolute value that can occur, in units of `accum_scale`.
        """
        limit = 2 ** (self.bits_accum - 1)
        if largest < limit:
            return accumulator
        scale = self.accum_scale().double()  # float32 knows neither limit - 1 nor its product with the scale
        lowest, highest = (-limit * scale).to(accumulator.dtype), ((limit - 1) * scale).to(accumulator.dtype)
        return torch.clamp(accumulator, lowest, highest)

    def rescaled(self, values: Tensor, scale: Tensor | None = None) -> Tensor:
        """Values as the approximated change of scale to the output's makes them.

        Args:
            values: real values.
            scale: the scale they are at; None for `accum_scale`.
        """
        if self.scale_approx_mult_bits is None or self.output_quant is None:
            return values
        factor = (self.accum_scale() if scale is None else scale) / self.output_quant.scale
        return values * (affine.approximate_scale(factor, self.scale_approx_mult_bits) / factor)

    @property
    def output_quant_settings(self) -> QuantSettings | None:
        """How the output is quantized; None when it is not."""
        return None if self.output_quant is None else self.output_quant.settings

    @property
    def output_scale(self) -> Tensor | None:
        """Distiller's convention; of the last batch where scales are dynamic; None when not quantized."""
        return None if self.output_quant is None else self._output_params()[0]

    @property
    def output_zero_point(self) -> Tensor | None:
        """Distiller's convention, as `output_scale`."""
        return None if self.output_quant is None else self._output_params()[1]

    def named_linear_quant_params(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the fixed scales and zero points, in Distiller's convention."""
        if self.output_quant is not None and not self.output_quant.is_dynamic:
            yield from zip(("output_scale", "output_zero_point"), self._output_params(), strict=True)

    def _output_params(self) -> tuple[Tensor, Tensor]:
        assert self.output_quant is not None
        return affine.to_distiller(self.output_quant.scale, self.output_quant.zero_point)


class RangeLinearQuantParamLayerWrapper(RangeLinearQuantWrapper):
    """A convolution (1d to 3d, also transposed) or linear layer with quantized weights.

    The weight is rounded to its grid here, once; the bias to the accumulator's grid when the input's
    scale is known (each batch, where that is dynamic). Without `output_quant` only the weight is quantized.

    Args:
        wrapped_module: the layer; it gets new parameters.
        name: its name in the model, for messages.
        weight: how its weight is quantized.
        output_quant: quantizer of its output, None to leave inputs, output and bias as they are.
        bits_bias: width of the bias; None leaves it in floating point.
        bits_accum: as in the base class.
        scale_approx_mult_bits: as in the base class.
        save_fp_weights: keep the full-precision weight and bias as buffers `float_weight` and `float_bias`
            of the layer.

    Attributes:
        weight_scale: scalar, or (output channels,).
        weight_zero_point: the same shape, int32.

    Raises:
        QuantizationError: the weight is parametrized or not finite.
    """

    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(
        self,
        wrapped_module: nn.Module,
        name: str,
        weight: QuantSettings,
        output_quant: ActivationQuantizer | None,
        bits_bias: int | None = None,
        bits_accum: int = 32,
        scale_approx_mult_bits: int | None = None,
        save_fp_weights: bool = False,
    ) -> None:
        super().__init__(wrapped_module, name, output_quant, bits_accum, scale_approx_mult_bits)
        if parametrize.is_parametrized(wrapped_module):
            raise QuantizationError(
                f"{name}: its parameters are parametrized and cannot be replaced; "
                "call torch.nn.utils.parametrize.remove_parametrizations first"
            )
        self.wts_quant_settings = weight
        self.bits_bias = bits_bias
        if save_fp_weights:
            wrapped_module.register_buffer("float_weight", self._weight.detach().clone())
            if self._bias is not None:
                wrapped_module.register_buffer("float_bias", self._bias.detach().clone())
        self.register_buffer("weight_scale", torch.ones(()))
        self.register_buffer("weight_zero_point", torch.zeros((), dtype=torch.int32))
        self._largest: float | None = None
        self.register_load_state_dict_post_hook(_forget_largest)
        self.quantize_weight()

    def quantize_weight(self) -> None:
        """Choose the weight's scale and round the weight, from `float_weight` where there is one."""
        settings, layer = self.wts_quant_settings, self.wrapped_module
        source = getattr(layer, "float_weight", self._weight).detach()
        rows = filters_first(source, layer)
        where = f"{self.name} weight"
        lo, hi = clipped_range(
            tensor_stats(rows, settings.clip_mode, settings.per_channel),
            settings.clip_mode,
            settings.num_bits,
            settings.quant_mode.is_symmetric,
            settings.clip_n_stds,
            where=where,
        )
        try:
            scale, zero_point = affine.scale_and_zero_point(lo, hi, settings.num_bits, settings.quant_mode)
        except QuantizationError as error:
            raise QuantizationError(f"{where}: {error}") from error
        axis = 0 if settings.per_channel else None
        rounded = affine.fake_quantize(rows, scale, zero_point, *settings.qrange, axis=axis)
        layer.weight = nn.Parameter(filters_back(rounded, layer), self._weight.requires_grad)
        self.weight_scale, self.weight_zero_point, self._largest = scale, zero_point, None
        self._quantize_bias()

    def connect(
        self, own: Mapping[int, ActivationQuantizer], others: Mapping[int, ActivationQuantizer]
    ) -> None:
        """As in the base class; a bias whose accumulator's scale is thereby fixed is rounded to it."""
        super().connect(own, others)
        if self.output_quant is not None and 0 not in self.input_grids:
            raise QuantizationError(
                f"{self.name}: its input was not seen; call it with a tensor as its positional argument"
            )
        self._quantize_bias()

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """The accumulator's real values, before ReLU and quantization."""
        if self.output_quant is None:
            return self.wrapped_module(x)
        if self.input_grids[0].is_dynamic and self._bias is not None:
            bias = {"bias": self._rounded_bias()}
            accumulator = torch.func.functional_call(self.wrapped_module, bias, (x,))
        else:
            accumulator = self.wrapped_module(x)
        accumulator = self.saturated(accumulator, self._largest_sum())
        return self.rescaled(accumulator)

    def accumulator_bits(self, terms: int = 1) -> int | None:
        """As in the base class; without the bias where its scale is that of each batch."""
        if self.output_quant is None:
            return None
        return bits_to_hold(self._largest_sum() if self._has_fixed_scale else self._largest_products())

    def accum_scale(self) -> Tensor:
        """Input scale times weight scale; of per-channel weights in a shape that fits the output."""
        scale = super().accum_scale() * self.weight_scale
        return scale.reshape(-1, *[1] * (self._weight.dim() - 2)) if scale.dim() else scale

    @property
    def w_scale(self) -> Tensor:
        """Scale of the weight in Distiller's convention, scalar or (output channels,)."""
        return affine.to_distiller(self.weight_scale, self.weight_zero_point)[0]

    @property
    def w_zero_point(self) -> Tensor:
        """Zero point of the weight in Distiller's convention."""
        return affine.to_distiller(self.weight_scale, self.weight_zero_point)[1]

    def named_linear_quant_params(self) -> Iterator[tuple[str, Tensor]]:
        """Also those of the weight."""
        yield from super().named_linear_quant_params()
        yield "w_scale", self.w_scale
        yield "w_zero_point", self.w_zero_point

    @property
    def has_fixed_bias(self) -> bool:
        """Whether there is a bias and it was rounded to a fixed grid."""
        return self._bias is not None and self.bits_bias is not None and self._has_fixed_scale

    @property
    def _has_fixed_scale(self) -> bool:
        """Whether the accumulator's scale is known beforehand."""
        known = self.input_grids.get(0)
        return self.output_quant is not None and known is not None and not known.is_dynamic

    @property
    def _weight(self) -> Tensor:
        return self.wrapped_module.weight  # type: ignore[return-value]

    @property
    def _bias(self) -> Tensor | None:
        return self.wrapped_module.bias  # type: ignore[return-value]

    def _quantize_bias(self) -> None:
        if self.has_fixed_bias:
            assert self._bias is not None
            self.wrapped_module.bias = nn.Parameter(self._rounded_bias(), self._bias.requires_grad)
        self._largest = None
        if self._has_fixed_scale:
            self._largest_sum()

    def _rounded_bias(self) -> Tensor:
        """The bias on the accumulator's grid, (output channels,)."""
        assert self._bias is not None
        if self.bits_bias is None:
            return self._bias
        scale = self.accum_scale().flatten()
        qmin, qmax = affine.get_quantized_range(self.bits_bias)
        bias: Tensor = getattr(self.wrapped_module, "float_bias", self._bias).detach()
        return affine.fake_quantize(bias, scale, torch.zeros_like(scale), qmin, qmax)

    def _largest_sum(self) -> float:
        """The largest |accumulator| that can occur, in its units; infinite with a bias of unknown scale."""
        if self._bias is not None and not self._has_fixed_scale:
            return float("inf")
        if self._largest is None:
            self._largest = self._largest_products(with_bias=True)
        return self._largest

    def _largest_products(self, with_bias: bool = False) -> float:
        """The largest |sum of products| that can occur, with the (fixed) bias if that is to be added."""
        rows = filters_first(self._weight.detach(), self.wrapped_module).flatten(1).double()
        largest = rows.abs().sum(1) / self.weight_scale * self.input_grids[0].largest_level
        if with_bias and self._bias is not None:
            largest = largest + (self._bias.detach().double() / self.accum_scale().flatten()).abs()
        return float(largest.max())


class RangeLinearFakeQuantWrapper(RangeLinearQuantWrapper):
    """Any module, computed in floating point, with its output quantized.

    Args:
        wrapped_module: the module.
        name: its name in the model, for messages.
        output_quant: quantizer of its output.
        quantize_inputs: quantize its inputs too.
    """

    def __init__(
        self,
        wrapped_module: nn.Module,
        name: str,
        output_quant: ActivationQuantizer,
        quantize_inputs: bool = False,
    ) -> None:
        super().__init__(wrapped_module, name, output_quant)
        self.quantizes_inputs = quantize_inputs

    def compute(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output in floating point."""
        return self.wrapped_module(*args, **kwargs)


def bits_to_hold(largest: float) -> int:
    """The width of a signed integer that holds every value up to +-`largest`."""
    return math.frexp(largest)[1] + 1


def filters_first(weight: Tensor, layer: nn.Module) -> Tensor:
    """A layer's weight as (output channels, ...): transposed convolutions hold them in dimension 1."""
    if not isinstance(layer, _TRANSPOSED):
        return weight
    return weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)


def filters_back(rows: Tensor, layer: nn.Module) -> Tensor:
    """The inverse of `filters_first`."""
    if not isinstance(layer, _TRANSPOSED):
        return rows
    return rows.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1).contiguous()


def _forget_largest(wrapper: RangeLinearQuantParamLayerWrapper, _incompatible_keys: Any) -> None:
    wrapper._largest = None
