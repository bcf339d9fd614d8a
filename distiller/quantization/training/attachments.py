"""Quantizers on the inputs and outputs of layers: a child module, and a hook that calls it.

The hooks are plain functions that find the child by its name in the module they are called with, so that
copies and replicas of a model each use their own.
Knows nothing about what a quantizer does.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distiller.errors import QuantizationError

__all__ = [
    "INPUT_QUANTIZER",
    "OUTPUT_QUANTIZER",
    "attach_input_quantizer",
    "attach_output_quantizer",
    "detach_input_quantizers",
]

INPUT_QUANTIZER, OUTPUT_QUANTIZER = "input_quantizer", "output_quantizer"
"""Names of the child modules."""


def attach_input_quantizer(layer: nn.Module, quantizer: nn.Module) -> None:
    """Make the first argument of a layer, or of a whole model, go through a quantizer; integers are left
    alone.

    Raises:
        QuantizationError: the layer has something of the name `input_quantizer`.
    """
    _add_child(layer, INPUT_QUANTIZER, quantizer)
    layer.register_forward_pre_hook(_quantize_input)


def attach_output_quantizer(layer: nn.Module, quantizer: nn.Module) -> None:
    """Make the output of a layer, a tensor, go through a quantizer.

    Raises:
        QuantizationError: the layer has something of the name `output_quantizer`.
    """
    _add_child(layer, OUTPUT_QUANTIZER, quantizer)
    layer.register_forward_hook(_quantize_output)


def detach_input_quantizers(model: nn.Module) -> None:
    """Take the quantizers of inputs off a model and all that is in it."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _quantize_input]:
            del module._forward_pre_hooks[key]
            delattr(module, INPUT_QUANTIZER)


def _add_child(layer: nn.Module, name: str, quantizer: nn.Module) -> None:
    if hasattr(layer, name):
        raise QuantizationError(
            f"{type(layer).__name__}: has an attribute '{name}' of its own, where its quantizer would be; "
            "rename it"
        )
    layer.add_module(name, quantizer)


def _quantize_input(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not args or not isinstance(args[0], Tensor):
        raise QuantizationError(
            f"{type(layer).__name__}: its input is quantized, and must be a tensor, "
            "its first positional argument"
        )
    if not args[0].is_floating_point():
        return None
    return (layer.input_quantizer(args[0]), *args[1:])


def _quantize_output(layer: Any, _args: tuple[Any, ...], output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise QuantizationError(
            f"{type(layer).__name__}: its output is quantized, and must be a tensor, "
            f"got {type(output).__name__}"
        )
    return layer.output_quantizer(output)
