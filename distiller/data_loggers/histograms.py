"""Histograms of activations over their collected range: what `--activation-histograms` collects.

Knows nothing about how the range was found, or what the histograms are for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from distiller.atomic_file import write_whole
from distiller.data_loggers.collector import ActivationCollector, collector_context, is_measurable, measurable
from distiller.data_loggers.histogram_plot import check_picture_kind, encoded, histogram_figure
from distiller.data_loggers.layer_files import layer_file_name, reporting_failed_writes, write_tensors
from distiller.data_loggers.quant_stats import collect_quant_stats
from distiller.data_loggers.stats_collector import version_of
from distiller.data_loggers.stats_file import check_stats, load_stats
from distiller.errors import StatsError, UsageError
from distiller.names import named_modules

__all__ = [
    "HISTOGRAMS_FILE",
    "HISTOGRAM_IMAGES_FOLDER",
    "ActivationHistogramsCollector",
    "Histogram",
    "collect_histograms",
    "histogram_of",
]

HISTOGRAMS_FILE = "acts_histograms.pt"
HISTOGRAM_IMAGES_FOLDER = "histogram_imgs"
_NBINS = 2048
_PART = 1 << 22  # elements counted at a time: counts up to 2^24 are exact in single precision


class Histogram(NamedTuple):
    """How many values there are in each of some bins of equal width.

    Attributes:
        hist: (nbins,), int64: the counts.
        bin_centroids: (nbins,), float64: the middles of the bins.
    """

    hist: Tensor
    bin_centroids: Tensor


def histogram_of(
    x: Tensor, low: float | None = None, high: float | None = None, nbins: int = _NBINS
) -> Histogram:
    """The histogram of a tensor between two values; what lies outside counts in the first or last bin.

    Args:
        x: any shape, floating point of any precision, at least one element.
        low: lower end of the first bin; None: the smallest element.
        high: upper end of the last bin, which it belongs to; None: the largest element. A range of no width
            is widened by 1 on either side, as torch.histc does.
        nbins: number of bins.

    Returns:
        The histogram, on the host; the counts of several tensors over the same range may be added.

    Raises:
        StatsError: a value of the tensor is NaN or infinite.
        UsageError: there is no such range, or no bin.
    """
    if not is_measurable(x):
        raise UsageError(
            f"histogram_of: a tensor of floating point wanted, got {x.dtype} of {x.numel()} elements"
        )
    x = x.detach().reshape(-1)
    if not bool(torch.isfinite(x).all()):
        raise StatsError("histogram_of: the tensor has NaN or infinite values")
    low = x.min().item() if low is None else low
    high = x.max().item() if high is None else high
    first, last = _checked_range(low, high, nbins)
    width = (last - first) / nbins
    middles = first + width * (torch.arange(nbins, dtype=torch.float64) + 0.5)
    is_double = x.dtype == torch.float64 or np.float32(first) == np.float32(last)
    counts = torch.zeros(nbins, dtype=torch.int64)
    for part in x.split(_PART):
        values = (part.double() if is_double else part.float()).clamp(first, last)
        counts += torch.histc(values, nbins, first, last).cpu().long()
    return Histogram(counts, middles)


def collect_histograms(
    model: nn.Module,
    test_fn: Callable[..., Any],
    save_dir: str | Path | None = None,
    activation_stats: str | Path | Mapping[str, Any] | None = None,
    classes: Sequence[type[nn.Module]] | None = None,
    nbins: int = _NBINS,
    save_hist_imgs: bool = False,
    hist_imgs_ext: str = ".svg",
) -> dict[str, Any]:
    """Histograms of the leaf modules' inputs and outputs over the data that `test_fn` feeds.

    Args:
        model: the model.
        test_fn: called as `test_fn(model=model)`; runs the model on the data in evaluation mode.
        save_dir: existing folder to write `acts_histograms.pt` into, and `histogram_imgs/` with the pictures;
            None writes nothing.
        activation_stats: a file of statistics or its content, for the ranges; None: `test_fn` is called once
            more before, to collect them in one pass, and they are written into `save_dir` too.
        classes: types of module to look at; None for all.
        nbins: number of bins.
        save_hist_imgs: draw a picture of each histogram.
        hist_imgs_ext: kind of picture: .svg, .png or .pdf.

    Returns:
        As `ActivationHistogramsCollector.value`.

    Raises:
        StatsError: nothing was run, the statistics are of another model, a value is not finite, or the folder
            cannot be written.
        UsageError: there is no such kind of picture, or no bin.
    """
    if save_dir is not None and not Path(save_dir).is_dir():
        raise StatsError(f"{save_dir}: no such folder to write {HISTOGRAMS_FILE} into; make it first")
    _check_nbins(nbins)
    check_picture_kind(hist_imgs_ext)
    if activation_stats is None:
        activation_stats = collect_quant_stats(model, test_fn, save_dir, classes, passes=1)
    collector = ActivationHistogramsCollector(
        model, activation_stats, classes, nbins, save_hist_imgs, hist_imgs_ext
    )
    with collector_context(collector):
        test_fn(model=model)
    collector.require_data()
    if save_dir is not None:
        collector.save(Path(save_dir) / HISTOGRAMS_FILE)
    return collector.value()


@dataclass(slots=True)
class _Counts:
    inputs: dict[int, Histogram] = field(default_factory=dict)
    output: Histogram | None = None


class ActivationHistogramsCollector(ActivationCollector):
    """Histograms of what goes into and comes out of modules, each between its collected min and max.

    Calls of one module count together, and so do the tensors that one call returns. Tensors of integers
    are not counted. Memory: nbins * 8 bytes for each input and output.
    """

    def __init__(
        self,
        model: nn.Module,
        activation_stats: str | Path | Mapping[str, Any],
        classes: Sequence[type[nn.Module]] | None = None,
        nbins: int = _NBINS,
        save_hist_imgs: bool = False,
        hist_imgs_ext: str = ".svg",
    ) -> None:
        """Choose the modules, and take their ranges from statistics.

        Args:
            model: the model.
            activation_stats: statistics of this model, as `collect_quant_stats` returns or writes them.
            classes: types of module to look at; None for all.
            nbins: number of bins.
            save_hist_imgs: `save` draws a picture of each histogram too.
            hist_imgs_ext: kind of picture: .svg, .png or .pdf.

        Raises:
            StatsError: the statistics are malformed or of another model.
            UsageError: there is no such kind of picture, or no bin; or the model runs as several copies
                at once (DataParallel).
        """
        super().__init__(model, classes)
        _check_nbins(nbins)
        check_picture_kind(hist_imgs_ext)
        is_content = isinstance(activation_stats, Mapping)
        self._source = "activation statistics" if is_content else str(activation_stats)
        self._stats = load_stats(activation_stats)
        check_stats(self._stats, [name for name, _ in named_modules(self.model)], self._source)
        self._nbins = nbins
        self._picture_kind = hist_imgs_ext if save_hist_imgs else None
        self.reset()

    def reset(self) -> None:
        """Forget everything collected."""
        self._counts: dict[str, _Counts] = {}
        self._forget_tensors()

    def stop(self) -> None:
        """Take the hooks off."""
        super().stop()
        self._forget_tensors()

    def on_inputs(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Count the inputs, before the module may change them."""
        counts = self._counts.setdefault(name, _Counts())
        for index, value in enumerate(inputs):
            if is_measurable(value):
                record = self._stats.get(name, {}).get("inputs", {}).get(index)
                found = self._histogram(f"{name}.inputs[{index}]", record, value)
                counts.inputs[index] = _added(counts.inputs.get(index), found)

    def on_output(self, name: str, module: nn.Module, output: Any) -> None:
        """Count the output."""
        counts = self._counts.setdefault(name, _Counts())
        for value in measurable(output):
            record = self._stats.get(name, {}).get("output")
            counts.output = _added(counts.output, self._histogram(f"{name}.output", record, value))

    def require_data(self) -> None:
        """See to it that something was collected.

        Raises:
            StatsError: no module was run.
        """
        if not self.value():
            raise StatsError(
                f"{type(self).__name__}: no module of the model was run; "
                "the model must be called while the collector is attached"
            )

    def value(self) -> dict[str, Any]:
        """The histograms by canonical module name, in the order of the forward pass.

        Returns:
            For each module whose output was seen `{"inputs": {index: histogram}, "output": histogram}`, where
            a histogram is `{"hist": counts, "bin_centroids": middles of the bins}`, as in `Histogram`.
        """
        return {
            name: {
                "inputs": {index: found._asdict() for index, found in sorted(counts.inputs.items())},
                "output": counts.output._asdict(),
            }
            for name, counts in self._counts.items()
            if counts.output is not None
        }

    def save(self, fname: str | Path) -> Path:
        """Write `value()` as `torch.load(path, weights_only=True)` reads it; `.pt` is appended where missing.

        With `save_hist_imgs` pictures go into the folder `histogram_imgs` beside the file, which is made:
        `007-layer1.0.conv1-output.svg`, with the number of the layer in the order of the forward pass.

        Raises:
            StatsError: nothing was collected, or a file cannot be written.
        """
        path = Path(fname)
        if path.suffix != ".pt":
            path = path.with_name(f"{path.name}.pt")
        self.require_data()
        write_tensors(path, self.value())
        if self._picture_kind is not None:
            self._save_pictures(path.parent / HISTOGRAM_IMAGES_FOLDER, self._picture_kind)
        return path

    def _save_pictures(self, folder: Path, kind: str) -> None:
        with reporting_failed_writes(folder):
            folder.mkdir(exist_ok=True)
        for index, (name, entry) in enumerate(self.value().items()):
            tensors = {f"input_{i}": found for i, found in entry["inputs"].items()}
            for tensor, found in {**tensors, "output": entry["output"]}.items():
                figure = histogram_figure(found["hist"], found["bin_centroids"], f"{name}: {tensor}")
                picture = folder / f"{layer_file_name(index, name, tensor)}{kind}"
                with reporting_failed_writes(picture):
                    write_whole(picture, encoded(figure, kind))

    def _histogram(self, where: str, record: Mapping[str, Any] | None, x: Tensor) -> Histogram:
        """The histogram of `x`: the one made before where range and `x` are the same."""
        if record is None:
            raise StatsError(
                f"{self._source}: {where} is not there; collect the statistics from this model again"
            )
        key = (version_of(x), record["min"], record["max"])
        known, found = self._seen.get(x, (None, None))
        if found is None or known != key or key[0] is None:
            try:
                found = histogram_of(x, record["min"], record["max"], self._nbins)
            except StatsError as error:
                raise StatsError(f"{where}: NaN or infinite values; is the model trained?") from error
            self._seen[x] = key, found
        return found

    def _forget_tensors(self) -> None:
        self._seen: MutableMapping[Tensor, tuple[Any, Histogram]] = WeakTensorKeyDictionary()


def _added(before: Histogram | None, more: Histogram) -> Histogram:
    return more if before is None else Histogram(before.hist + more.hist, before.bin_centroids)


def _check_nbins(nbins: int) -> None:
    if not isinstance(nbins, int) or isinstance(nbins, bool) or nbins < 1:
        raise UsageError(f"nbins: a number of bins from 1 wanted, got {nbins!r}")


def _checked_range(low: float, high: float, nbins: int) -> tuple[float, float]:
    _check_nbins(nbins)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise UsageError(
            f"histogram_of: low and high: finite, and low at most high, wanted, got {low} and {high}"
        )
    return (low - 1.0, high + 1.0) if low == high else (low, high)
