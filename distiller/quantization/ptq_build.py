"""One layer: which wrapper takes its place in post-training quantization, or why none does.

Knows nothing about the model that the layer is part of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from distiller.modules import BatchMatmul, Concat, EltwiseAdd, EltwiseMult, Matmul
from distiller.quantization.activation_quant import ActivationQuantizer
from distiller.quantization.clipping import ClipMode
from distiller.quantization.dataflow import LayerUse
from distiller.quantization.ptq_elementwise import (
    RangeLinearQuantConcatWrapper,
    RangeLinearQuantEltwiseAddWrapper,
    RangeLinearQuantEltwiseMultWrapper,
    RangeLinearQuantMatmulWrapper,
)
from distiller.quantization.ptq_layers import (
    RangeLinearFakeQuantWrapper,
    RangeLinearQuantParamLayerWrapper,
    RangeLinearQuantWrapper,
)
from distiller.quantization.ptq_prepare import LayerStats
from distiller.quantization.ptq_settings import LayerSettings

PASSED_OVER = (nn.Identity, nn.modules.dropout._DropoutNd)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PARAM_LAYERS = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)
_ELEMENTWISE: dict[type[nn.Module], type[RangeLinearQuantWrapper]] = {
    Concat: RangeLinearQuantConcatWrapper,
    EltwiseAdd: RangeLinearQuantEltwiseAddWrapper,
    EltwiseMult: RangeLinearQuantEltwiseMultWrapper,
    Matmul: RangeLinearQuantMatmulWrapper,
    BatchMatmul: RangeLinearQuantMatmulWrapper,
}
_NOT_SUPPORTED = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.TransformerEncoderLayer)
_NEEDS_STATS = (Concat, EltwiseAdd, EltwiseMult)


def kind_of(layer: nn.Module) -> str:
    """`param`, `elementwise` or `other`: which overrides the layer takes."""
    if isinstance(layer, _PARAM_LAYERS):
        return "param"
    return "elementwise" if isinstance(layer, tuple(_ELEMENTWISE)) else "other"


def why_in_float(layer: nn.Module, is_dynamic: bool) -> str | None:
    """Why no wrapper can take the layer's place, or None if one can."""
    if isinstance(layer, _NOT_SUPPORTED):
        return "layers of their kind cannot be quantized"
    if is_dynamic and isinstance(layer, _NEEDS_STATS):
        return "without statistics the scale of their output is not known beforehand"
    return None


def why_left_alone(layer: nn.Module, use: LayerUse | None, is_dynamic: bool) -> str | None:
    """As `why_in_float`, for a layer of which it is known how the model runs it (None: not at all)."""
    if use is None:
        return "the model does not call them in evaluation"
    if not use.returns_tensor:
        return "they return something else than one tensor of real numbers"
    return why_in_float(layer, is_dynamic)


def build_layer(
    layer: nn.Module,
    name: str,
    settings: LayerSettings,
    stats: LayerStats,
    bits_accum: int,
    save_fp_weights: bool,
) -> nn.Module | None:
    """What takes the layer's place; None if nothing of it is to be quantized."""
    kind = kind_of(layer)
    has_quantized_weight = kind == "param" and settings.bits.wts is not None
    if settings.bits.acts is None and not has_quantized_weight:
        return None
    output = None
    if settings.bits.acts is not None:
        output = ActivationQuantizer(settings.output(), stats.output(name), f"{name} output")
    approximation = settings.scale_approx_mult_bits
    if has_quantized_weight:
        return RangeLinearQuantParamLayerWrapper(
            layer,
            name,
            settings.weight(),
            output,
            settings.bits.bias,
            bits_accum,
            approximation,
            save_fp_weights,
        )
    if kind == "elementwise":
        wrapper = next(cls for base, cls in _ELEMENTWISE.items() if isinstance(layer, base))
        return wrapper(layer, name, output, bits_accum, approximation)
    if _takes_spread_of_its_input(layer, settings):
        output = _relu_output(name, settings, stats)
    assert output is not None
    return RangeLinearFakeQuantWrapper(layer, name, output, settings.quantize_inputs or kind == "param")


def _takes_spread_of_its_input(layer: nn.Module, settings: LayerSettings) -> bool:
    return isinstance(layer, nn.ReLU) and settings.clip_acts in (ClipMode.GAUSS, ClipMode.LAPLACE)


def _relu_output(name: str, settings: LayerSettings, stats: LayerStats) -> ActivationQuantizer:
    """Half of the distribution before the ReLU: what is behind it is not distributed like that."""
    output, before = stats.output(name), stats.input(name, 0)
    entry: Mapping[str, Any] | None = None
    if output is not None and before is not None:
        spread = {key: before[key] for key in ("mean", "std", "b") if key in before}
        entry = {**output, "b": None, **spread}
    half = dataclasses.replace(settings.output(), clip_half_range=True)
    return ActivationQuantizer(half, entry, f"{name} output")
