"""Python's and PyTorch's names that lead to a tracer while a forward is traced, and back again.

Calls of modules, parameters and buffers that are read off modules, `self.training`, and functions that
know nothing of stand-ins: `isinstance`, `len`, `torch.is_tensor`, those of `math`, and those that make
tensors.
Knows nothing about what the tracer does with them.
"""

from __future__ import annotations

import builtins
import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

_MAKERS = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros")
"""Functions of torch that make tensors out of no others: each call is one of the forward's operations."""


class CallTracer(Protocol):
    """What the names lead to."""

    is_running: bool
    """Whether values are being computed: then every name means what it always does."""

    def called(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module is called; `call(module, *args, **kwargs)` would run it."""
        ...

    def read(self, module: nn.Module, name: str, value: Tensor) -> Any:
        """A parameter or buffer is read."""
        ...

    def mode(self, module: nn.Module) -> Any:
        """`training` is read."""
        ...

    def value(self, stand_in: fx.Proxy) -> Any:
        """The value of a stand-in."""
        ...

    def call_function(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A function is called that is to be recorded."""
        ...


@contextmanager
def patched(tracer: CallTracer, namespace: dict[str, Any], cls: type[nn.Module]) -> Iterator[None]:
    """Within the block the names lead to `tracer`.

    Args:
        tracer: it is told what the code does that it is not itself.
        namespace: the globals of the code that is traced; those of the modules of `cls` and of its bases
            that are not PyTorch's are patched too.
        cls: the class whose forward is traced.
    """
    modules = [sys.modules.get(base.__module__) for base in cls.__mro__]
    namespaces = {id(namespace): namespace}
    for module in modules:
        if module is not None and module.__name__.partition(".")[0] not in ("torch", "builtins"):
            namespaces[id(vars(module))] = vars(module)
    functions = _functions(tracer)
    with ExitStack() as stack:
        for owner, name, new in _methods(tracer):
            stack.enter_context(_attribute(owner, name, new))
        for owner in (torch, math):
            for name, value in list(vars(owner).items()):
                if callable(value) and id(value) in functions:
                    stack.enter_context(_attribute(owner, name, functions[id(value)]))
        for names in namespaces.values():
            for name, value in [*names.items(), ("isinstance", isinstance), ("len", len)]:
                if callable(value) and id(value) in functions:
                    stack.enter_context(_entry(names, name, functions[id(value)]))
        yield


def _functions(tracer: CallTracer) -> dict[int, Callable[..., Any]]:
    """What takes the place of functions, by their identity."""

    def is_instance(value: Any, kinds: Any) -> bool:
        return builtins.isinstance(tracer.value(value) if isinstance(value, fx.Proxy) else value, kinds)

    def is_tensor(value: Any) -> bool:
        return is_instance(value, Tensor)

    def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
                return tracer.call_function(function, args, kwargs)
            return function(*args, **kwargs)

        return call

    def made(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if tracer.is_running:
                return function(*args, **kwargs)
            return tracer.call_function(function, args, kwargs)

        return call

    replaced = {id(isinstance): is_instance, id(torch.is_tensor): is_tensor, id(len): recorded(len)}
    for name, function in vars(math).items():
        if callable(function) and not name.startswith("_"):
            replaced[id(function)] = recorded(function)
    for name in _MAKERS:
        function = getattr(torch, name)
        replaced[id(function)] = made(function)
    return replaced


def _methods(tracer: CallTracer) -> Iterator[tuple[type, str, Any]]:
    """What takes the place of attributes of nn.Module."""
    call, look_up = nn.Module.__call__, nn.Module.__getattr__

    def __call__(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if tracer.is_running:
            return call(module, *args, **kwargs)
        return tracer.called(module, call, args, kwargs)

    def __getattr__(module: nn.Module, name: str) -> Any:
        value = look_up(module, name)
        if tracer.is_running or not isinstance(value, Tensor):
            return value
        return tracer.read(module, name, value)

    def training(module: nn.Module) -> Any:
        return vars(module)["training"] if tracer.is_running else tracer.mode(module)

    def set_training(module: nn.Module, mode: bool) -> None:
        vars(module)["training"] = mode

    yield nn.Module, "__call__", __call__
    yield nn.Module, "__getattr__", __getattr__
    yield nn.Module, "training", property(training, set_training)


_MISSING = object()


@contextmanager
def _attribute(owner: Any, name: str, new: Any) -> Iterator[None]:
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, new)
    try:
        yield
    finally:
        delattr(owner, name) if before is _MISSING else setattr(owner, name, before)


@contextmanager
def _entry(names: dict[str, Any], name: str, new: Any) -> Iterator[None]:
    before = names.get(name, _MISSING)
    names[name] = new
    try:
        yield
    finally:
        if before is _MISSING:
            del names[name]
        else:
            names[name] = before
