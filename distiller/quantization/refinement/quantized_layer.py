"""Changing what a quantized layer holds: its weight on a grid, and its bias.

Knows nothing about where better values come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from distiller.quantization import affine
from distiller.quantization.ptq_layers import (
    RangeLinearQuantParamLayerWrapper,
    filters_back,
    filters_first,
)


@dataclass(frozen=True, slots=True)
class LayerState:
    """What a quantized layer holds.

    Attributes:
        weight: on its grid, in the layer's shape.
        scale: scalar or (output channels,).
        zero_point: the same shape.
        bias: on the accumulator's grid, where that is known; None if there is none.
        float_bias: the one that `bias` was rounded from, where the layer keeps it.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    float_bias: Tensor | None


def layer_state(wrapper: RangeLinearQuantParamLayerWrapper) -> LayerState:
    """A copy of what the layer holds."""
    layer: Any = wrapper.wrapped_module
    return LayerState(
        _copy(layer.weight),
        _copy(wrapper.weight_scale),
        _copy(wrapper.weight_zero_point),
        _copy(layer.bias) if layer.bias is not None else None,
        _copy(layer.float_bias) if hasattr(layer, "float_bias") else None,
    )


def restore_layer(wrapper: RangeLinearQuantParamLayerWrapper, state: LayerState) -> None:
    """Give the layer what it held."""
    layer: Any = wrapper.wrapped_module
    layer.bias = None if state.bias is None else nn.Parameter(state.bias.clone(), _trains(layer))
    if state.float_bias is not None:
        layer.float_bias = state.float_bias.clone()
    set_weight(wrapper, state.weight, state.scale, state.zero_point)


def set_weight(
    wrapper: RangeLinearQuantParamLayerWrapper, weight: Tensor, scale: Tensor, zero_point: Tensor
) -> None:
    """Give the layer a weight on a grid; its bias is rounded to the accumulator's grid that comes with it.

    Args:
        wrapper: the layer.
        weight: values of the grid, in the layer's shape.
        scale: of the shape of `wrapper.weight_scale`.
        zero_point: the same.
    """
    layer: Any = wrapper.wrapped_module
    layer.weight = nn.Parameter(weight.to(layer.weight, copy=True), _trains(layer))
    wrapper.weight_scale = scale.to(wrapper.weight_scale).clone()
    wrapper.weight_zero_point = zero_point.to(wrapper.weight_zero_point).clone()
    wrapper.readjust()


def round_to_nearest(
    wrapper: RangeLinearQuantParamLayerWrapper, weight: Tensor, scale: Tensor, zero_point: Tensor
) -> None:
    """`set_weight` of a weight in full precision, rounded to the nearest values of the grid."""
    layer, settings = wrapper.wrapped_module, wrapper.wts_quant_settings
    axis = 0 if settings.per_channel else None
    rows = filters_first(weight.detach(), layer)
    rounded = affine.fake_quantize(rows, scale, zero_point, *settings.qrange, axis=axis)
    set_weight(wrapper, filters_back(rounded, layer), scale, zero_point)


def add_to_bias(wrapper: RangeLinearQuantParamLayerWrapper, correction: Tensor) -> None:
    """Add to the layer's bias, or make it one.

    Args:
        wrapper: the layer; a bias with a fixed grid is rounded to it.
        correction: (output channels,).
    """
    layer: Any = wrapper.wrapped_module
    kept = getattr(layer, "float_bias", None)
    before = kept if kept is not None else layer.bias
    correction = correction.to(layer.weight)
    bias = correction if before is None else before.detach() + correction
    if kept is not None or (before is None and hasattr(layer, "float_weight")):
        layer.register_buffer("float_bias", bias.clone())
    layer.bias = nn.Parameter(bias, _trains(layer))
    wrapper.readjust()


def bias_as_matrices(layer: Any, matrices: Tensor) -> Tensor:
    """The layer's bias as (groups, 1, outputs) like the matrices of its weight; zeros if it has none."""
    groups, outputs, _ = matrices.shape
    if layer.bias is None:
        return matrices.new_zeros(groups, 1, outputs)
    return layer.bias.detach().to(matrices).reshape(groups, 1, outputs)


def _copy(value: Any) -> Tensor:
    return value.detach().clone()


def _trains(layer: Any) -> bool:
    return layer.weight.requires_grad
