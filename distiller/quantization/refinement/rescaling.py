"""The weights of a quantized model at the scales of least mean squared error.

Knows nothing about data.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from distiller.quantization.ptq_layers import filters_first
from distiller.quantization.refinement.float_twin import LayerPair, layer_pairs
from distiller.quantization.refinement.quantized_layer import round_to_nearest
from distiller.quantization.refinement.weight_scales import mse_scale


@dataclass(frozen=True, slots=True)
class RescaledWeight:
    """What became of one layer's weight.

    Attributes:
        name: the layer.
        error_before: mean squared error of its weight.
        error_after: with the new scale.
    """

    name: str
    error_before: float
    error_after: float


def rescale_weights(float_model: nn.Module, quantized_model: nn.Module) -> tuple[RescaledWeight, ...]:
    """Round all quantized weights anew, to nearest, at the scales that `mse_scale` finds for them.

    Args:
        float_model: in full precision, batch norms folded: `float_twin`.
        quantized_model: the same, prepared by `PostTrainLinearQuantizer`; changed in place.

    Returns:
        What became of each layer, in the model's order.

    Raises:
        QuantizationError: the models are not twins, or a weight is not finite.
    """
    return tuple(rescale_layer(pair) for pair in layer_pairs(float_model, quantized_model).values())


def rescale_layer(pair: LayerPair) -> RescaledWeight:
    """`rescale_weights` of one layer."""
    settings = pair.wrapper.wts_quant_settings
    weight: Tensor = pair.float_layer.weight.detach()  # type: ignore[assignment,union-attr]
    rows = filters_first(weight, pair.float_layer)
    scale, zero_point = mse_scale(rows, settings.num_bits, settings.quant_mode, settings.per_channel)
    before = _error(pair, weight)
    round_to_nearest(pair.wrapper, weight, scale, zero_point)
    return RescaledWeight(pair.name, before, _error(pair, weight))


def _error(pair: LayerPair, weight: Tensor) -> float:
    return float((pair.layer.weight.detach() - weight).square().mean())  # type: ignore[operator]
