"""Layers with parameters after post-training quantization: convolutions, linear layers, embeddings.

Integer hardware computes, for x and w on their grids,

    acc = sum (q_x - z_x)(q_w - z_w) + q_bias            accumulated in `bits_accum` bits
    q_y = clamp(round(acc * s_x * s_w / s_y) + z_y)      after the ReLU, where one is fused

Here the same numbers are computed in floating point, with the weights rounded to their grid
once, when the model is prepared. Scales and zero points are in PyTorch's convention; only
`output_scale`, `output_zero_point`, `w_scale` and `w_zero_point` are Distiller's, for reading.
Knows nothing about models or statistics files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distiller.errors import QuantizationError
from distiller.quantization import affine
from distiller.quantization.activation_quant import ActivationQuantizer, QuantSettings
from distiller.quantization.clipping import ClipMode
from distiller.quantization.ptq_weights import QuantizedWeightWrapper, filters_back, filters_first
from distiller.quantization.ptq_wrapper import RangeLinearFakeQuantWrapper, RangeLinearQuantWrapper

__all__ = [
    "RangeLinearEmbeddingWrapper",
    "RangeLinearFakeQuantWrapper",
    "RangeLinearQuantParamLayerWrapper",
    "RangeLinearQuantWrapper",
    "bits_to_hold",
    "filters_back",
    "filters_first",
]


class RangeLinearQuantParamLayerWrapper(QuantizedWeightWrapper):
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
        is_fake: as in the base class; the bias then stays in floating point.
        precision: as in the base class.

    Raises:
        QuantizationError: the weight is parametrized or not finite.
    """

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
        *,
        is_fake: bool = False,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            wrapped_module,
            name,
            weight,
            output_quant,
            save_fp_weights,
            bits_accum=bits_accum,
            scale_approx_mult_bits=scale_approx_mult_bits,
            is_fake=is_fake,
            precision=precision,
        )
        self.bits_bias = None if is_fake else bits_bias
        self._largest: float | None = None
        self.register_load_state_dict_post_hook(_forget_largest)

    def connect(
        self, own: Mapping[int, ActivationQuantizer], others: Mapping[int, ActivationQuantizer]
    ) -> None:
        """As in the base class; a bias whose accumulator's scale is thereby fixed is rounded to it."""
        super().connect(own, others)
        if self.output_quant is not None and 0 not in self.input_grids:
            raise QuantizationError(
                f"{self.name}: its input was not seen; call it with a tensor as its positional argument"
            )
        self.readjust()

    def readjust(self) -> None:
        """Round the bias to the accumulator's grid, from `float_bias` where there is one."""
        if self.has_fixed_bias:
            assert self.bias is not None
            self.wrapped_module.bias = nn.Parameter(self._rounded_bias(), self.bias.requires_grad)
        self._largest = None
        if self._has_fixed_scale:
            self._largest_sum()

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """The accumulator's real values, before ReLU and quantization."""
        if self.output_quant is None:
            return self.wrapped_module(x)
        if self.input_grids[0].is_dynamic and self.bias is not None:
            bias = {"bias": self._rounded_bias()}
            accumulator = torch.func.functional_call(self.wrapped_module, bias, (x,))
        else:
            accumulator = self.wrapped_module(x)
        accumulator = self.saturated(accumulator, self._largest_sum())
        return self.rescaled(accumulator)

    def accumulator_bits(self, terms: int = 1) -> int | None:
        """As in the base class; without the bias where its scale is that of each batch."""
        if self.output_quant is None or self.is_fake:
            return None
        return bits_to_hold(self._largest_sum() if self._has_fixed_scale else self._largest_products())

    def accum_scale(self) -> Tensor:
        """Input scale times weight scale; of per-channel weights in a shape that fits the output."""
        scale = super().accum_scale() * self.weight_scale
        return scale.reshape(-1, *[1] * (self.weight.dim() - 2)) if scale.dim() else scale

    @property
    def has_fixed_bias(self) -> bool:
        """Whether there is a bias and it was rounded to a fixed grid."""
        return self.bias is not None and self.bits_bias is not None and self._has_fixed_scale

    @property
    def _has_fixed_scale(self) -> bool:
        """Whether the accumulator's scale is known beforehand."""
        known = self.input_grids.get(0)
        return self.output_quant is not None and known is not None and not known.is_dynamic

    def _rounded_bias(self) -> Tensor:
        """The bias on the accumulator's grid, (output channels,)."""
        assert self.bias is not None
        if self.bits_bias is None:
            return self.bias
        scale = self.accum_scale().flatten()
        qmin, qmax = affine.get_quantized_range(self.bits_bias)
        bias: Tensor = getattr(self.wrapped_module, "float_bias", self.bias).detach()
        return affine.fake_quantize(bias, scale, torch.zeros_like(scale), qmin, qmax)

    def _largest_sum(self) -> float:
        """The largest |accumulator| that can occur, in its units; infinite with a bias of unknown scale."""
        if self.bias is not None and not self._has_fixed_scale:
            return float("inf")
        if self._largest is None:
            self._largest = self._largest_products(with_bias=True)
        return self._largest

    def _largest_products(self, with_bias: bool = False) -> float:
        """The largest |sum of products| that can occur, with the (fixed) bias if that is to be added."""
        rows = filters_first(self.weight.detach(), self.wrapped_module).flatten(1).double()
        largest = rows.abs().sum(1) / self.weight_scale * self.input_grids[0].largest_level
        if with_bias and self.bias is not None:
            largest = largest + (self.bias.detach().double() / self.accum_scale().flatten()).abs()
        return float(largest.max())


