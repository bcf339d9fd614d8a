"""What of a quantized model has to be stored, and at which width, for the size of its file.

Knows nothing about file formats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distiller.names import canonical_state_dict, hidden_prefix, named_modules
from distiller.quantization.codebook import CodebookWeights
from distiller.quantization.ptq_layers import RangeLinearQuantParamLayerWrapper, filters_first
from distiller.quantization.ptq_precision import FPWrapper
from distiller.quantization.ptq_weights import QuantizedWeightWrapper
from distiller.quantization.training.folded_parameters import parameter_quantizer
from distiller.quantization.training.weight_quantizers import OutputChannels

_HELPERS = ("weight_scale", "weight_zero_point", "wrapped_module.float_weight", "wrapped_module.float_bias")


@dataclass(frozen=True, slots=True)
class StoredParams:
    """The three arguments of `distiller.export.size.quantized_bytes`.

    Attributes:
        tensors: parameters and buffers by canonical name, without the weights' scales and zero points
            (which go with each quantized tensor) and without full-precision copies; weights that are equal,
            as those of a tied embedding, are one tensor. Weights with a scale for each output channel have
            those in dimension 0. What is trained in full precision is stored as the layers compute with it.
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
        _store_trained(module, prefix, tensors, bits, per_channel)
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


def _store_trained(
    layer: nn.Module, prefix: str, tensors: dict[str, Tensor], bits: dict[str, int], per_channel: set[str]
) -> None:
    """Put the quantized values of a layer that was trained with quantization in the place of its parameters.

    What the quantizer of a weight has is not stored, its scale goes with the tensor; but for the attributes
    that it names in `stored_state`, and for the values of a codebook.
    """
    for key in ("weight", "bias"):
        quantizer = parameter_quantizer(layer, key)
        if quantizer is None:
            continue
        name, hidden = f"{prefix}{key}", hidden_prefix(f"{prefix}{key}")
        for own in [own for own in tensors if own.startswith(hidden)]:
            del tensors[own]
        values: Tensor = getattr(layer, key).detach()
        if isinstance(quantizer, CodebookWeights):
            chain: Any = layer.parametrizations
            stored = quantizer.stored(chain.weight.original)
            tensors[name], bits[name] = values, stored.bits
            tensors[f"{hidden}values"] = stored.values
            if stored.pruned is not None:
                tensors[f"{hidden}pruned"] = stored.pruned
            continue
        channels = getattr(quantizer, "channels", None)
        if channels is not None:
            assert isinstance(channels, OutputChannels)
            values = values if channels.dim == 0 else channels.rows(values)
            per_channel.add(name)
        for kept in getattr(quantizer, "stored_state", ()):
            tensors[f"{hidden}{kept}"] = getattr(quantizer, kept).detach()
        tensors[name] = values
        bits[name] = max(int(quantizer.num_bits), _bits_of(values, channels is not None))  # type: ignore[arg-type]


def _bits_of(values: Tensor, is_per_row: bool) -> int:
    """The width of integers that tell the values apart, of the row with the most.

    More than that of the quantizer where weights are pruned whose grid has no zero.
    """
    rows = (values if is_per_row else values[None]).flatten(1).sort(dim=1).values
    different = 1 + int((rows.diff(dim=1) != 0).sum(1).max()) if rows.numel() else 1
    return (different - 1).bit_length()


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
