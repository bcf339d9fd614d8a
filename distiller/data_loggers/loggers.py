"""Where the numbers of a training run go: a log, TensorBoard, a table.

The training loop makes one call per event, with plain numbers; each logger takes
what it can show and passes over the rest. Adding a kind of event means adding a
method to `Logger`. Knows nothing about models, schedules or devices.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Protocol

import numpy as np
from tabulate import tabulate

from distiller.atomic_file import write_whole
from distiller.errors import UsageError


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """An epoch in one row.

    Attributes:
        epoch: from 0.
        lr: learning rate of the first parameter group.
        train_overall_loss: mean over the epoch as training went, with the penalties of the schedule;
            `valid_loss` is without.
        train_top1: percent.
        train_top5: percent.
        valid_loss: mean.
        valid_top1: percent.
        valid_top5: percent.
        sparsity: of the weights, 0..1.
        seconds: wall time of training and validation.
    """

    epoch: int
    lr: float
    train_overall_loss: float
    train_top1: float
    train_top5: float
    valid_loss: float
    valid_top1: float
    valid_top5: float
    sparsity: float
    seconds: float


def result_line(loss: float, top1: float, top5: float) -> str:
    """`==> Top1: 91.250    Top5: 99.500    Loss: 0.301`; `top1` and `top5` in percent."""
    return f"==> Top1: {top1:.3f}    Top5: {top5:.3f}    Loss: {loss:.3f}"


class Logger(Protocol):
    """A sink of events; every method may be left out and then does nothing."""

    def log_training_step(self, epoch: int, completed: int, total: int, scalars: Mapping[str, float]) -> None:
        """Some mini-batches of an epoch are done.

        Args:
            epoch: from 0.
            completed: mini-batches done in this epoch.
            total: mini-batches in an epoch.
            scalars: in the order to be shown; names as in Distiller: `Overall Loss` (with
                penalties), `Objective Loss` (without), `<Regularizer>_loss`, `Top1`, `Top5` (percent),
                each over the epoch so far; `LR`; `Time` (seconds per mini-batch).
        """

    def log_validation(self, epoch: int, loss: float, top1: float, top5: float) -> None:
        """Validation after an epoch is done; `top1` and `top5` in percent."""

    def log_weight_sparsity(self, epoch: int, by_param: Mapping[str, float], total: float) -> None:
        """The sparsity (0..1) of each weight tensor, and of all of them together."""

    def log_kernel_sparsity(self, epoch: int, by_param: Mapping[str, float]) -> None:
        """The share (0..1) of all-zero kernels (convolutions) or rows (matrices) of each weight tensor."""

    def log_parameter_histograms(self, epoch: int, by_param: Mapping[str, np.ndarray]) -> None:
        """The values of each parameter, in any shape, after an epoch."""

    def log_activation_statistics(
        self, epoch: int, phase: str, by_statistic: Mapping[str, Mapping[str, float | Sequence[float]]]
    ) -> None:
        """Statistics of activations over a phase.

        Args:
            epoch: from 0; of a test, the last one trained.
            phase: train, valid or test.
            by_statistic: for each statistic, by layer, a number or one for each channel.
        """

    def log_epoch(self, record: EpochRecord) -> None:
        """An epoch is over, validation included."""

    def close(self) -> None:
        """Nothing more will come."""


class NullLogger(Logger):
    """Takes nothing; for runs that write no files."""


class PythonLogger(Logger):
    """Lines in a log of Python's `logging`.

    Args:
        log: who sets its handlers and level is not this class's concern.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log

    def log_training_step(
        self,
        epoch: int,
        completed: int,
        total: int,
        scalars: Mapping[str, float],
        level: int = logging.INFO,
    ) -> None:
        """`Epoch: [3][   20/  352]    Overall Loss 0.693147    Top1 51.562500`, at `level`."""
        shown = "    ".join(f"{name} {value:.6f}" for name, value in scalars.items())
        self._log.log(level, "Epoch: [%d][%5d/%5d]    %s", epoch, completed, total, shown)

    def log_validation(self, epoch: int, loss: float, top1: float, top5: float) -> None:
        """The line of `result_line`."""
        self._log.info(result_line(loss, top1, top5))

    def log_weight_sparsity(self, epoch: int, by_param: Mapping[str, float], total: float) -> None:
        """`Total sparsity: 80.00` in percent; each tensor's at level DEBUG."""
        for name, sparsity in by_param.items():
            self._log.debug("Sparsity of %s: %.2f", name, 100 * sparsity)
        self._log.info("Total sparsity: %.2f", 100 * total)

    def log_activation_statistics(
        self, epoch: int, phase: str, by_statistic: Mapping[str, Mapping[str, float | Sequence[float]]]
    ) -> None:
        """A table with a row for each layer; of a statistic with a number for each channel, their mean."""
        layers = list(dict.fromkeys(layer for by_layer in by_statistic.values() for layer in by_layer))
        rows = [
            [layer, *(_mean(by_layer.get(layer, ())) for by_layer in by_statistic.values())]
            for layer in layers
        ]
        table = tabulate(
            rows, headers=["Layer", *by_statistic], tablefmt="psql", floatfmt=".3f", disable_numparse=[0]
        )
        self._log.info("Activations (%s, epoch %d; means over channels):\n%s", phase, epoch, table)


