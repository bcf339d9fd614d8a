"""What a module is told when its tensors become smaller, by the rules of PyTorch's and torchvision's layers.

Knows nothing about which indices are removed or why.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from torch import nn

from distiller.errors import DistillerError
from distiller.tensor_cuts import TensorCuts
from distiller.thinning import layer_rules
from distiller.thinning.layer_rules import LayerChange, Rule

NEW_SETTINGS = frozenset(("counted", "head_dim"))
"""Attributes that a layer may not have before its class is taken over."""

SETTINGS = NEW_SETTINGS.union(
    ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features"),
    ("num_parameters", "embedding_dim", "normalized_shape"),
    ("num_heads", "n_heads", "hidden_dim", "_qkv_same_embed_dim"),
)
"""All attributes that layers are told."""


def layer_change(module: nn.Module, cuts: TensorCuts, is_normalizing: bool = False) -> LayerChange | None:
    """What changes about one module.

    Args:
        module: as it is before.
        cuts: what stays of those of its tensors that become smaller, by name within the module.
        is_normalizing: whether it is a norm that takes statistics over channels that are removed.

    Returns:
        None when nothing is known of the module's class.

    Raises:
        DistillerError: the module cannot do without what is removed.
    """
    rule = next((rule for kind, rule in _rules_for(module).items() if isinstance(module, kind)), None)
    if rule is None:
        if is_normalizing:
            raise DistillerError(
                f"is a {type(module).__name__} that takes statistics over the removed channels; "
                "nn.LayerNorm and nn.RMSNorm are understood"
            )
        return None
    return rule(module, cuts)


def thinned_class(name: str) -> type[nn.Module]:
    """The class of that name that takes over from a layer.

    Raises:
        DistillerError: there is none.
    """
    known = layer_rules.THINNED_CLASSES
    if name not in known:
        known = {**known, **_torchvision_layers().THINNED_CLASSES}
    if name not in known:
        raise DistillerError(f"unknown thinned layer '{name}'; known are {', '.join(sorted(known))}")
    return known[name]


def _rules_for(module: nn.Module) -> Mapping[type[nn.Module], Rule]:
    """By class of layer what changes; the first class that the module is an instance of counts."""
    if any(kind.__module__.startswith("torchvision.") for kind in type(module).__mro__):
        return {**_torchvision_layers().LAYER_RULES, **layer_rules.LAYER_RULES}
    return layer_rules.LAYER_RULES


def _torchvision_layers() -> ModuleType:
    # torchvision takes seconds to import, so it waits until a model has its layers.
    from distiller.thinning import torchvision_layers

    return torchvision_layers
