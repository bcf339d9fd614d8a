"""What a run achieved, with nothing left out that a reader would ask for.

`measure` takes the figures of one model, `ResultsCard` sets them beside those of the
uncompressed reference and says what is only simulated. Written as a table and as
`results.json`. Knows nothing about training, data or quantizers.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from distiller.apputils.intervals import wilson_interval
from distiller.apputils.meters import EvalResult
from distiller.atomic_file import write_whole
from distiller.errors import UsageError
from distiller.export.latency import Latency, measure_latencies, measure_latency
from distiller.export.size import dense_bytes, quantized_bytes, serialized_bytes, sparse_bytes
from distiller.names import canonical_state_dict, named_parameters

SIMULATED_QUANTIZATION = (
    "quantization is computed in float32: latency and checkpoint size are not those of an integer model"
)
SIMULATED_SPARSITY = (
    "sparsity: zeros are stored and multiplied; latency, MACs and checkpoint size are those of "
    "the dense model"
)
COMPUTED_SIZES = (
    "sizes marked * are computed, no such file is written. Sparse: each tensor in the smallest of dense, "
    "bitmap (1 bit an element) + non-zero values, or compressed rows (4 bytes a row, 2 or 4 a column index) "
    "+ non-zero values; values at their own type. Quantized: weights packed at their bits, a 4-byte scale "
    "and a zero point for each tensor (or channel), all else dense"
)


@dataclass(frozen=True, slots=True)
class Measurement:
    """The figures of one model; None is what was not measured.

    Attributes:
        top1_correct: images whose label has the highest logit, of `n`.
        top5_correct: images whose label is among the five highest, of `n`.
        n: images.
        loss: mean over the images.
        parameters: elements of all parameters.
        nonzeros: those that are not zero.
        weight_sparsity: zeros among the parameters of two or more dimensions, 0..1.
        total_sparsity: zeros among all parameters, 0..1.
        macs: multiply-accumulates for one image.
        bytes_checkpoint: the state dict as a file.
        bytes_dense: its tensors at their types.
        bytes_sparse: its tensors, each in its smallest format.
        bytes_quantized: its tensors, those that are quantized packed at their bits.
        latency_single: of one image.
        latency_batch: of the evaluation's batch.
        source: the file the figures were read from; None when they were measured in this run.
    """

    top1_correct: int | None
    top5_correct: int | None
    n: int | None
    loss: float | None
    parameters: int
    nonzeros: int
    weight_sparsity: float
    total_sparsity: float
    macs: int | None
    bytes_checkpoint: int
    bytes_dense: int
    bytes_sparse: int
    bytes_quantized: int | None
    latency_single: Latency | None
    latency_batch: Latency | None
    source: str | None = None


@dataclass(frozen=True, slots=True)
class ResultsCard:
    """A model's figures beside those of the uncompressed reference.

    Attributes:
        measured: of this run's model.
        reference: of the uncompressed model; None when the run does not know it.
        simulated: what is not as real as the figures make it look, a sentence each.
    """

    measured: Measurement
    reference: Measurement | None = None
    simulated: tuple[str, ...] = ()

    def to_text(self) -> str:
        """The card as a table, with the statements on what is simulated under it."""
        rows = _rows(self.measured, self.reference)
        headers = ["", "this model"]
        if self.reference is None:
            rows = [row[:2] for row in rows]
        else:
            headers += ["uncompressed", "uncompressed / this"]
        table = tabulate(
            rows, headers, colalign=["left"] + ["right"] * (len(headers) - 1), disable_numparse=True
        )
        notes = [f"simulated: {statement}" for statement in self.simulated]
        if self.reference and self.reference.source:
            notes.append(
                f"uncompressed: from {self.reference.source}; its latency was measured in another run, "
                "in which the machine may have been faster or slower"
            )
        notes.append(f"* {COMPUTED_SIZES}")
        return "\n".join([table, *(textwrap.fill(note, 100, subsequent_indent="  ") for note in notes)])

    def to_json(self) -> dict[str, Any]:
        """The card as plain data; numbers that are not finite become None."""
        return {
            "version": 1,
            "measured": _plain(self.measured),
            "reference": None if self.reference is None else _plain(self.reference),
            "ratios": {} if self.reference is None else ratios(self.measured, self.reference),
            "simulated": list(self.simulated),
            "size_formats": COMPUTED_SIZES,
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


def build_card(
    measured: Measurement, reference: Measurement | None = None, simulated: Sequence[str] = ()
) -> ResultsCard:
    """Set a model's figures beside a reference, and say what of them is only simulated.

    Args:
        measured: from `measure`.
        reference: from `measure` of the dense model, `measurement_of` or `read_measurement`.
        simulated: statements to add to those that follow from the figures.
    """
    statements = [
        *([SIMULATED_QUANTIZATION] if measured.bytes_quantized is not None else []),
        *([SIMULATED_SPARSITY] if measured.weight_sparsity >= 0.01 else []),
        *simulated,
    ]
    return ResultsCard(measured, reference, tuple(statements))


def with_latencies_in_turns(
    measured: Measurement,
    reference: Measurement,
    models: tuple[nn.Module, nn.Module],
    input_shape: Sequence[int],
    batch_size: int,
    device: torch.device | str = "cpu",
) -> tuple[Measurement, Measurement]:
    """Both figures with the latencies measured anew, side by side; arguments as of `measure`.

    Args:
        models: those that `measured` and `reference` are of.
    """
    for name, size in (("latency_single", 1), ("latency_batch", batch_size)):
        ours, theirs = measure_latencies(models, input_shape, size, device=device)
        measured, reference = replace(measured, **{name: ours}), replace(reference, **{name: theirs})
    return measured, reference


def measure(
    model: nn.Module,
    result: EvalResult | None,
    input_shape: Sequence[int],
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    macs: int | None = None,
    bits_by_param: Mapping[str, int] | None = None,
    per_channel: Collection[str] = (),
    stored: Mapping[str, Tensor] | None = None,
) -> Measurement:
    """The figures of one model.

    Args:
        model: as it is evaluated: masks applied.
        result: of its evaluation.
        input_shape: of one image: (channels, height, width).
        batch_size: of the evaluation.
        device: where the model is.
        macs: multiply-accumulates for one image.
        bits_by_param: width of each quantized weight, by its name in the state dict.
        per_channel: those that have a scale for each output channel.
        stored: the tensors that a file of the model has to hold; default its state dict.

    Raises:
        UnknownNameError: a name in `bits_by_param` is not in the model.
        QuantizationError: a width in `bits_by_param` is out of range.
    """
    state = canonical_state_dict(model)
    bits_by_param = bits_by_param or {}
    stored = state if stored is None else stored
    bytes_quantized = quantized_bytes(stored, bits_by_param, per_channel) if bits_by_param else None
    # The weights of a quantized model are buffers: they count as parameters all the same.
    params = dict(named_parameters(model)) | {name: state[name] for name in bits_by_param}
    counts = {name: (value.numel(), _nonzeros(value)) for name, value in params.items()}
    parameters, nonzeros = (
        (sum(column) for column in zip(*counts.values(), strict=True)) if counts else (0, 0)
    )
    weights = [counts[name] for name, value in params.items() if value.dim() >= 2]
    return Measurement(
        top1_correct=result.top1_correct if result else None,
        top5_correct=result.top5_correct if result else None,
        n=result.n if result else None,
        loss=result.loss if result else None,
        parameters=parameters,
        nonzeros=nonzeros,
        weight_sparsity=_sparsity(sum(n for n, _ in weights), sum(nnz for _, nnz in weights)),
        total_sparsity=_sparsity(parameters, nonzeros),
        macs=macs,
        bytes_checkpoint=serialized_bytes(state),
        bytes_dense=dense_bytes(stored),
        bytes_sparse=sparse_bytes(stored),
        bytes_quantized=bytes_quantized,
        latency_single=measure_latency(model, input_shape, 1, device=device),
        latency_batch=measure_latency(model, input_shape, batch_size, device=device),
    )


def measurement_of(data: Mapping[str, Any], source: str | None = None) -> Measurement:
    """The figures that were plain data: `asdict(measurement)`, or `measured` of a `results.json`.

    Args:
        data: the figures by name; what is no figure is passed over.
        source: where they were kept; default what `data` says.

    Raises:
        UsageError: a figure is missing.
    """
    try:
        figures: dict[str, Any] = {field.name: data[field.name] for field in fields(Measurement)}
        for name in ("latency_single", "latency_batch"):
            figures[name] = None if figures[name] is None else Latency(**figures[name])
    except (KeyError, TypeError) as error:
        raise UsageError(f"{source or 'figures'}: no results card; give one of this program") from error
    return Measurement(**{**figures, "source": source or figures["source"]})


def read_measurement(path: str | Path) -> Measurement:
    """The figures of the model that a `results.json` is about.

    Raises:
        UsageError: there is no such file, or it is none of this program.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read, {error.strerror}; give a results.json of a run") from error
    try:
        data = json.loads(text)["measured"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: no results card; give one of this program") from error
    return measurement_of(data, str(path))


def ratios(measured: Measurement, reference: Measurement) -> dict[str, float]:
    """Reference over this model, for what is better when smaller: 4.0 is four times smaller, or faster.

    Sizes are compared with the reference's dense size. Latencies only when both were
    measured in this run, with the same batch, threads and device.
    """
    pairs: dict[str, tuple[float | None, float | None]] = {
        "parameters": (reference.parameters, measured.parameters),
        "nonzeros": (reference.nonzeros, measured.nonzeros),
        "macs": (reference.macs, measured.macs),
        "bytes_checkpoint": (reference.bytes_checkpoint, measured.bytes_checkpoint),
        "bytes_dense": (reference.bytes_dense, measured.bytes_dense),
        "bytes_sparse": (reference.bytes_dense, measured.bytes_sparse),
        "bytes_quantized": (reference.bytes_dense, measured.bytes_quantized),
    }
    for name in ("latency_single", "latency_batch"):
        ours, theirs = getattr(measured, name), getattr(reference, name)
        is_comparable = ours and theirs and _conditions(ours) == _conditions(theirs) and not reference.source
        if is_comparable:
            pairs[name] = (theirs.median_s, ours.median_s)
    return {name: before / after for name, (before, after) in pairs.items() if before is not None and after}


def _rows(measured: Measurement, reference: Measurement | None) -> list[list[str]]:
    """Label, this model, reference, ratio; without what was not measured of this model."""
    quotients = ratios(measured, reference) if reference else {}

    def row(label: str, name: str, show: Any, reference_name: str | None = None) -> list[str]:
        theirs = getattr(reference, reference_name or name) if reference else None
        quotient = f"{quotients[name]:.2f}x" if name in quotients else ""
        return [label, show(getattr(measured, name)), show(theirs), quotient]

    rows = [
        *_accuracy_rows("top-1", "top1_correct", measured, reference),
        *_accuracy_rows("top-5", "top5_correct", measured, reference),
        row("loss", "loss", lambda x: "-" if x is None else f"{x:.4f}"),
        row("parameters", "parameters", _count),
        row("non-zero parameters", "nonzeros", _count),
        row("sparsity of the weights (2-D and up)", "weight_sparsity", _percent),
        row("sparsity of all parameters", "total_sparsity", _percent),
        row("MACs for one image", "macs", _count),
        row("bytes of the weights as a checkpoint", "bytes_checkpoint", _count),
        row("bytes stored dense *", "bytes_dense", _count),
        row("bytes stored sparse *", "bytes_sparse", _count, "bytes_dense"),
        row("bytes stored at the quantized width *", "bytes_quantized", _count, "bytes_dense"),
    ]
    for name in ("latency_single", "latency_batch"):
        latency: Latency | None = getattr(measured, name)
        if latency is not None:
            cells = row(f"median latency, {_conditions_text(latency)}", name, _milliseconds)
            rows.append(cells if name in quotients else [*cells[:2], "-", ""])
    return [row for row in rows if row[1] != "-"]


def _accuracy_rows(
    label: str, name: str, measured: Measurement, reference: Measurement | None
) -> list[list[str]]:
    """Percent with k/n, and its interval, of this model and the reference."""
    counts, intervals, percents = [], [], []
    for measurement in (measured, reference):
        correct, n = (getattr(measurement, name), measurement.n) if measurement else (None, None)
        if correct is None or n is None:
            counts.append("-")
            intervals.append("-")
            continue
        low, high = wilson_interval(correct, n)
        percents.append(100 * correct / n)
        counts.append(f"{correct:,}/{n:,} = {percents[-1]:.2f} %")
        intervals.append(f"{100 * low:.2f} to {100 * high:.2f} %")
    change = f"{percents[0] - percents[1]:+.2f} points" if len(percents) == 2 else ""
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


def _nonzeros(tensor: Tensor) -> int:
    return int(torch.count_nonzero(tensor.detach()))


def _sparsity(elements: int, nonzeros: int) -> float:
    return 1 - nonzeros / elements if elements else 0.0


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
