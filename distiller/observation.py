"""Hooks that only look on while a model runs, and a model without them for a while.

A model that is traced, copied or tried out in the middle of a training must not be watched by those who
watch the training: they would count what is not of it, and be copied with the model.
Knows nothing about who looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class _Onlooker:
    """A forward hook that changes neither inputs nor output."""

    def __init__(self, see: Callable[..., None]) -> None:
        self._see = see

    def __call__(self, *args: Any) -> None:
        self._see(*args)


def watch_inputs(module: nn.Module, see: Callable[..., None]) -> RemovableHandle:
    """Call `see(module, inputs)` before each forward of a module; returns what ends it: `.remove()`."""
    return module.register_forward_pre_hook(_Onlooker(see))


def watch_output(module: nn.Module, see: Callable[..., None]) -> RemovableHandle:
    """Call `see(module, inputs, output)` after each forward of a module; returns what ends it."""
    return module.register_forward_hook(_Onlooker(see))


def as_given(output: Any) -> Any:
    """A copy of what a layer gave, which nothing behind it writes to, as a ReLU in place does.

    Gradients flow through it. What is no tensor is it itself.
    """
    return output.clone() if isinstance(output, Tensor) else output


@contextmanager
def unobserved(model: nn.Module) -> Iterator[None]:
    """Within the block nobody watches `model`; hooks that belong to it, as those of weight norm, stay."""
    kept: list[tuple[dict[int, Any], list[tuple[int, Any]]]] = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            if any(isinstance(hook, _Onlooker) for hook in hooks.values()):
                kept.append((hooks, list(hooks.items())))
                for key in [key for key, hook in hooks.items() if isinstance(hook, _Onlooker)]:
                    del hooks[key]
    try:
        yield
    finally:
        for hooks, before in kept:
            hooks.clear()
            hooks.update(before)
