"""Activation statistics for quantization: the function that collects them, and the collector of two passes.

`stats_collector` describes the file. Knows nothing about quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from distiller.data_loggers.collector import collector_context
from distiller.data_loggers.observers import (
    DeviationObserver,
    RangeObserver,
    deviation_sums,
    range_sums,
)
from distiller.data_loggers.one_pass import OnePassQuantStatsCollector
from distiller.data_loggers.stats_collector import QuantStatsCollector, Taken, shape_text, version_of
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
    passes: int = 2,
) -> Stats:
    """Statistics of the leaf modules' inputs and outputs over the data that `test_fn` feeds.

    Args:
        model: the model.
        test_fn: called once for each pass, as `test_fn(model=model)`; runs the model on the same data each
            time, in evaluation mode.
        save_dir: existing folder to write `acts_quantization_stats.yaml` into; None writes nothing.
        classes: types of module to look at; None for all.
        inplace_runtime_check: see `QuantStatsCollector`.
        disable_inplace_attrs: see `QuantStatsCollector`.
        inplace_attr_names: see `QuantStatsCollector`.
        modules_to_collect: names (or patterns) of the modules to look at; None for all.
        passes: 2 for exact values; 1 for large models: all exact but b, which is within 1 %.

    Returns:
        As `QuantStatsCollector.value`.

    Raises:
        StatsError: nothing was run, the passes differ in their data, a value is not finite, or the
            folder cannot be written.
        UnknownNameError: a name in `modules_to_collect` matches no module.
        UsageError: `passes` is neither 1 nor 2.
    """
    if passes not in (1, 2):
        raise UsageError(f"collect_quant_stats: passes: must be 1 or 2, got {passes!r}")
    if save_dir is not None and not Path(save_dir).is_dir():
        raise StatsError(f"{save_dir}: no such folder to write {STATS_FILE} into; make it first")
    kind = OnePassQuantStatsCollector if passes == 1 else QuantCalibrationStatsCollector
    collector = kind(model, classes, inplace_runtime_check, disable_inplace_attrs, inplace_attr_names)
    with collector_context(collector, modules_to_collect):
        test_fn(model=model)
        collector.require_data("" if passes == 1 else " in the first pass")
        if isinstance(collector, QuantCalibrationStatsCollector):
            collector.start_second_pass()
            test_fn(model=model)
            collector.stop_second_pass()
    if save_dir is not None:
        collector.save(Path(save_dir) / STATS_FILE)
    return collector.value()


@dataclass(slots=True)
class _Stream:
    """One input, or the output, of a module."""

    first: RangeObserver = field(default_factory=RangeObserver)
    second: DeviationObserver | None = None

    @property
    def numel(self) -> int:
        return self.first.numel

    @property
    def is_complete(self) -> bool:
        """Whether the second pass has seen as much as the first."""
        return (self.second.numel if self.second else 0) == self.first.numel

    def result(self) -> dict[str, Any]:
        deviation = self.second.result() if self.second and self.is_complete else {}
        shape = shape_text(self.first.shape)
        return {**self.first.result(), **deviation, "shape": shape, "total_numel": self.first.numel}


class QuantCalibrationStatsCollector(QuantStatsCollector[_Stream]):
    """Two exact passes over the data: range and mean, then std and b around that mean.

    Before the second pass is over records lack `std` and `b`.
    """

    def reset(self) -> None:
        """Forget everything collected; the next pass is a first pass."""
        super().reset()
        self._in_second_pass = False

    def start_second_pass(self) -> None:
        """From here on the data are the second pass: the same data once more.

        Raises:
            StatsError: there was no first pass, or it met a value that is not finite.
        """
        self.require_data(" in the first pass")
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

    def _lack(self) -> str | None:
        if self._records and all(stream.is_complete for _, stream in self._streams()):
            return None
        return "std and b need a second pass over the data; call start_second_pass()"

    def _new_stream(self) -> _Stream:
        return _Stream()

    def _reduced(self, stream: _Stream, x: Tensor) -> _Reduction:
        """The reduction of `x` for the pass; the one made before where `x` has not changed since.

        A tensor is one module's output and the next one's input: it is reduced once.
        """
        mean = stream.first.mean if self._in_second_pass else None
        version = version_of(x)
        known = self._reductions.get(x)
        if known is None or known.version is None or (known.version, known.mean) != (version, mean):
            sums = range_sums(x) if mean is None else deviation_sums(x, mean)
            known = self._reductions[x] = _Reduction(version, mean, sums)
        return known

    def _add_up(self, taken: Sequence[Taken[_Stream]]) -> None:
        _fetch([item.reduction for item in taken])
        for item in taken:
            stream = item.stream
            if self._in_second_pass:
                stream.second = stream.second or DeviationObserver(stream.first.mean)
                stream.second.add(item.reduction.sums, item.shape)
            else:
                stream.first.add(item.reduction.sums, item.shape)

    def _forget_tensors(self) -> None:
        super()._forget_tensors()
        self._reductions = WeakTensorKeyDictionary()


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
