"""Activation statistics for quantization, collected from a model and written as YAML.

    conv1:
      inputs:
        0: {min, max, avg_min, avg_max, mean, std, b, shape, total_numel}
      output: {min, max, avg_min, avg_max, mean, std, b, shape, total_numel}

All values are over the elements of all data, independent of the batches they came in;
avg_min and avg_max are means over samples of the sample's minimum and maximum; std is that of
the population, b = mean |x - mean|; shape is that of the first batch.
Knows nothing about quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from distiller.atomic_file import write_whole
from distiller.data_loggers.collector import ActivationCollector, collector_context, is_measurable, measurable
from distiller.data_loggers.observers import (
    DeviationObserver,
    RangeObserver,
    deviation_sums,
    range_sums,
)
from distiller.data_loggers.stats_file import Stats, check_stats, load_stats
from distiller.errors import StatsError, UsageError

__all__ = [
    "STATS_FILE",
    "QuantCalibrationStatsCollector",
    "Stats",
    "check_stats",
    "collect_quant_stats",
    "load_stats",
]

STATS_FILE = "acts_quantization_stats.yaml"


def collect_quant_stats(
    model: nn.Module,
    test_fn: Callable[..., Any],
    save_dir: str | Path | None = None,
    classes: Sequence[type[nn.Module]] | None = None,
    inplace_runtime_check: bool = False,
    disable_inplace_attrs: bool = False,
    inplace_attr_names: Sequence[str] = ("inplace",),
    modules_to_collect: Sequence[str] | None = None,
) -> Stats:
    """Statistics of the leaf modules' inputs and outputs over the data that `test_fn` feeds.

    Args:
        model: the model.
        test_fn: called twice, as `test_fn(model=model)`; runs the model on the same data each
            time, in evaluation mode.
        save_dir: existing folder to write `acts_quantization_stats.yaml` into; None writes nothing.
        classes: types of module to look at; None for all.
        inplace_runtime_check: see `QuantCalibrationStatsCollector`.
        disable_inplace_attrs: see `QuantCalibrationStatsCollector`.
        inplace_attr_names: see `QuantCalibrationStatsCollector`.
        modules_to_collect: names (or patterns) of the modules to look at; None for all.

    Returns:
        As `QuantCalibrationStatsCollector.value`.

    Raises:
        StatsError: nothing was run, the passes differ in their data, a value is not finite, or the
            folder cannot be written.
        UnknownNameError: a name in `modules_to_collect` matches no module.
    """
    if save_dir is not None and not Path(save_dir).is_dir():
        raise StatsError(f"{save_dir}: no such folder to write {STATS_FILE} into; make it first")
    collector = QuantCalibrationStatsCollector(
        model, classes, inplace_runtime_check, disable_inplace_attrs, inplace_attr_names
    )
    with collector_context(collector, modules_to_collect):
        test_fn(model=model)
        collector.start_second_pass()
        test_fn(model=model)
        collector.stop_second_pass()
    if save_dir is not None:
        collector.save(Path(save_dir) / STATS_FILE)
    return collector.value()


class QuantCalibrationStatsCollector(ActivationCollector):
    """Two exact passes over the data: range and mean, then std and b around that mean.

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

    def reset(self) -> None:
        """Forget everything collected; the next pass is a first pass."""
        self._records: dict[str, _Record] = {}
        self._in_second_pass = False
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

    def start_second_pass(self) -> None:
        """From here on the data are the second pass: the same data once more.

        Raises:
            StatsError: there was no first pass, or it met a value that is not finite.
        """
        if not self._records:
            raise StatsError(
                f"{type(self).__name__}: no module of the model was run in the first pass; "
                "the model must be called while the collector is attached"
            )
        for where, stream in self._streams():
            if not stream.first.is_finite:
                raise StatsError(f"{where}: NaN or infinite values in the first pass; is the model trained?")
            stream.second = DeviationObserver(stream.first.mean)
        self._in_second_pass = True

    def stop_second_pass(self) -> None:
        """The second pass is over.

        Raises:
            StatsError: it was not of the same data as the first.
        """
        self._in_second_pass = False
        for where, stream in self._streams():
            if not stream.is_complete:
                seen = stream.second.numel if stream.second else 0
                raise StatsError(
                    f"{where}: {seen} values in the second pass, {stream.first.numel} in the first; "
                    "feed the same data in both"
                )

    def value(self) -> Stats:
        """The statistics by canonical module name, in the order of the forward pass.

        Returns:
            For each module whose output was seen `{"inputs": {index: record}, "output": record}`; a
            record lacks `std` and `b` before the second pass is over.
        """
        return {
            name: {
                "inputs": {index: stream.result() for index, stream in sorted(record.inputs.items())},
                "output": record.output.result(),
            }
            for name, record in self._records.items()
            if record.output.first.numel
        }

    def save(self, fname: str | Path) -> Path:
        """Write the statistics as YAML, whole or not at all; `.yaml` is appended where it is missing.

        Raises:
            StatsError: the second pass is missing, or the file cannot be written.
        """
        path = Path(fname)
        if path.suffix != ".yaml":
            path = path.with_name(f"{path.name}.yaml")
        if not self._records or not all(stream.is_complete for _, stream in self._streams()):
            raise StatsError(f"{path}: std and b need a second pass over the data; call start_second_pass()")
        try:
            write_whole(path, yaml.safe_dump(self.value(), default_flow_style=False, sort_keys=False))
        except OSError as error:
            raise StatsError(f"{path}: cannot be written, {error.strerror or error}") from error
        return path

    def on_inputs(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Reduce the inputs, before the module may change them."""
        record = self._records.setdefault(name, _Record())
        self._pending[name] = [
            self._taken(record.inputs.setdefault(index, _Stream()), value)
            for index, value in enumerate(inputs)
            if is_measurable(value)
        ]
        if self._refuses_inplace and not isinstance(module, nn.modules.dropout._DropoutNd):
            self._versions[name] = [(x, _version(x)) for x in inputs if isinstance(x, Tensor)]

    def on_output(self, name: str, module: nn.Module, output: Any) -> None:
        """Reduce the output and add up both."""
        if any(_version(x) != version for x, version in self._versions.pop(name, ())):
            raise UsageError(
                f"{name}: changes its input in place, which inplace_runtime_check refuses; "
                "set disable_inplace_attrs or leave the check out"
            )
        stream = self._records[name].output
        taken = self._pending.pop(name) + [self._taken(stream, x) for x in measurable(output)]
        _fetch([reduction for _, _, reduction in taken])
        for observer, shape, reduction in taken:
            observer.add(reduction.sums, shape)

    def _taken(self, stream: _Stream, x: Tensor) -> tuple[RangeObserver | DeviationObserver, Any, _Reduction]:
        """What the stream's observer of this pass is to be given of `x`."""
        if not self._in_second_pass:
            return stream.first, x.shape, self._reduction(x, None)
        stream.second = stream.second or DeviationObserver(stream.first.mean)
        return stream.second, x.shape, self._reduction(x, stream.first.mean)

    def _reduction(self, x: Tensor, mean: float | None) -> _Reduction:
        """The reduction of `x`; the one made before where `x` has not changed since.

        A tensor is one module's output and the next one's input: it is reduced once.
        """
        version = _version(x)
        known = self._reductions.get(x)
        if known is None or known.version is None or (known.version, known.mean) != (version, mean):
            sums = range_sums(x) if mean is None else deviation_sums(x, mean)
            known = self._reductions[x] = _Reduction(version, mean, sums)
        return known

    def _streams(self) -> list[tuple[str, _Stream]]:
        return [
            (where, stream)
            for name, record in self._records.items()
            for where, stream in (
                *((f"{name}.inputs[{index}]", stream) for index, stream in record.inputs.items()),
                (f"{name}.output", record.output),
            )
        ]

    def _forget_tensors(self) -> None:
        self._pending: dict[str, list[tuple[RangeObserver | DeviationObserver, Any, _Reduction]]] = {}
        self._versions: dict[str, list[tuple[Tensor, int | None]]] = {}
        self._reductions = WeakTensorKeyDictionary()


@dataclass(slots=True)
class _Stream:
    """One input, or the output, of a module."""

    first: RangeObserver = field(default_factory=RangeObserver)
    second: DeviationObserver | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the second pass has seen as much as the first."""
        return (self.second.numel if self.second else 0) == self.first.numel

    def result(self) -> dict[str, Any]:
        deviation = self.second.result() if self.second and self.is_complete else {}
        shape = f"({', '.join(map(str, self.first.shape))})"
        return {**self.first.result(), **deviation, "shape": shape, "total_numel": self.first.numel}


@dataclass(slots=True)
class _Record:
    inputs: dict[int, _Stream] = field(default_factory=dict)
    output: _Stream = field(default_factory=_Stream)


@dataclass(slots=True)
class _Reduction:
    """A tensor, as it was at `version`, reduced around `mean` (first pass: None)."""

    version: int | None
    mean: float | None
    on_device: Tensor
    sums: list[float] = field(default_factory=list)  # the same on the host, once fetched


def _fetch(reductions: list[_Reduction]) -> None:
    """Bring the sums of all reductions to the host, with one device sync."""
    missing = [reduction for reduction in reductions if not reduction.sums]
    if missing:
        device = missing[0].on_device.device
        rows = torch.stack([reduction.on_device.to(device) for reduction in missing]).tolist()
        for reduction, row in zip(missing, rows, strict=True):
            reduction.sums[:] = row


def _version(x: Tensor) -> int | None:
    """Grows with every change in place; None where it is not tracked (torch.inference_mode)."""
    return None if x.is_inference() else x._version
