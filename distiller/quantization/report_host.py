"""A model in floating point, into which layers of a quantized model are put one by one.

Knows nothing about what is measured then.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distiller.errors import QuantizationError
from distiller.names import canonical_state_dict, named_buffers, named_modules, named_parameters, unwrap
from distiller.observation import unobserved, watch_output
from distiller.quantization.report_layers import (
    WRAPPERS,
    QuantizedLayer,
    float_layer_of,
    levels_of,
    unrounded,
    was_trained_quantized,
)
from distiller.quantization.training.binary_activations import HandedOn
from distiller.quantization.training.dorefa import ClippedLinearQuantization
from distiller.quantization.training.folded_parameters import parameter_quantizer
from distiller.quantization.training.pact import LearnedClippedLinearQuantization

__all__ = ["FloatHost"]

_CLIPPED = (ClippedLinearQuantization, LearnedClippedLinearQuantization)


class FloatHost:
    """A copy of a model in floating point, into which single quantized layers are put for a while.

    Args:
        float_model: stays as it is.
        model: the quantized one. If it was trained with quantization, the host has its parameters, before
            they are rounded, and only the architecture of `float_model`.

    Attributes:
        model: the copy.
        modules: those of `float_model` by name.
        residents: what is there in the copy while no layer is quantized, by name.

    Raises:
        QuantizationError: `float_model` is quantized itself, or the models do not fit.
    """

    def __init__(self, float_model: nn.Module, model: nn.Module) -> None:
        with unobserved(float_model):
            self.model = copy.deepcopy(unwrap(float_model))
        is_quantized = any(isinstance(module, WRAPPERS) for module in self.model.modules())
        if is_quantized or was_trained_quantized(self.model):
            raise QuantizationError(
                "float_model: is quantized itself; give the model in floating point that was quantized"
            )
        self.modules = dict(named_modules(self.model))
        self._places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        for parent in self.model.modules():
            for child_name, child in parent._modules.items():
                if child is not None:
                    self._places.setdefault(child, []).append((parent, child_name))
        self.residents = dict(self.modules)
        if was_trained_quantized(model):
            self._become_trained(unwrap(model))

    @contextmanager
    def with_quantized(self, layer: QuantizedLayer) -> Iterator[None]:
        """Within the block that layer is quantized, and no other."""
        handles = [
            watch_output(self.residents[name], lambda _module, _inputs, output, grid=grid: grid(output))
            for name, grid in layer.dynamic_sources.items()
        ]
        if not layer.parts:
            [quantizer] = layer.input_quantizers
            handles.append(self.model.register_forward_pre_hook(_quantizing(quantizer)))
        try:
            for name, part in layer.parts.items():
                self._put(self.modules[name], part)
            yield
        finally:
            for name in layer.parts:
                self._put(self.modules[name], self.residents[name])
            for handle in handles:
                handle.remove()

    def _become_trained(self, model: nn.Module) -> None:
        """Compute what a model that was trained with quantization does, but for the rounding."""
        _take_parameters(self.model, model)
        for name, module in named_modules(model):
            quantizer = parameter_quantizer(module, "weight")
            levels = levels_of(module) if isinstance(module, _CLIPPED) else None
            if levels is not None:
                float_layer = float_layer_of(self.modules, name, None)
                self.residents[name] = nn.Hardtanh(0.0, float(levels.highest)).eval()
                self._put(float_layer, self.residents[name])
            elif isinstance(module, HandedOn):
                self.residents[name] = module
                self._put(float_layer_of(self.modules, name, None), module)
            elif quantizer is not None:
                layer: Any = float_layer_of(self.modules, name, type(module))
                with torch.no_grad():
                    layer.weight.copy_(unrounded(quantizer, layer.weight))

    def _put(self, module: nn.Module, replacement: nn.Module) -> None:
        """Set what is to be at every place of a module of the float model."""
        for parent, child_name in self._places[module]:
            setattr(parent, child_name, replacement)


def _take_parameters(host: nn.Module, model: nn.Module) -> None:
    """Give the host the model's parameters and buffers, before they are quantized."""
    trained = canonical_state_dict(model)
    with torch.no_grad():
        for name, parameter in named_parameters(host):
            found = trained.get(name)
            if found is None or found.shape != parameter.shape:
                there = "there is none" if found is None else tuple(found.shape)
                raise QuantizationError(
                    f"float_model: parameter '{name}' is {tuple(parameter.shape)}, in the quantized model "
                    f"{there}; give the architecture that was prepared for training"
                )
            parameter.copy_(found)
        for name, buffer in named_buffers(host):
            if name in trained:
                buffer.copy_(trained[name])


def _quantizing(quantizer: nn.Module) -> Any:
    def hook(_model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            return None
        return (quantizer(args[0]), *args[1:])

    return hook
