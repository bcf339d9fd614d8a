"""The tensors of a model with nothing in them that only training needs, as small as packing can make them.

What the network computes stays the same:

    the sign of a zero     is +; a mask leaves -0.0 where a weight was negative
    trained quantization   the full-precision weight behind a quantized one is that itself, in layers that
                           make the very same weight of it; codes of pruned elements are 0
    `save_fp_weights`      full-precision copies beside quantized weights are left out

Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distiller.names import canonical_state_dict, hidden_prefix, named_modules, unwrap
from distiller.quantization.codebook import CodebookWeights

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
                kept += _collapse(layer, key, f"{name}.{key}" if name else key, tensors)
    finally:
        for module, mode in modes:
            module.training = mode
    notes = [
        f"{name}: stored in full precision, its quantized values would not be quantized to themselves"
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


def _collapse(layer: nn.Module, key: str, name: str, tensors: dict[str, Tensor]) -> list[str]:
    """Put a quantized parameter in the place of its full-precision one; returns its name if it cannot be."""
    chain: Any = layer.parametrizations[key]  # type: ignore[index]
    if name not in tensors:  # made of several tensors
        return []
    computed: Tensor = getattr(layer, key).detach().clone()
    original: Tensor = chain.original

    def same() -> bool:
        return _same_numbers(getattr(layer, key), computed)

    if computed.shape != original.shape or computed.dtype != original.dtype:
        return [name]
    if not _holds_with(original, computed, same):
        return [name]
    tensors[name] = computed
    for index, step in enumerate(chain):
        if isinstance(step, CodebookWeights):
            codes = torch.where(computed == 0, torch.zeros_like(step.assignments), step.assignments)
            if _holds_with(step.assignments, codes, same):
                tensors[f"{hidden_prefix(name)}{index}.assignments"] = codes
    return []


def _holds_with(tensor: Tensor, values: Tensor, holds: Callable[[], bool]) -> bool:
    """Whether something holds while a tensor has other values; it has its own again afterwards."""
    data = tensor.data
    try:
        tensor.data = values
        return holds()
    finally:
        tensor.data = data


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    """Equal, NaN to NaN."""
    return torch.equal(one, other) or bool(torch.isclose(one, other, 0, 0, equal_nan=True).all())
