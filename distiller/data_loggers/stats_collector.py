"""What collectors of statistics for quantization have in common: the streams of a model, and their file.

    conv1:
      inputs:
        0: {min, max, avg_min, avg_max, mean, std, b, shape, total_numel}
      output: {min, max, avg_min, avg_max, mean, std, b, shape, total_numel}

All values are over the elements of all data, independent of the batches they came in;
avg_min and avg_max are means over samples of the sample's minimum and maximum; std is that of
the population, b = mean |x - mean|; shape is that of the first batch.
Knows nothing about how a stream is reduced, or about quantization.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import yaml
from torch import Tensor, nn

from distiller.atomic_file import write_whole
from distiller.data_loggers.collector import ActivationCollector, is_measurable, measurable
from distiller.data_loggers.stats_file import Stats
from distiller.errors import StatsError, UsageError


class Stream(Protocol):
    """The statistics of one input, or of the output, of a module."""

    @property
    def numel(self) -> int:
        """Elements so far."""
        ...

    def result(self) -> dict[str, Any]:
        """The record of the file."""
        ...


StreamT = TypeVar("StreamT", bound=Stream)


@dataclass(frozen=True, slots=True)
class Taken(Generic[StreamT]):
    """A tensor that passed, for the stream that it belongs to.

    Attributes:
        where: module, and input or output, for messages.
        stream: the stream.
        shape: of the tensor.
        reduction: what the collector keeps of it.
    """

    where: str
    stream: StreamT
    shape: tuple[int, ...]
    reduction: Any


@dataclass(slots=True)
class _Record(Generic[StreamT]):
    output: StreamT
    inputs: dict[int, StreamT] = field(default_factory=dict)


class QuantStatsCollector(ActivationCollector, Generic[StreamT]):
    """Statistics of the inputs and outputs of leaf modules.

    Values are recorded before a module can change its input in place, so that the last three
    arguments, kept for Distiller's users, are not needed for right results. Calls of one
    module count together, and so do the tensors that one call returns. Tensors of integers
    and arguments that are no tensors are not counted.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[type[nn.Module]] | None = None,
        inplace_runtime_check: bool = False,
        disable_inplace_attrs: bool = False,
        inplace_attr_names: Sequence[str] = ("inplace",),
    ) -> None:
        """Choose the modules.

        Args:
            model: the model.
            classes: types of module to look at; None for all.
            inplace_runtime_check: refuse modules (but dropout) that change their input in place.
            disable_inplace_attrs: set the attributes `inplace_attr_names` of all modules to False
                while the collector is attached.
            inplace_attr_names: names of attributes that make a module work in place.

        Raises:
            UsageError: the model runs as several copies at once (DataParallel), or attributes are to
                be disabled and none is named.
        """
        super().__init__(model, classes)
        if disable_inplace_attrs and not inplace_attr_names:
            raise UsageError("inplace_attr_names: empty, although disable_inplace_attrs is set; name one")
        self._refuses_inplace = inplace_runtime_check
        self._inplace_attrs = tuple(inplace_attr_names) if disable_inplace_attrs else ()
        self._restore: list[tuple[nn.Module, str, Any]] = []
        self.reset()

    @abstractmethod
    def _new_stream(self) -> StreamT:
        """A stream that has seen nothing."""

    @abstractmethod
    def _reduced(self, stream: StreamT, x: Tensor) -> Any:
        """What to keep of a tensor of the stream, as it is now."""

    @abstractmethod
    def _add_up(self, taken: Sequence[Taken[StreamT]]) -> None:
        """Give the streams what they have taken in one call of a module."""

    @abstractmethod
    def _lack(self) -> str | None:
        """What is missing before there is a file to write; None: nothing."""

    def reset(self) -> None:
        """Forget everything collected."""
        self._records: dict[str, _Record[StreamT]] = {}
        self._forget_tensors()

    def start(self, modules_list: Sequence[str] | None = None) -> None:
        """Attach to the modules called (or matching the patterns) `modules_list`; None for all."""
        super().start(modules_list)
        for module in self.model.modules():
            for name in self._inplace_attrs:
                if getattr(module, name, False):
                    self._restore.append((module, name, getattr(module, name)))
                    setattr(module, name, False)

    def stop(self) -> None:
        """Take the hooks off and give the modules their attributes back."""
        super().stop()
        while self._restore:
            setattr(*self._restore.pop())
        self._forget_tensors()

    def require_data(self, when: str = "") -> None:
        """See to it that something was collected.

        Args:
            when: ` in the first pass`, for the message.

        Raises:
            StatsError: no module was run.
        """
        if not self._records:
            raise StatsError(
                f"{type(self).__name__}: no module of the model was run{when}; "
                "the model must be called while the collector is attached"
            )

    def value(self) -> Stats:
        """The statistics by canonical module name, in the order of the forward pass.

        Returns:
            For each module whose output was seen `{"inputs": {index: record}, "output": record}`.
        """
        return {
            name: {
                "inputs": {index: stream.result() for index, stream in sorted(record.inputs.items())},
                "output": record.output.result(),
            }
            for name, record in self._records.items()
            if record.output.numel
        }

    def save(self, fname: str | Path) -> Path:
        """Write the statistics as YAML, whole or not at all; `.yaml` is appended where it is missing.

        Raises:
            StatsError: there is nothing to write yet, or the file cannot be written.
        """
        path = Path(fname)
        if path.suffix != ".yaml":
            path = path.with_name(f"{path.name}.yaml")
        if lack := self._lack():
            raise StatsError(f"{path}: {lack}")
        try:
            write_whole(path, yaml.safe_dump(self.value(), default_flow_style=False, sort_keys=False))
        except OSError as error:
            raise StatsError(f"{path}: cannot be written, {error.strerror or error}") from error
        return path

    def on_inputs(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Reduce the inputs, before the module may change them."""
        record = self._record(name)
        self._pending[name] = [
            self._taken(f"{name}.inputs[{index}]", record.inputs.setdefault(index, self._new_stream()), value)
            for index, value in enumerate(inputs)
            if is_measurable(value)
        ]
        if self._refuses_inplace and not isinstance(module, nn.modules.dropout._DropoutNd):
            self._versions[name] = [(x, version_of(x)) for x in inputs if isinstance(x, Tensor)]

    def on_output(self, name: str, module: nn.Module, output: Any) -> None:
        """Reduce the output and add up both."""
        if any(version_of(x) != version for x, version in self._versions.pop(name, ())):
            raise UsageError(
                f"{name}: changes its input in place, which inplace_runtime_check refuses; "
                "set disable_inplace_attrs or leave the check out"
            )
        stream = self._record(name).output
        taken = [self._taken(f"{name}.output", stream, x) for x in measurable(output)]
        self._add_up(self._pending.pop(name) + taken)

    def _record(self, name: str) -> _Record[StreamT]:
        if name not in self._records:
            self._records[name] = _Record(self._new_stream())
        return self._records[name]

    def _taken(self, where: str, stream: StreamT, x: Tensor) -> Taken[StreamT]:
        return Taken(where, stream, tuple(x.shape), self._reduced(stream, x))

    def _streams(self) -> list[tuple[str, StreamT]]:
        """Every stream after where it is."""
        return [
            (where, stream)
            for name, record in self._records.items()
            for where, stream in (
                *((f"{name}.inputs[{index}]", stream) for index, stream in record.inputs.items()),
                (f"{name}.output", record.output),
            )
        ]

    def _forget_tensors(self) -> None:
        self._pending: dict[str, list[Taken[StreamT]]] = {}
        self._versions: dict[str, list[tuple[Tensor, int | None]]] = {}


def version_of(x: Tensor) -> int | None:
    """Grows with every change in place; None where it is not tracked (torch.inference_mode)."""
    return None if x.is_inference() else x._version


def shape_text(shape: Sequence[int]) -> str:
    """`(256, 3, 224, 224)`, as the file has it."""
    return f"({', '.join(map(str, shape))})"
