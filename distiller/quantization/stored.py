"""What of a quantized model has to be stored, and at which width, for the size of its file.

Knows nothing about file formats.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from distiller.names import canonical_state_dict, named_modules
from distiller.quantization.ptq_layers import RangeLinearQuantParamLayerWrapper


@dataclass(frozen=True, slots=True)
class StoredParams:
    """The three arguments of `distiller.export.size.quantized_bytes`.

    Attributes:
        tensors: parameters and buffers by canonical name, without the weights' scales and zero points
            (which go with each quantized tensor) and without full-precision copies.
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
    for name, module in named_modules(model):
        if not isinstance(module, RangeLinearQuantParamLayerWrapper):
            continue
        prefix = f"{name}." if name else ""
        weight, bias = f"{prefix}wrapped_module.weight", f"{prefix}wrapped_module.bias"
        bits[weight] = module.wts_quant_settings.num_bits
        if module.wts_quant_settings.per_channel:
            per_channel.add(weight)
        # A wider integer than the floating-point number that it was computed in holds nothing more.
        if module.has_fixed_bias and (module.bits_bias or 0) <= 8 * tensors[bias].element_size():
            bits[bias] = module.bits_bias or 0
        for helper in (
            "weight_scale",
            "weight_zero_point",
            "wrapped_module.float_weight",
            "wrapped_module.float_bias",
        ):
            tensors.pop(f"{prefix}{helper}", None)
    return StoredParams(tensors, bits, frozenset(per_channel))