class TensorBoardLogger(Logger):
    """Scalars in a TensorBoard event file, under Distiller's tags.

    Args:
        log_dir: folder of the event file; made when missing.
    """

    def __init__(self, log_dir: str | Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second of import, wanted by this class alone

        self._writer = SummaryWriter(str(log_dir), flush_secs=1)

    def log_training_step(self, epoch: int, completed: int, total: int, scalars: Mapping[str, float]) -> None:
        """`Performance/Training/<name>` at step `total * epoch + completed`."""
        for name, value in scalars.items():
            self._writer.add_scalar(f"Performance/Training/{name}", value, total * epoch + completed)

    def log_validation(self, epoch: int, loss: float, top1: float, top5: float) -> None:
        """`Performance/Validation/{Loss,Top1,Top5}` at step `epoch`."""
        for name, value in (("Loss", loss), ("Top1", top1), ("Top5", top5)):
            self._writer.add_scalar(f"Performance/Validation/{name}", value, epoch)

    def log_weight_sparsity(self, epoch: int, by_param: Mapping[str, float], total: float) -> None:
        """`sparsity/weights/<param>` and `sparsity/weights/total`, in percent, at step `epoch`."""
        for name, sparsity in {**by_param, "total": total}.items():
            self._writer.add_scalar(f"sparsity/weights/{name}", 100 * sparsity, epoch)

    def log_kernel_sparsity(self, epoch: int, by_param: Mapping[str, float]) -> None:
        """`sparsity-2D/weights/<param>`, in percent, at step `epoch`."""
        for name, sparsity in by_param.items():
            self._writer.add_scalar(f"sparsity-2D/weights/{name}", 100 * sparsity, epoch)

    def log_parameter_histograms(self, epoch: int, by_param: Mapping[str, np.ndarray]) -> None:
        """A histogram of 200 bins of the finite values, tag `a/b/weight`, at step `epoch`."""
        for name, values in by_param.items():
            self._histogram(name.replace(".", "/"), values, epoch)

    def log_activation_statistics(
        self, epoch: int, phase: str, by_statistic: Mapping[str, Mapping[str, float | Sequence[float]]]
    ) -> None:
        """`<statistic>/activations/<phase>/<layer>` at step `epoch`: a scalar, or a histogram of channels."""
        for statistic, by_layer in by_statistic.items():
            for layer, value in by_layer.items():
                tag = f"{statistic}/activations/{phase}/{layer}"
                if isinstance(value, Sequence):
                    self._histogram(tag, np.asarray(value), epoch)
                else:
                    self._writer.add_scalar(tag, value, epoch)

    def log_epoch(self, record: EpochRecord) -> None:
        """Brings what came so far to disk, so that a killed run keeps its finished epochs."""
        self._writer.flush()

    def close(self) -> None:
        """Bring everything to disk and close the event file."""
        self._writer.close()

    def _histogram(self, tag: str, values: np.ndarray, epoch: int) -> None:
        finite = values[np.isfinite(values)]
        if finite.size:
            self._writer.add_histogram(tag, finite, epoch, bins=200)  # pyright: ignore[reportArgumentType]


class CsvLogger(Logger):
    """`epochs.csv`: a row an epoch, on disk as soon as the epoch is over.

    A file that is there is continued. An epoch that is run again (after a resume)
    replaces its row and drops the rows after it.

    Args:
        folder: an existing folder.

    Raises:
        UsageError: the folder's `epochs.csv` is something else.
    """

    COLUMNS = tuple(field.name for field in fields(EpochRecord))

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "epochs.csv"
        if not self.path.exists():
            self._rewrite([])
        self._epochs = [int(row[0]) for row in self._rows()]

    def log_epoch(self, record: EpochRecord) -> None:
        """Add the epoch's row."""
        if self._epochs and self._epochs[-1] >= record.epoch:
            self._rewrite([row for row in self._rows() if int(row[0]) < record.epoch])
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(astuple(record))
        self._epochs = [epoch for epoch in self._epochs if epoch < record.epoch] + [record.epoch]

    def _rows(self) -> list[list[str]]:
        """The rows below the header; a last row that a killed run left unfinished is cut off."""
        text = self.path.read_text(encoding="utf-8", errors="replace")
        whole, _, unfinished = text.rpartition("\n")
        header, *rows = (line.split(",") for line in whole.split("\n"))
        if tuple(header) != self.COLUMNS or not all(row[0].isdigit() for row in rows):
            raise UsageError(
                f"{self.path}: not a table of epochs of this program; move it away or give another folder"
            )
        if unfinished:
            self._rewrite(rows)
        return rows

    def _rewrite(self, rows: list[list[str]]) -> None:
        write_whole(self.path, "".join(",".join(row) + "\n" for row in [list(self.COLUMNS), *rows]))


def _mean(value: float | Sequence[float]) -> float | None:
    """A number as it is, the mean of several; None where there are none."""
    if isinstance(value, Sequence):
        return sum(value) / len(value) if value else None
    return value
