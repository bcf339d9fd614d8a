"""What of a quantized model has to be stored, and at which width, for the size of its file.

Knows nothing about file formats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distiller.names import canonical_state_dict, named_modules
from distiller.quantization.ptq_layers import RangeLinearQuantParamLayerWrapper, filters_first
from distiller.quantization.ptq_precision import FPWrapper
from distiller.quantization.ptq_weights import QuantizedWeightWrapper

_HELPERS = ("weight_scale", "weight_zero_point", "wrapped_module.float_weight", "wrapped_module.float_bias")


@dataclass(frozen=True, slots=True)
class StoredParams:
    """The three arguments of `distiller.export.size.quantized_bytes`.

    Attributes:
        tensors: parameters and buffers by canonical name, without the weights' scales and zero points
            (which go with each quantized tensor) and without full-precision copies; weights that are equal,
            as those of a tied embedding, are one tensor. Weights with a scale for each output channel have
            those in dimension 0.
        bits: width of each quantized one; the others are stored as they are.
        per_channel: those of them with a scale for each output channel.
    """

    tensors: dict[str, Tensor]
    bits: dict[str, int]
    per_channel: frozenset[str]


def stored_params(model: nn.Module) -> StoredParams:
    """What of `model`, quantized or not, has to be stored."""
    tensors = canonical_state_dict(model)
    bits: dict[str, int] = {}
    per_channel: set[str] = set()
    weights: list[str] = []
    for name, module in named_modules(model):
        prefix = f"{name}." if name else ""
        weight, bias = f"{prefix}wrapped_module.weight", f"{prefix}wrapped_module.bias"
        if isinstance(module, FPWrapper | QuantizedWeightWrapper) and weight in tensors:
            weights.append(weight)
        if not isinstance(module, QuantizedWeightWrapper):
            continue
        bits[weight] = module.wts_quant_settings.num_bits
        if module.wts_quant_settings.per_channel:
            per_channel.add(weight)
            tensors[weight] = filters_first(tensors[weight], module.wrapped_module)
        # A wider integer than the floating-point number that it was computed in holds nothing more.
        is_layer = isinstance(module, RangeLinearQuantParamLayerWrapper)
        if is_layer and module.has_fixed_bias and (module.bits_bias or 0) <= 8 * tensors[bias].element_size():
            bits[bias] = module.bits_bias or 0
        for helper in _HELPERS:
            tensors.pop(f"{prefix}{helper}", None)
        if not is_layer:  # an embedding's output is on the grid of its weight
            for helper in ("scale", "zero_point"):
                tensors.pop(f"{prefix}output_quant.{helper}", None)
    _share_equal(weights, tensors, bits, per_channel)
    return StoredParams(tensors, bits, frozenset(per_channel))


def _share_equal(
    names: list[str], tensors: dict[str, Tensor], bits: dict[str, int], per_channel: set[str]
) -> None:
    """Let weights that are equal, at one width, be one tensor."""
    firsts: dict[object, list[str]] = {}
    for name in names:
        tensor = tensors[name]
        alike = firsts.setdefault((tensor.shape, tensor.dtype, bits.get(name), name in per_channel), [])
        for other in alike:
            if torch.equal(tensors[other], tensor):
                tensors[name] = tensors[other]
                break
        else:
            alike.append(name)
