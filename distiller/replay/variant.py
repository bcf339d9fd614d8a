"""A model that differs from the dense one in a few places: tensors replaced, or inputs of layers transformed.

Knows nothing about why, nor about how a model is run in part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distiller.names import named_buffers, named_modules, named_parameters

Transform = Callable[[Tensor], Tensor]
"""A value -> what takes its place: a new tensor of the same shape and type."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A model that differs from the dense one in a few places.

    Attributes:
        tensors: what takes the place of parameters and buffers, by canonical name; their shape, type, device.
        inputs: what becomes of the first positional input of modules, by canonical name.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Mapping[str, Transform] = field(default_factory=dict)


@contextmanager
def applied(model: nn.Module, variant: Variant) -> Iterator[None]:
    """The model is the variant while the context is open; bit for bit as before afterwards."""
    state: dict[str, Tensor] = {**dict(named_parameters(model)), **dict(named_buffers(model))}
    replaced = {name: state[name].detach().clone() for name in variant.tensors}
    modules = dict(named_modules(model)) if variant.inputs else {}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())  # left last: what was replaced comes back without gradients
        for name, transform in variant.inputs.items():
            handle = modules[name].register_forward_pre_hook(_transforming(transform))
            stack.callback(handle.remove)
        for name, dense in replaced.items():
            stack.callback(state[name].copy_, dense)
        for name, value in variant.tensors.items():
            state[name].copy_(value)
        yield


def _transforming(transform: Transform) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (transform(arguments[0]), *arguments[1:])

    return hook
