"""The figures of one model: accuracy, parameters, sparsity, bytes, latency.

Taken from the model itself, or read back from a results card of another run.
Knows nothing about training, data or quantizers, nor how figures are shown.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distiller.apputils.meters import EvalResult
from distiller.errors import UsageError
from distiller.export.latency import Latency, measure_latencies
from distiller.export.size import dense_bytes, quantized_bytes, serialized_bytes, sparse_bytes
from distiller.names import canonical_state_dict, named_parameters

_COUNTED_SINCE = ("filters", "zero_filters", "channels", "zero_channels")
"""What results cards did not have from the beginning."""


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
        latency_batch: of a mini-batch; it says how many images that is.
        source: the file the figures were read from; None when they were measured in this run.
        filters: of all convolutions; None in figures of before they were counted, as the next three.
        zero_filters: those that are all zero.
        channels: input channels of all convolutions, those of a depthwise one left out.
        zero_channels: those that are all zero.
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
    filters: int | None = None
    zero_filters: int | None = None
    channels: int | None = None
    zero_channels: int | None = None

    @property
    def has_pruned_weights(self) -> bool:
        """Whether a hundredth of the weights or more are zero: in float32 that is no accident of training."""
        return self.weight_sparsity >= 0.01


def measure(
    model: nn.Module,
    result: EvalResult | None = None,
    *,
    macs: int | None = None,
    bits_by_param: Mapping[str, int] | None = None,
    per_channel: Collection[str] = (),
    stored: Mapping[str, Tensor] | None = None,
) -> Measurement:
    """The figures of one model, all but its latencies.

    Args:
        model: as it is evaluated: masks applied.
        result: of its evaluation.
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
    params = {name: value for name, value in named_parameters(model) if name in stored}
    params |= {name: stored[name] for name in bits_by_param}
    counts = {name: (value.numel(), _nonzeros(value)) for name, value in params.items()}
    parameters, nonzeros = (
        (sum(column) for column in zip(*counts.values(), strict=True)) if counts else (0, 0)
    )
    weights = [counts[name] for name, value in params.items() if value.dim() >= 2]
    kernels = [value.detach() for value in params.values() if value.dim() >= 3]
    filters, zero_filters = _structures(kernels, 0)
    channels, zero_channels = _structures([kernel for kernel in kernels if kernel.size(1) > 1], 1)
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
        latency_single=None,
        latency_batch=None,
        filters=filters,
        zero_filters=zero_filters,
        channels=channels,
        zero_channels=zero_channels,
    )


def with_latencies(
    figures: Sequence[Measurement],
    models: Sequence[nn.Module],
    input_shape: Sequence[int],
    batch_size: int,
    device: torch.device | str = "cpu",
) -> list[Measurement]:
    """The figures with the latencies of one image and of a mini-batch, the models taking turns.

    Args:
        figures: of each model.
        models: each takes one tensor; on `device`.
        input_shape: of one image: (channels, height, width).
        batch_size: images in a mini-batch.
        device: as torch writes it.
    """
    single = measure_latencies(models, input_shape, 1, device=device)
    batch = measure_latencies(models, input_shape, batch_size, device=device)
    return [
        replace(measured, latency_single=one, latency_batch=many)
        for measured, one, many in zip(figures, single, batch, strict=True)
    ]


def measurement_of(data: Mapping[str, Any], source: str | None = None) -> Measurement:
    """The figures that were plain data: `asdict(measurement)`, or `measured` of a `results.json`.

    Args:
        data: the figures by name; what is no figure is passed over. Counts of structures may be missing.
        source: where they were kept; default what `data` says.

    Raises:
        UsageError: a figure is missing.
    """
    try:
        figures: dict[str, Any] = {
            field.name: data.get(field.name) if field.name in _COUNTED_SINCE else data[field.name]
            for field in fields(Measurement)
        }
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
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{path}: no results card; give one of this program") from error
    return measurement_of(data, str(path))


def _structures(kernels: Sequence[Tensor], dim: int) -> tuple[int, int]:
    """How many slices along a dimension tensors have in all, and how many of them are all zero."""
    is_zero = [(kernel != 0).movedim(dim, 0).flatten(1).any(1).logical_not() for kernel in kernels]
    return sum(found.numel() for found in is_zero), sum(int(found.sum()) for found in is_zero)


def _nonzeros(tensor: Tensor) -> int:
    return int(torch.count_nonzero(tensor.detach()))


def _sparsity(elements: int, nonzeros: int) -> float:
    return 1 - nonzeros / elements if elements else 0.0
