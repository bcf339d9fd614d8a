"""Statistics of activations in training and test, to look at: what `--activation-stats` collects.

A summary is one number, or one for each channel, of each layer over all data; records are a few numbers for
each sample. Both are saved as tables (CSV).
Knows nothing about phases of training, or what the numbers are for.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distiller.atomic_file import write_whole
from distiller.data_loggers.activation_channels import (
    activation_channels_apoz,
    activation_channels_l1,
    activation_channels_means,
)
from distiller.data_loggers.collector import ActivationCollector, measurable
from distiller.errors import StatsError, UsageError, users_code

__all__ = [
    "CollectorDirection",
    "RecordsActivationStatsCollector",
    "Statistic",
    "SummaryActivationStatsCollector",
    "activation_stats_collectors",
    "columns",
]

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)
_RECORDED = ("min", "max", "mean", "std", "l2")

Statistic = float | list[float]
"""A number for a layer, or one for each of its channels."""


class CollectorDirection(Enum):
    """Which side of a module is looked at."""

    OUT = "output"
    IN = "inputs"


def activation_stats_collectors(
    model: nn.Module,
) -> dict[str, SummaryActivationStatsCollector | RecordsActivationStatsCollector]:
    """The collectors of `--activation-stats`, by the names of their statistics, as in Distiller.

    `sparsity_ofm` (percent of zeros), `l1_channels`, `apoz_channels` and `mean_channels` of the outputs of
    ReLU, ReLU6 and LeakyReLU modules, and `records` of those of convolutions.

    Raises:
        UsageError: the model runs as several copies at once (DataParallel).
    """
    summaries = {
        "sparsity_ofm": percent_of_zeros,
        "l1_channels": activation_channels_l1,
        "apoz_channels": activation_channels_apoz,
        "mean_channels": activation_channels_means,
    }
    return {
        **{name: SummaryActivationStatsCollector(model, name, of) for name, of in summaries.items()},
        "records": RecordsActivationStatsCollector(model, (nn.Conv2d,)),
    }


def percent_of_zeros(activation: Tensor) -> Tensor:
    """100 * sparsity: how many in a hundred values are zero; a scalar."""
    return 100 * (activation == 0).sum(dtype=torch.float64) / activation.numel()


def columns(value: Mapping[str, Any]) -> dict[str, Statistic]:
    """What `SummaryActivationStatsCollector.value` gives, as one column for each layer.

    A layer with several kinds of result has several: `relu/64` and `relu/256`.
    """
    found: dict[str, Statistic] = {}
    for layer, statistic in value.items():
        if isinstance(statistic, Mapping):
            found |= {f"{layer}/{kind}": part for kind, part in statistic.items()}
        else:
            found[layer] = statistic
    return found


class SummaryActivationStatsCollector(ActivationCollector):
    """The mean over all data of a function of each layer's activations.

    Each call of a module weighs by the number of its elements, so that the mean does not depend on how the
    data are cut into batches. Calls of one module count together where the function gives equally
    many numbers; where it does not (one ReLU behind convolutions of other widths), they are kept apart.

    Attributes:
        stat_name: what the statistic is called.
    """

    def __init__(
        self,
        model: nn.Module,
        stat_name: str,
        summary_fn: Callable[[Tensor], Tensor | float],
        classes: Sequence[type[nn.Module]] | None = _ACTIVATIONS,
        collector_direction: CollectorDirection = CollectorDirection.OUT,
        inputs_consolidate_func: Callable[[list[Tensor]], Tensor] = torch.cat,
    ) -> None:
        """Choose the modules, and what to compute.

        Args:
            model: the model.
            stat_name: what the statistic is called.
            summary_fn: (batch, ...) -> a number, or one for each channel, as a mean over the batch; is given
                detached tensors of floating point.
            classes: types of module to look at; None for all.
            collector_direction: whether to look at outputs or inputs. Several outputs count one by one.
            inputs_consolidate_func: makes one tensor of several inputs.

        Raises:
            UsageError: the model runs as several copies at once (DataParallel).
        """
        super().__init__(model, classes)
        self.stat_name = stat_name
        self._summary = summary_fn
        self._direction = collector_direction
        self._consolidate = inputs_consolidate_func
        self.reset()

    def reset(self) -> None:
        """Forget everything collected."""
        self._sums: dict[str, dict[str, tuple[Tensor, int]]] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been collected."""
        return not self._sums

    def on_inputs(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Summarise the inputs, before the module may change them."""
        if self._direction is CollectorDirection.IN:
            tensors = [x.detach() for x in measurable(inputs)]
            if len(tensors) > 1:
                with users_code(f"{self.stat_name}: inputs of '{name}' cannot be made one"), torch.no_grad():
                    tensors = [self._consolidate(tensors)]
            self._take(name, tensors)

    def on_output(self, name: str, module: nn.Module, output: Any) -> None:
        """Summarise the output."""
        if self._direction is CollectorDirection.OUT:
            self._take(name, measurable(output))

    def value(self) -> dict[str, Any]:
        """The statistic by canonical module name, in the order of the forward pass.

        Returns:
            A number, or a list with one for each channel; where the calls of a module gave several kinds
            of these, a dict of them: by the number of channels, the single number as `all`.
        """
        found: dict[str, Any] = {}
        for name, kinds in self._sums.items():
            means = {kind: (total / count).tolist() for kind, (total, count) in kinds.items()}
            found[name] = means if len(means) > 1 else next(iter(means.values()))
        return found

    def save(self, fname: str | Path) -> Path:
        """Write a column for each layer (`columns`), headed by its name, as CSV; `.csv` is appended.

        Raises:
            StatsError: nothing was collected, or the file cannot be written.
        """
        table = columns(self.value())
        lists = [statistic if isinstance(statistic, list) else [statistic] for statistic in table.values()]
        return _write_csv(fname, list(table), zip_longest(*lists, fillvalue=""))

    def _take(self, name: str, tensors: list[Tensor]) -> None:
        for x in tensors:
            with users_code(f"{self.stat_name}: of '{name}'"), torch.no_grad():
                summary = torch.as_tensor(self._summary(x.detach())).double()
            if summary.dim() > 1:
                raise UsageError(
                    f"{self.stat_name}: of '{name}': must be a number or one for each channel, "
                    f"got shape {tuple(summary.shape)}"
                )
            kinds = self._sums.setdefault(name, {})
            kind = str(len(summary)) if summary.dim() else "all"
            total, count = kinds.get(kind, (0.0, 0))
            kinds[kind] = total + summary * x.numel(), count + x.numel()


class RecordsActivationStatsCollector(ActivationCollector):
    """For each sample the min, max, mean, std (with n - 1) and L2 norm of each layer's activations."""

    def __init__(self, model: nn.Module, classes: Sequence[type[nn.Module]] | None = _ACTIVATIONS) -> None:
        """Choose the modules.

        Args:
            model: the model.
            classes: types of module to look at; None for all.

        Raises:
            UsageError: the model runs as several copies at once (DataParallel).
        """
        super().__init__(model, classes)
        self.reset()

    def reset(self) -> None:
        """Forget everything collected."""
        self._rows: dict[str, list[tuple[str, Tensor]]] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been collected."""
        return not self._rows

    def on_inputs(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Inputs are not recorded."""

    def on_output(self, name: str, module: nn.Module, output: Any) -> None:
        """Record each sample of the output."""
        for x in measurable(output):
            samples = x.detach().reshape(x.shape[0] if x.dim() else 1, -1)
            samples = samples if samples.dtype == torch.float64 else samples.float()
            statistics = [
                samples.amin(1),
                samples.amax(1),
                samples.mean(1),
                samples.std(1, correction=min(1, samples.shape[1] - 1)),
                samples.norm(dim=1),
            ]
            rows = torch.stack(statistics, 1).cpu()  # (samples, statistics)
            self._rows.setdefault(name, []).append((_shape(x), rows))

    def value(self) -> dict[str, Any]:
        """Lists by canonical module name, an item for each sample, in the order in which they ran.

        Returns:
            `{"shape": [...], "min": [...], "max": [...], "mean": [...], "std": [...], "l2": [...]}`; the
            shape is that of one sample, as a text.
        """
        return {
            name: {
                "shape": [shape for shape, rows in parts for _ in rows],
                **dict(zip(_RECORDED, torch.cat([rows for _, rows in parts]).t().tolist(), strict=True)),
            }
            for name, parts in self._rows.items()
        }

    def save(self, fname: str | Path) -> Path:
        """Write a row for each sample of each layer (layer, shape, min, ...) as CSV; `.csv` is appended.

        Raises:
            StatsError: nothing was collected, or the file cannot be written.
        """
        rows = (
            (name, shape, *numbers)
            for name, parts in self._rows.items()
            for shape, part in parts
            for numbers in part.tolist()
        )
        return _write_csv(fname, ["layer", "shape", *_RECORDED] if self._rows else [], rows)


def _shape(x: Tensor) -> str:
    """`(6, 8, 8)`: the shape of one sample."""
    return f"({', '.join(map(str, x.shape[1:]))})"


def _write_csv(fname: str | Path, header: list[str], rows: Iterable[Iterable[Any]]) -> Path:
    """Write a table whole or not at all; returns its path."""
    path = Path(fname)
    if path.suffix != ".csv":
        path = path.with_name(f"{path.name}.csv")
    if not header:
        raise StatsError(
            f"{path}: nothing was collected; run the model, with modules of the classes looked at, while the "
            "collector is attached"
        )
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    try:
        write_whole(path, text.getvalue())
    except OSError as error:
        raise StatsError(f"{path}: cannot be written, {error.strerror or error}") from error
    return path
