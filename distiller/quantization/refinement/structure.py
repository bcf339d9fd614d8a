"""What the refinements change about a model besides numbers, for another copy whose state is to fit.

Knows nothing about when that is worth while.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from distiller.errors import QuantizationError
from distiller.model_transforms import fold_batch_norms
from distiller.names import find_module, unwrap

_CHANGES = ("replaced_relu6s", "new_biases")
_FOLDED = "has_folded_norms"


def note_changes(
    model: nn.Module, *, has_folded_norms: bool, replaced_relu6s: Iterable[str], new_biases: Iterable[str]
) -> None:
    """Put down in a quantized model's `quantizer_metadata` what `repeat_changes` is to do to another copy.

    Args:
        model: prepared by a quantizer.
        has_folded_norms: whether the batch norms were folded before it came to the quantizer, as `equalize`
            does.
        replaced_relu6s: names of modules.
        new_biases: names of layers.
    """
    metadata: dict[str, Any] = unwrap(model).quantizer_metadata  # type: ignore[assignment]
    found = dict(zip(_CHANGES, (sorted(set(replaced_relu6s)), sorted(set(new_biases))), strict=True))
    metadata.update({key: names for key, names in found.items() if names})
    if has_folded_norms:
        metadata[_FOLDED] = True


def repeat_changes(model: nn.Module, metadata: Mapping[str, Any], dummy_input: Any) -> None:
    """Do to a model in floating point what `note_changes` put down of another.

    Args:
        model: changed in place.
        metadata: the other model's `quantizer_metadata`.
        dummy_input: an input, or a tuple of them, to trace the model with.

    Raises:
        QuantizationError: the names are none, or a layer is not one that can have a bias.
        DistillerError: batch norms cannot be folded.
        UnknownNameError: the model has no such module.
    """
    for key in _CHANGES:
        names = metadata.get(key, ())
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise QuantizationError(f"quantizer_metadata.{key}: must be a list of names, got {names!r}")
    for name in metadata.get("new_biases", ()):
        if not isinstance(find_module(model, name), nn.modules.conv._ConvNd | nn.Linear):
            raise QuantizationError(f"quantizer_metadata.new_biases: '{name}' is no layer with a bias")
    if metadata.get(_FOLDED) is True:
        fold_batch_norms(unwrap(model), dummy_input)
    replace_relu6s(model, metadata.get("replaced_relu6s", ()))
    add_biases(model, metadata.get("new_biases", ()))


def replace_relu6s(model: nn.Module, names: Iterable[str]) -> None:
    """Put nn.ReLU in the place of nn.ReLU6 modules.

    Args:
        model: changed in place.
        names: of the modules.

    Raises:
        UnknownNameError: there is no such module.
    """
    for relu6 in [find_module(model, name) for name in names]:
        relu = nn.ReLU(inplace=bool(getattr(relu6, "inplace", False))).train(relu6.training)
        for parent in list(unwrap(model).modules()):
            for child, module in list(parent.named_children()):
                if module is relu6:
                    setattr(parent, child, relu)


def add_biases(model: nn.Module, names: Iterable[str]) -> None:
    """Give convolutions and linear layers without a bias one of zeros.

    Args:
        model: changed in place.
        names: of the layers; those that have a bias keep it.

    Raises:
        UnknownNameError: there is no such layer.
    """
    for name in names:
        add_bias(find_module(model, name))


def add_bias(layer: nn.Module) -> None:
    """`add_biases` of one layer."""
    if layer.bias is None:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        count = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        layer.bias = nn.Parameter(weight.new_zeros(count), weight.requires_grad)  # type: ignore[arg-type]
