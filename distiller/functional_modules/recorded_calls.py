"""One run of a model, looked at: which modules compute in their own forwards, and what they were given.

Knows nothing about which operations become modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from distiller.functional_modules.forward_trace import RecordedCall
from distiller.functional_modules.operation_names import CREATED, MOVEMENT, plain_name
from distiller.graph import is_leaf
from distiller.names import named_modules

_CALLS_KEPT = 4


@dataclass(slots=True)
class ComputingModule:
    """A module with submodules that computes something itself.

    Attributes:
        name: canonical.
        module: the module.
        operations: the names of the functions that it computes with, each once, in the order of execution.
        calls: what it was called with: the first call of each form.
    """

    name: str
    module: nn.Module
    operations: tuple[str, ...] = ()
    calls: list[RecordedCall] = field(default_factory=list)


def computing_modules(model: nn.Module, arguments: tuple[Any, ...]) -> list[ComputingModule]:
    """The modules of a model that are no leaves and compute with tensors in their own forward.

    Args:
        model: in evaluation mode, without gradients; not a wrapper around a model. It is run once.
        arguments: what it is given.

    Returns:
        Those that were called, a module before the ones that contain it.

    Raises:
        Exception: whatever the model raises.
    """
    watch = _Watch({module: name for name, module in named_modules(model) if not is_leaf(module)})
    with watch.attached(model), watch:
        model(*arguments)
    return sorted(
        (found for found in watch.found.values() if found.operations),
        key=lambda found: (-found.name.count(".") - bool(found.name), watch.order[found.module]),
    )


class _Watch(TorchFunctionMode):
    """Books what is computed on the module whose forward is running."""

    def __init__(self, names: dict[nn.Module, str]) -> None:
        super().__init__()
        self.found: dict[nn.Module, ComputingModule] = {}
        self.order: dict[nn.Module, int] = {}
        self._names = names
        self._running: list[tuple[nn.Module, list[str]]] = []
        self._forms: set[tuple[nn.Module, str]] = set()

    def attached(self, model: nn.Module) -> _Attached:
        return _Attached(model, self._before, self._after)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = plain_name(getattr(func, "__name__", ""))[0]
        if self._running and name not in MOVEMENT and name not in CREATED and _is_computed(result, args):
            self._running[-1][1].append(name)
        return result

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.append((module, []))
        if module not in self._names:
            return
        with torch._C.DisableTorchFunction():
            found = self.found.setdefault(module, ComputingModule(self._names[module], module))
            self.order.setdefault(module, len(self.order))
            form = module, str(pytree.tree_map(_form, (args, kwargs)))
            if form not in self._forms and len(found.calls) < _CALLS_KEPT:
                self._forms.add(form)
                found.calls.append(copied(RecordedCall(args, kwargs)))

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        operations = self._running.pop()[1]
        if module in self.found and not self.found[module].operations:
            self.found[module].operations = tuple(dict.fromkeys(operations))


class _Attached:
    """Hooks on all modules for a while, after and before all others: arguments as the forward sees them."""

    def __init__(self, model: nn.Module, before: Callable[..., None], after: Callable[..., None]) -> None:
        self._model, self._before, self._after = model, before, after

    def __enter__(self) -> None:
        self._handles = []
        for module in self._model.modules():
            self._handles.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after, prepend=True))

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()


def copied(call: RecordedCall) -> RecordedCall:
    """A call with tensors of its own; what was one tensor is one tensor still."""
    known: dict[int, Tensor] = {}

    def copy(value: Any) -> Any:
        return known.setdefault(id(value), value.detach().clone()) if isinstance(value, Tensor) else value

    args, kwargs = pytree.tree_map(copy, (call.args, dict(call.kwargs)))
    return RecordedCall(args, kwargs)


def _form(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)


def _is_computed(result: Any, args: Any) -> bool:
    tensors = _tensors(args)
    return any(x.is_floating_point() for x in _tensors(result)) and any(True for _ in tensors)


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))
