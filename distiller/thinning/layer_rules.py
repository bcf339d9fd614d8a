"""What PyTorch's own layers are told when their tensors become smaller: sizes, and which class takes over.

Knows nothing about which indices are removed or why, nor about layers of other packages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from operator import attrgetter
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from distiller.errors import DistillerError
from distiller.tensor_cuts import TensorCuts, cut_shape
from distiller.thinned_layers import ThinnedLayerNorm, ThinnedMultiheadAttention, ThinnedRMSNorm


@dataclass(frozen=True, slots=True)
class LayerChange:
    """What changes about a module beside its tensors.

    Attributes:
        attributes: by name, the new values.
        new_class: the class that takes over; None: the module's own stays.
    """

    attributes: Mapping[str, Any] = field(default_factory=dict)
    new_class: type[nn.Module] | None = None


Rule = Callable[[Any, TensorCuts], LayerChange]
"""Of a module, and what stays of its own tensors (by name within it, as `weight` or `qkv.weight`)."""


def shape_after(module: nn.Module, name: str, cuts: TensorCuts) -> tuple[int, ...]:
    """The shape that a tensor of a module will have."""
    return cut_shape(attrgetter(name)(module).shape, cuts.get(name, {}))


def _convolution(module: _ConvNd, cuts: TensorCuts) -> LayerChange:
    """A grouped one loses whole groups, or the same channels of each group; then there are as many groups."""
    first, per_group = shape_after(module, "weight", cuts)[:2]
    size = module.weight.shape[0] // module.groups
    kept = Counter(index // size for index in cuts.get("weight", {}).get(0, range(module.weight.shape[0])))
    groups = len(kept) if all(count == size for count in kept.values()) else module.groups
    names = ("in_channels", "out_channels")
    if not isinstance(module, _ConvTransposeNd):
        names = names[::-1]
    return LayerChange({names[0]: first, names[1]: per_group * groups, "groups": groups})


def _linear(module: nn.Linear, cuts: TensorCuts) -> LayerChange:
    out_features, in_features = shape_after(module, "weight", cuts)
    return LayerChange({"in_features": in_features, "out_features": out_features})


def _batch_norm(module: _NormBase, cuts: TensorCuts) -> LayerChange:
    return LayerChange({"num_features": shape_after(module, next(iter(cuts)), cuts)[0]})


def _prelu(module: nn.PReLU, cuts: TensorCuts) -> LayerChange:
    return LayerChange({"num_parameters": shape_after(module, "weight", cuts)[0]})


def _embedding(module: nn.Embedding, cuts: TensorCuts) -> LayerChange:
    return LayerChange({"embedding_dim": shape_after(module, "weight", cuts)[1]})


def counting_norm(kind: type[nn.Module], new_class: type[nn.Module]) -> Rule:
    """The rule of a norm that goes on counting what was removed.

    Args:
        kind: the norm; a subclass with a `forward` of its own is refused.
        new_class: what takes over.
    """

    def rule(module: Any, cuts: TensorCuts) -> LayerChange:
        refuse_own_code(module, kind, new_class)
        attributes: dict[str, Any] = {"counted": getattr(module, "counted", prod(module.normalized_shape))}
        if "weight" in cuts:
            attributes["normalized_shape"] = list(shape_after(module, "weight", cuts))
        return LayerChange(attributes, new_class)

    return rule


def refuse_own_code(module: nn.Module, *understood: type[nn.Module]) -> None:
    """Refuse a layer that computes something of its own, which a class that takes over would not.

    Raises:
        DistillerError: its `forward` is none of these classes'.
    """
    if type(module).forward not in [kind.forward for kind in understood]:
        raise DistillerError(
            f"is a {type(module).__name__}, whose code is its own and not that of "
            f"{understood[0].__name__}; what it would be with fewer channels is not known"
        )


def _multihead_attention(module: nn.MultiheadAttention, cuts: TensorCuts) -> LayerChange:
    refuse_own_code(module, nn.MultiheadAttention, ThinnedMultiheadAttention)
    if module.bias_k is not None or module.add_zero_attn:
        raise DistillerError("is attention with add_bias_kv or add_zero_attn, which cannot be made smaller")
    is_joint = module.in_proj_weight is not None
    rows = shape_after(module, "in_proj_weight" if is_joint else "v_proj_weight", cuts)[0]
    width = rows // 3 if is_joint else rows
    return LayerChange(
        # Without one width for everything PyTorch's own layers leave their fused paths.
        {"num_heads": width // module.head_dim, "_qkv_same_embed_dim": False},
        ThinnedMultiheadAttention,
    )


LAYER_RULES: dict[type[nn.Module], Rule] = {
    _ConvNd: _convolution,
    nn.Linear: _linear,
    _NormBase: _batch_norm,
    nn.PReLU: _prelu,
    nn.Embedding: _embedding,
    nn.LayerNorm: counting_norm(nn.LayerNorm, ThinnedLayerNorm),
    nn.RMSNorm: counting_norm(nn.RMSNorm, ThinnedRMSNorm),
    nn.MultiheadAttention: _multihead_attention,
}
"""By class of layer what changes; the first class that a module is an instance of counts."""

THINNED_CLASSES: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (ThinnedLayerNorm, ThinnedMultiheadAttention, ThinnedRMSNorm)
}
"""The classes that a recipe may name."""
