"""Hooks on the leaf modules of a model, attached for a while and always taken off again.

A collector sees the inputs of a module before the module runs and its output right after,
so that operations in place, by the module itself or by the next, cannot change what it sees.
Knows nothing about what is collected.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distiller.errors import UsageError
from distiller.graph import leaf_modules
from distiller.names import resolve_all, unwrap
from distiller.observation import watch_inputs, watch_output

CollectorT = TypeVar("CollectorT", bound="ActivationCollector")


class ActivationCollector(ABC):
    """What passes through the leaf modules of a model while the collector is attached.

    `with collector:` attaches it to all its modules; `start` to some of them. It is taken off
    again at the end of the block, also after an error. nn.Identity is never looked at; a
    module that is used in several places is one module.

    Attributes:
        model: the model, without wrappers.
        modules: the modules looked at by canonical name, in the model's order.
    """

    def __init__(self, model: nn.Module, classes: Sequence[type[nn.Module]] | None = None) -> None:
        """Choose the modules.

        Args:
            model: the model; DistributedDataParallel and torch.compile wrappers are looked through.
            classes: types of module to look at; None for all.

        Raises:
            UsageError: the model runs as several copies at once (DataParallel).
        """
        if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
            raise UsageError(
                f"{type(self).__name__}: the model is a DataParallel over {len(model.device_ids)} devices, "
                "whose copies cannot be looked into; give the model inside (model.module)"
            )
        self.model = unwrap(model)
        chosen = tuple(classes) if classes is not None else (nn.Module,)
        self.modules: dict[str, nn.Module] = {
            name: module
            for name, module in leaf_modules(self.model).items()
            if isinstance(module, chosen) and not isinstance(module, nn.Identity)
        }
        self._handles: list[RemovableHandle] = []

    @abstractmethod
    def on_inputs(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """A module is about to run on these positional arguments."""

    @abstractmethod
    def on_output(self, name: str, module: nn.Module, output: Any) -> None:
        """A module has run; `output` is what it returned."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything collected."""

    @abstractmethod
    def value(self) -> Mapping[str, Any]:
        """What was collected, by canonical module name."""

    @abstractmethod
    def save(self, fname: str | Path) -> Path:
        """Write what was collected; returns the file written."""

    def start(self, modules_list: Sequence[str] | None = None) -> None:
        """Attach to the modules called (or matching the patterns) `modules_list`; None for all.

        Raises:
            UsageError: the collector is attached already.
            UnknownNameError: a name or pattern matches no module of the collector.
        """
        if self._handles:
            raise UsageError(f"{type(self).__name__}: is attached already; call stop() first")
        names = self.modules if modules_list is None else resolve_all(modules_list, self.modules, "module")
        for name in names:
            module = self.modules[name]
            self._handles.append(watch_inputs(module, partial(self._before, name)))
            self._handles.append(watch_output(module, partial(self._after, name)))

    def stop(self) -> None:
        """Take the hooks off; a collector that is not attached stays so."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _before(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.on_inputs(name, module, inputs)

    def _after(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.on_output(name, module, output)


def is_measurable(value: Any) -> bool:
    """Whether an input or output is a tensor of floating point with at least one element."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0


def measurable(values: Any) -> list[Tensor]:
    """The tensors with something to measure in what a module is given or returns, alone or among others."""
    return [x for x in (values if isinstance(values, (tuple, list)) else (values,)) if is_measurable(x)]


@contextmanager
def collector_context(
    collector: CollectorT, modules_list: Sequence[str] | None = None
) -> Iterator[CollectorT]:
    """The collector, attached to the modules called `modules_list` (None for all) within the block.

    Raises:
        UnknownNameError: a name or pattern matches no module of the collector.
    """
    collector.start(modules_list)
    try:
        yield collector
    finally:
        collector.stop()
