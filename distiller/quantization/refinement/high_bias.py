"""High biases absorbed by the next layer: activations that are always far above zero moved towards it.

For c >= 0, f(y) = f(y - c) + c wherever y >= c, for f = ReLU. So c goes from the first bias into the second:

    b1' = b1 - c        b2' = b2 + W2 c        c = max(0, mean - 3 std)

of a channel whose values a batch norm, folded, gave that mean and standard deviation.
Knows nothing about scales of weights.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
arXiv 1906.04721, section 4.1. Unlike there nothing is absorbed by a layer that pads with zeros: they are
not shifted, and the outputs at the border would be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from distiller.quantization.refinement.channel_scaling import response_to
from distiller.quantization.refinement.equalization_pairs import ChannelPair
from distiller.quantization.refinement.folded_norms import keep_norm_statistics, norm_statistics
from distiller.quantization.refinement.structure import add_bias

_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_STDS = 3


def absorb_high_bias(
    pairs: Sequence[ChannelPair], modules: Mapping[str, nn.Module]
) -> tuple[dict[str, Tensor], dict[str, str], tuple[str, ...]]:
    """Absorb what can be, in the order of `pairs`.

    Args:
        pairs: layers, the second the only reader of the first.
        modules: the model's, by name; changed in place.

    Returns:
        c by the first layer's name, (channels,), where any is above 0; why not, for the others; and the
        layers that had no bias and got one.
    """
    shifts: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}
    new_biases: list[str] = []
    for pair in pairs:
        first, second = modules[pair.first], modules[pair.second]
        reason = _why_not(pair, first, second, modules)
        if reason is not None:
            reasons[pair.first] = reason
            continue
        known = norm_statistics(first)
        assert known is not None, "there would be a reason"
        mean, std = known
        shift = (mean - _STDS * std).clamp(min=0)
        if not bool(shift.any()):
            reasons[pair.first] = "no channel is always far above zero"
            continue
        if second.bias is None:
            add_bias(second)
            new_biases.append(pair.second)
        taken = response_to(shift, second.weight.detach(), second, pair.block)  # type: ignore[operator]
        _add(first, -shift)
        _add(second, taken)
        keep_norm_statistics(first, mean - shift, std)
        shifts[pair.first] = shift
    return shifts, reasons, tuple(new_biases)


def _why_not(
    pair: ChannelPair, first: nn.Module, second: Any, modules: Mapping[str, nn.Module]
) -> str | None:
    if norm_statistics(first) is None:
        return "no batch norm was folded into it, its mean is not known"
    for op in pair.through:
        module: Any = None if op.is_functional else modules[op.module_name]
        pads = isinstance(module, _AVERAGES) and module.padding not in (0, (0,), (0, 0), (0, 0, 0))
        is_unclear = op.type == "AveragePool" and not isinstance(module, (*_AVERAGES, *_ADAPTIVE))
        if op.type in ("LeakyRelu", "PRelu") or pads or is_unclear:
            return f"'{op.name}' ({op.type}) does not keep a shift"
    if isinstance(second, nn.modules.conv._ConvTransposeNd):
        return f"'{pair.second}' is a transposed convolution: zeros are between the values that it reads"
    if not isinstance(second, nn.Linear) and second.padding_mode == "zeros" and _pads(second):
        return f"'{pair.second}' pads with zeros, which would have to be shifted too"
    return None


def _pads(layer: Any) -> bool:
    return any(layer._reversed_padding_repeated_twice)


def _add(layer: Any, values: Tensor) -> None:
    bias = (layer.bias.detach().double() + values).to(layer.bias.dtype)
    layer.bias = nn.Parameter(bias, layer.bias.requires_grad)
