"""One layer: which wrapper takes its place in post-training quantization, or why none does.

Knows nothing about the model that the layer is part of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from distiller.modules import (
    BatchMatmul,
    Chunk,
    Concat,
    EltwiseAdd,
    EltwiseMult,
    EltwiseSub,
    Matmul,
    Split,
    Stack,
)
from distiller.quantization.activation_quant import ActivationQuantizer
from distiller.quantization.clipping import ClipMode
from distiller.quantization.dataflow import LayerUse
from distiller.quantization.ptq_elementwise import (
    RangeLinearQuantConcatWrapper,
    RangeLinearQuantEltwiseAddWrapper,
    RangeLinearQuantEltwiseMultWrapper,
    RangeLinearQuantEltwiseSubWrapper,
    RangeLinearQuantMatmulWrapper,
    RangeLinearQuantStackWrapper,
)
from distiller.quantization.ptq_layers import RangeLinearEmbeddingWrapper, RangeLinearQuantParamLayerWrapper
from distiller.quantization.ptq_precision import PRECISIONS, FPWrapper
from distiller.quantization.ptq_prepare import LayerStats
from distiller.quantization.ptq_settings import LayerSettings
from distiller.quantization.ptq_wrapper import RangeLinearFakeQuantWrapper, RangeLinearQuantWrapper

PASSED_OVER = (nn.Identity, nn.modules.dropout._DropoutNd, Chunk, Split)
"""Layers whose results are parts of what they are given: whoever quantized that quantized them."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PARAM_LAYERS = (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)
_ELEMENTWISE: dict[type[nn.Module], type[RangeLinearQuantWrapper]] = {
    Concat: RangeLinearQuantConcatWrapper,
    Stack: RangeLinearQuantStackWrapper,
    EltwiseAdd: RangeLinearQuantEltwiseAddWrapper,
    EltwiseSub: RangeLinearQuantEltwiseSubWrapper,
    EltwiseMult: RangeLinearQuantEltwiseMultWrapper,
    Matmul: RangeLinearQuantMatmulWrapper,
    BatchMatmul: RangeLinearQuantMatmulWrapper,
}
_NEEDS_STATS = (Concat, Stack, EltwiseAdd, EltwiseSub, EltwiseMult)
_NOT_SUPPORTED: tuple[tuple[tuple[type[nn.Module], ...], str], ...] = (
    ((nn.LSTM,), "they are quantized piece by piece, after convert_model_to_distiller_lstm(model)"),
    ((nn.MultiheadAttention,), "they are quantized piece by piece, after to_modules(model, dummy_input)"),
    ((nn.EmbeddingBag,), "sums and means of a weight's rows are not on the weight's grid"),
    ((nn.RNNBase, nn.RNNCellBase, nn.TransformerEncoderLayer), "layers of their kind cannot be quantized"),
)


def kind_of(layer: nn.Module) -> str:
    """`param`, `embedding`, `elementwise` or `other`: which overrides the layer takes."""
    if isinstance(layer, _PARAM_LAYERS):
        return "param"
    if isinstance(layer, nn.Embedding):
        return "embedding"
    return "elementwise" if isinstance(layer, tuple(_ELEMENTWISE)) else "other"


def why_not_supported(layer: nn.Module) -> str | None:
    """Why layers of its kind cannot be quantized, or None if they can."""
    for kinds, reason in _NOT_SUPPORTED:
        if isinstance(layer, kinds):
            return reason
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "their max_norm changes the weight while they run"
    return None


def why_left_alone(layer: nn.Module, use: LayerUse | None, is_dynamic: bool) -> str | None:
    """Why no wrapper can take the layer's place, or None if one can.

    Args:
        layer: the layer.
        use: how the model runs it; None: not at all.
        is_dynamic: whether there are no statistics.
    """
    if use is None:
        return "the model does not call them in evaluation"
    if (reason := why_not_supported(layer)) is not None:
        return reason
    if not use.returns_tensor:
        return "they return something else than one tensor of real numbers"
    if is_dynamic and isinstance(layer, _NEEDS_STATS):
        return "without statistics the scale of their output is not known beforehand"
    return None


def is_on_weights_grid(layer: nn.Module, settings: LayerSettings) -> bool:
    """Whether the layer returns rows of its quantized weight, for which it needs no statistics."""
    return isinstance(layer, nn.Embedding) and settings.bits.wts is not None


def build_layer(
    layer: nn.Module,
    name: str,
    settings: LayerSettings,
    stats: LayerStats,
    bits_accum: int,
    save_fp_weights: bool,
    keeps_grid: bool = False,
) -> nn.Module | None:
    """What takes the layer's place; None if nothing of it is to be quantized.

    Args:
        layer: the layer.
        name: its name, for messages.
        settings: how it is quantized.
        stats: of all layers.
        bits_accum: width of accumulators.
        save_fp_weights: keep full-precision weights.
        keeps_grid: whether its output stays on the grid of its input.
    """
    kind, acts = kind_of(layer), settings.bits.acts
    if settings.fpq_module is not None and settings.is_float:
        return FPWrapper(layer, settings.fpq_module)
    has_quantized_weight = kind in ("param", "embedding") and settings.bits.wts is not None
    if acts is None and not has_quantized_weight:
        return None
    precision = None if settings.fpq_module is None else PRECISIONS[settings.fpq_module]
    how: dict[str, Any] = {"is_fake": settings.fake, "precision": precision}
    if isinstance(layer, nn.Embedding) and has_quantized_weight:
        return RangeLinearEmbeddingWrapper(
            layer, name, settings.weight(), acts is not None, save_fp_weights, **how
        )
    if keeps_grid:
        return RangeLinearFakeQuantWrapper(layer, name, None, precision=precision)
    output = None
    if acts is not None:
        output = ActivationQuantizer(settings.output(), stats.output(name), f"{name} output")
    approximation = None if settings.fake else settings.scale_approx_mult_bits
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
            **how,
        )
    if kind == "elementwise":
        wrapper = next(cls for base, cls in _ELEMENTWISE.items() if isinstance(layer, base))
        return wrapper(layer, name, output, bits_accum, approximation, **how)
    if _takes_spread_of_its_input(layer, settings):
        output = _relu_output(name, settings, stats)
    assert output is not None
    return RangeLinearFakeQuantWrapper(
        layer, name, output, settings.quantize_inputs or kind == "param", precision
    )


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
