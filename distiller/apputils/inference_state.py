"""The tensors of a model with nothing in them that only training needs, as small as packing can make them.

What the network computes stays the same:

    the sign of a zero     is +; a mask leaves -0.0 where a weight was negative
    trained quantization   the full-precision weight behind a quantized one is one of few values, which is
                           quantized to the very same (`stored_weights`); a batch norm that was folded into it
                           in training is absorbed; codes of pruned elements are 0
    `save_fp_weights`      full-precision copies beside quantized weights are left out

Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distiller.apputils.stored_weights import same_numbers, stored_weight
from distiller.names import canonical_state_dict, hidden_prefix, named_modules, unwrap
from distiller.quantization.codebook import CodebookWeights
from distiller.quantization.training.folded_parameters import FoldedParameters, sigma_of

__all__ = ["InferenceState", "inference_state"]

_COPIES = ("wrapped_module.float_weight", "wrapped_module.float_bias")


@dataclass(frozen=True, slots=True)
class InferenceState:
    """What has to be stored of a model that will only be evaluated.

    Attributes:
        tensors: by canonical name.
        quantizer: the description that fits them; None without one.
        notes: what was changed, and what could not be, a sentence each.
    """

    tensors: dict[str, Tensor]
    quantizer: dict[str, Any] | None
    notes: tuple[str, ...]


@torch.no_grad()
def inference_state(model: nn.Module) -> InferenceState:
    """The tensors to store of a model.

    Args:
        model: masked weights are zero. Put in evaluation mode meanwhile, and left as it was.
    """
    bare = unwrap(model)
    tensors = canonical_state_dict(model)
    quantizer = deepcopy(getattr(bare, "quantizer_metadata", None))
    modes = [(module, module.training) for module in bare.modules()]
    bare.eval()
    kept: list[str] = []
    try:
        for name, layer in named_modules(bare):
            for key in list(getattr(layer, "parametrizations", ())):
                kept += _collapse(bare, layer, f"{name}.{key}" if name else key, tensors)
    finally:
        for module, mode in modes:
            module.training = mode
    notes = [
        f"{name}: stored in full precision, no weight of fewer values was found that is quantized alike"
        for name in kept
    ]
    if quantizer is not None and quantizer.get("params", {}).get("save_fp_weights"):
        quantizer["params"]["save_fp_weights"] = False
        copies = [name for name in tensors if name.endswith(_COPIES)]
        for name in copies:
            del tensors[name]
        notes.append(f"full-precision copies beside quantized weights are left out: {len(copies)}")
    negative = 0
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            is_negative = (tensor == 0) & torch.signbit(tensor)
            count = int(is_negative.sum())
            if count:
                tensors[name] = tensor.masked_fill(is_negative, 0.0)
                negative += count
    if negative:
        notes.append(f"zeros with a negative sign, stored as 0: {negative:,}")
    return InferenceState(tensors, quantizer, tuple(notes))


def _collapse(model: nn.Module, layer: nn.Module, name: str, tensors: dict[str, Tensor]) -> list[str]:
    """Put few values in the place of a full-precision parameter; returns its name if none serve."""
    key = name.rpartition(".")[2]
    chain: Any = layer.parametrizations[key]  # type: ignore[index]
    if name not in tensors:  # made of several tensors
        return []
    computed: Tensor = getattr(layer, key).detach().clone()
    original: Tensor = chain.original

    def quantized(values: Tensor) -> Tensor:
        with _holding({original: values}):
            return getattr(layer, key).detach()

    if computed.shape != original.shape or computed.dtype != original.dtype:
        return [name]
    absorbed, full = {}, original.detach()
    if isinstance(chain[-1], FoldedParameters):
        absorbed = _absorbed(model, layer, chain[-1])
        full = chain[-1].folded_weight(full).detach() if absorbed else full
    with _holding(dict(absorbed.values())):
        stored = stored_weight(full, computed, quantized)
    if stored is None:
        return [name]
    tensors[name] = stored
    tensors.update({own: values for own, (_, values) in absorbed.items()})
    for index, step in enumerate(chain):
        if isinstance(step, CodebookWeights):
            codes = torch.where(computed == 0, torch.zeros_like(step.assignments), step.assignments)
            with _holding({step.assignments: codes}):
                holds = same_numbers(getattr(layer, key), computed)
            if holds:
                tensors[f"{hidden_prefix(name)}{index}.assignments"] = codes
    return []


def _absorbed(
    model: nn.Module, layer: nn.Module, folding: FoldedParameters
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (tensor, value) with which a batch norm changes the weight it is folded into no more.

    Its scale becomes its standard deviation, so that their quotient is 1; its mean and the layer's bias
    become 0, and its shift the bias that is folded. {}: it has no scale and shift.
    """
    bn, bias = folding.bn, getattr(layer, "bias", None)
    if bn.weight is None or bn.bias is None or bn.running_mean is None:
        return {}
    names = {id(module): own for own, module in named_modules(model)}
    of_bn, of_layer = names[id(bn)], names[id(layer)]
    found = {
        f"{of_bn}.weight": (bn.weight, sigma_of(bn).to(bn.weight.dtype)),
        f"{of_bn}.bias": (bn.bias, folding.full_bias(bias)),
        f"{of_bn}.running_mean": (bn.running_mean, torch.zeros_like(bn.running_mean)),
    }
    if bias is not None:
        found[f"{of_layer}.bias" if of_layer else "bias"] = (bias, torch.zeros_like(bias))
    return found


@contextmanager
def _holding(values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Tensors with other values; they have their own again afterwards."""
    kept = {tensor: tensor.data for tensor in values}
    try:
        for tensor, value in values.items():
            tensor.data = value
        yield
    finally:
        for tensor, data in kept.items():
            tensor.data = data
