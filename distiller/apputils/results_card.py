"""What a run achieved, with nothing left out that a reader would ask for.

Sets the figures of one model beside those of the uncompressed reference, and of the float model that
was quantized, and says what is only simulated. Written as a table and as `results.json`.
Knows nothing about models, training or how figures are taken.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from distiller.apputils.early_exit_report import EarlyExitReport
from distiller.apputils.intervals import wilson_interval
from distiller.apputils.measurement import Measurement
from distiller.atomic_file import write_whole
from distiller.errors import UsageError
from distiller.export.latency import Latency
from distiller.packing import PackReport

SIMULATED_QUANTIZATION = (
    "quantization is computed in float32: latency and checkpoint size are not those of an integer model"
)
SIMULATED_SPARSITY = (
    "sparsity: zeros are stored and multiplied; latency, MACs and checkpoint size are those of "
    "the dense model"
)
SIMULATED_SPARSITY_OF_THINNED = (
    "sparsity: the zeros that are left are stored and multiplied; latency, MACs and checkpoint size are "
    "those of the smaller model with them"
)
THINNED = (
    "filters or channels were physically removed: parameters, MACs, bytes and latency are those of the "
    "smaller network, and were measured"
)
FACTORED = (
    "layers were replaced by products of smaller ones (low rank): parameters, MACs, bytes and latency are "
    "those of the factors, and were measured"
)
COMPUTED_SIZES = (
    "sizes marked * are computed, no such file is written. Sparse: each tensor in the smallest of dense, "
    "bitmap (1 bit an element) + non-zero values, or compressed rows (4 bytes a row, 2 or 4 a column index) "
    "+ non-zero values; values at their own type. Quantized: weights packed at their bits, a 4-byte scale "
    "and a zero point for each tensor (or channel), all else dense"
)


@dataclass(frozen=True, slots=True)
class ResultsCard:
    """A model's figures beside those it is to be compared with.

    Attributes:
        measured: of this run's model.
        reference: of the uncompressed model; None when the run does not know it.
        simulated: what is not as real as the figures make it look, a sentence each.
        before: of the float model that was quantized, when it is not `reference` (it was pruned, or
            trained on); None when it is, or nothing was quantized.
        is_thinned: filters or channels of the model were physically removed.
        is_factored: layers of the model are products of smaller ones.
        teachers: of the networks that it learned from.
        packed: the file that the model was packed into, if it was.
        early_exit: of a test in which images left early; None when there was none.
    """

    measured: Measurement
    reference: Measurement | None = None
    simulated: tuple[str, ...] = ()
    before: Measurement | None = None
    is_thinned: bool = False
    is_factored: bool = False
    teachers: tuple[Measurement, ...] = ()
    packed: PackReport | None = None
    early_exit: EarlyExitReport | None = None

    def to_text(self) -> str:
        """The card as a table, with the statements on what is simulated under it.

        The last column compares with the uncompressed model; when that is not known, with the
        model before quantization; when neither is, with the teacher.
        """
        others = self._others()
        headers = ["", "this model", *others]
        rows = _rows(self.measured, list(others.values()))
        if others:
            headers.append(f"{list(others)[-1]} / this")
        table = tabulate(
            rows, headers, colalign=["left"] + ["right"] * (len(headers) - 1), disable_numparse=True
        )
        notes = [f"real: {THINNED}"] if self.is_thinned else []
        notes += [f"real: {FACTORED}"] if self.is_factored else []
        notes += [] if self.packed is None else [f"real: {self.packed.summary()}"]
        notes += [f"simulated: {statement}" for statement in self.simulated]
        notes += [
            f"{label}: from {figures.source}; its latency was measured in another run, "
            "in which the machine may have been faster or slower"
            for label, figures in others.items()
            if figures.source
        ]
        notes.append(f"* {COMPUTED_SIZES}")
        text = "\n".join([table, *(textwrap.fill(note, 100, subsequent_indent="  ") for note in notes)])
        return text if self.early_exit is None else f"{text}\n\n{self.early_exit.to_text()}"

    def to_json(self) -> dict[str, Any]:
        """The card as plain data; numbers that are not finite become None."""
        return {
            "version": 1,
            "measured": _plain(self.measured),
            "reference": None if self.reference is None else _plain(self.reference),
            "ratios": {} if self.reference is None else ratios(self.measured, self.reference),
            "before_quantization": None if self.before is None else _plain(self.before),
            "ratios_before_quantization": {} if self.before is None else ratios(self.measured, self.before),
            "is_thinned": self.is_thinned,
            "is_factored": self.is_factored,
            "simulated": list(self.simulated),
            "size_formats": COMPUTED_SIZES,
            **({"teachers": [_plain(teacher) for teacher in self.teachers]} if self.teachers else {}),
            **({} if self.packed is None else {"packed": self.packed.to_json()}),
            **({} if self.early_exit is None else {"early_exit": self.early_exit.to_json()}),
        }

    def save(self, path: str | Path) -> Path:
        """Write the card as JSON, whole or not at all; returns the file.

        Raises:
            UsageError: it cannot be written.
        """
        path = Path(path)
        try:
            write_whole(path, json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise UsageError(
                f"{path}: cannot be written, {error.strerror or error}; give a folder that can"
            ) from error
        return path

    def _others(self) -> dict[str, Measurement]:
        """What the model is set beside, by heading; the last is what it is compared with."""
        several = len(self.teachers) > 1
        columns: dict[str, Measurement | None] = {
            f"teacher {number}" if several else "teacher": teacher
            for number, teacher in enumerate(self.teachers, start=1)
        }
        columns |= {"before quantization": self.before, "uncompressed": self.reference}
        return {heading: figures for heading, figures in columns.items() if figures is not None}


def build_card(
    measured: Measurement,
    reference: Measurement | None = None,
    simulated: Sequence[str] = (),
    before: Measurement | None = None,
    is_thinned: bool = False,
    is_factored: bool = False,
) -> ResultsCard:
    """Set a model's figures beside others, and say what of them is only simulated.

    Zeros count as pruned in the float model: quantization rounds small weights to zero by itself.

    Args:
        measured: of this run's model.
        reference: of the uncompressed model.
        simulated: statements to add to those that follow from the figures.
        before: of the float model that was quantized, when it is not `reference`.
        is_thinned: filters or channels of the model were physically removed.
        is_factored: layers of the model are products of smaller ones.
    """
    is_quantized = measured.bytes_quantized is not None
    trained = (before or reference or measured) if is_quantized else measured
    sparsity = SIMULATED_SPARSITY_OF_THINNED if is_thinned or is_factored else SIMULATED_SPARSITY
    statements = [
        *([SIMULATED_QUANTIZATION] if is_quantized else []),
        *([sparsity] if trained.has_pruned_weights else []),
        *simulated,
    ]
    return ResultsCard(measured, reference, tuple(statements), before, is_thinned, is_factored)


def ratios(measured: Measurement, reference: Measurement) -> dict[str, float]:
    """Reference over this model, for what is better when smaller: 4.0 is four times smaller, or faster.

    Sizes are compared like with like, the quantized size with the reference's dense size. Latencies
    only when both were measured in this run, with the same batch, threads and device.
    """
    pairs: dict[str, tuple[float | None, float | None]] = {
        name: (getattr(reference, name), getattr(measured, name))
        for name in ("parameters", "nonzeros", "macs", "bytes_checkpoint", "bytes_dense", "bytes_sparse")
    }
    pairs["bytes_quantized"] = (reference.bytes_dense, measured.bytes_quantized)
    for name in ("latency_single", "latency_batch"):
        ours, theirs = getattr(measured, name), getattr(reference, name)
        is_comparable = ours and theirs and _conditions(ours) == _conditions(theirs) and not reference.source
        if is_comparable:
            pairs[name] = (theirs.median_s, ours.median_s)
    return {name: before / after for name, (before, after) in pairs.items() if before is not None and after}


def _rows(measured: Measurement, others: Sequence[Measurement]) -> list[list[str]]:
    """Label, this model, each other model, ratio to the last; without what was not measured of this model."""
    quotients = [ratios(measured, other) for other in others]

    def row(label: str, name: str, show: Callable[[Any], str], other_name: str | None = None) -> list[str]:
        theirs = [show(getattr(other, other_name or name)) for other in others]
        last = [f"{found[name]:.2f}x" if name in found else "" for found in quotients[-1:]]
        return [label, show(getattr(measured, name)), *theirs, *last]

    rows = [
        *_accuracy_rows("top-1", "top1_correct", measured, others),
        *_accuracy_rows("top-5", "top5_correct", measured, others),
        row("loss", "loss", lambda x: "-" if x is None else f"{x:.4f}"),
        row("parameters", "parameters", _count),
        row("non-zero parameters", "nonzeros", _count),
        row("sparsity of the weights (2-D and up)", "weight_sparsity", _percent),
        row("sparsity of all parameters", "total_sparsity", _percent),
        *_structure_rows([measured, *others]),
        row("MACs for one image", "macs", _count),
        row("bytes of the weights as a checkpoint", "bytes_checkpoint", _count),
        row("bytes stored dense *", "bytes_dense", _count),
        row("bytes stored sparse *", "bytes_sparse", _count),
        row("bytes stored at the quantized width *", "bytes_quantized", _count, "bytes_dense"),
    ]
    for name in ("latency_single", "latency_batch"):
        latency: Latency | None = getattr(measured, name)
        if latency is not None:
            cells = row(f"median latency, {_conditions_text(latency)}", name, _milliseconds)
            for column, found in enumerate(quotients, start=2):
                if name not in found:
                    cells[column] = "-"
            rows.append(cells)
    return [row for row in rows if row[1] != "-"]


def _structure_rows(figures: Sequence[Measurement]) -> list[list[str]]:
    """Filters and channels that are all zero, of each model, if any has such."""
    rows: list[list[str]] = []
    for label, zeros, total in (
        ("convolutions' filters that are all zero", "zero_filters", "filters"),
        ("convolutions' input channels that are all zero", "zero_channels", "channels"),
    ):
        pairs = [(getattr(model, zeros), getattr(model, total)) for model in figures]
        if any(zero for zero, _ in pairs):
            cells = ["-" if zero is None else f"{zero:,} of {count:,}" for zero, count in pairs]
            rows.append([label, *cells, *([""] if len(figures) > 1 else [])])
    return rows


def _accuracy_rows(
    label: str, name: str, measured: Measurement, others: Sequence[Measurement]
) -> list[list[str]]:
    """Percent with k/n, and its interval, of each model; the change from the last one to this."""
    counts, intervals, percents = [], [], []
    for measurement in (measured, *others):
        correct, n = getattr(measurement, name), measurement.n
        if correct is None or n is None:
            counts.append("-")
            intervals.append("-")
            percents.append(None)
            continue
        low, high = wilson_interval(correct, n)
        percents.append(100 * correct / n)
        counts.append(f"{correct:,}/{n:,} = {percents[-1]:.2f} %")
        intervals.append(f"{100 * low:.2f} to {100 * high:.2f} %")
    if not others:
        return [[label, *counts], [f"{label}, 95 % interval", *intervals]]
    now, then = percents[0], percents[-1]
    change = "" if now is None or then is None else f"{now - then:+.2f} points"
    return [[label, *counts, change], [f"{label}, 95 % interval", *intervals, ""]]


def _conditions(latency: Latency) -> tuple[int, int, str]:
    return latency.batch_size, latency.threads, latency.device


def _conditions_text(latency: Latency) -> str:
    threads = "1 thread" if latency.threads == 1 else f"{latency.threads} threads"
    return f"batch {latency.batch_size} ({latency.device}, {threads})"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.2f} %"


def _milliseconds(latency: Latency | None) -> str:
    return "-" if latency is None else f"{1000 * latency.median_s:.3f} ms"


def _plain(measurement: Measurement) -> dict[str, Any]:
    """The figures as JSON, with percent and interval of each accuracy."""
    plain = asdict(measurement)
    if plain["loss"] is not None and not math.isfinite(plain["loss"]):
        plain["loss"] = None
    for name in ("top1", "top5"):
        correct, n = plain[f"{name}_correct"], plain["n"]
        if correct is not None:
            plain[f"{name}_percent"] = 100 * correct / n
            plain[f"{name}_interval_95_percent"] = [100 * end for end in wilson_interval(correct, n)]
    return plain
