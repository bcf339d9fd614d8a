"""What the refinements change about a model besides numbers, for another copy whose state is to fit.

Knows nothing about when that is worth while.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from distiller.names import find_module, unwrap


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