class RangeLinearEmbeddingWrapper(QuantizedWeightWrapper):
    """An embedding with a quantized weight, one scale in all: what it returns is on the weight's grid.

    Args:
        wrapped_module: the embedding; it gets a new weight.
        name: its name in the model, for messages.
        weight: how its weight is quantized.
        has_quantized_output: whether layers that read it may take its output for quantized; `output_quant` is
            then the weight's grid.
        save_fp_weights: keep the full-precision weight as buffer `float_weight` of the embedding.
        is_fake: as in the base class; an embedding computes nothing.
        precision: as in the base class.

    Raises:
        QuantizationError: the weight is parametrized or not finite.
    """

    def __init__(
        self,
        wrapped_module: nn.Embedding,
        name: str,
        weight: QuantSettings,
        has_quantized_output: bool,
        save_fp_weights: bool = False,
        *,
        is_fake: bool = False,
        precision: torch.dtype | None = None,
    ) -> None:
        weight = dataclasses.replace(weight, per_channel=False)
        super().__init__(
            wrapped_module, name, weight, None, save_fp_weights, is_fake=is_fake, precision=precision
        )
        if has_quantized_output:
            settings = dataclasses.replace(weight, clip_mode=ClipMode.NONE, clip_n_stds=None)
            self.output_quant = ActivationQuantizer(settings, {"min": 0.0, "max": 0.0}, f"{name} output")
            self.output_quant.train(self.training)
        self.readjust()

    def readjust(self) -> None:
        """Let the output's grid be that of the weight."""
        if self.output_quant is not None:
            self.output_quant.set_grid(self.weight_scale, self.weight_zero_point)

    def adjustable_grids(self) -> dict[str, Any]:
        """That of the weight alone."""
        return {"w": super().adjustable_grids()["w"]}

    def compute(self, indices: Tensor) -> Tensor:  # type: ignore[override]
        """The rows of the weight."""
        return self.wrapped_module(indices)


def bits_to_hold(largest: float) -> int:
    """The width of a signed integer that holds every value up to +-`largest`."""
    return math.frexp(largest)[1] + 1


def _forget_largest(wrapper: RangeLinearQuantParamLayerWrapper, _incompatible_keys: Any) -> None:
    wrapper._largest = None
