"""The program's flag `--export-int8`: a quantized classifier as an ONNX file of integers, compared and timed.

Its decisions on the test set are set beside those of the simulation, its size and its latency beside those of
the same network in floating point. Knows nothing about the file's format.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.apputils.intervals import wilson_interval
from distiller.apputils.onnx_path import path_outside
from distiller.apputils.statistics_job import calibration_batches
from distiller.apputils.structure import restore_structure
from distiller.atomic_file import write_whole
from distiller.errors import UsageError
from distiller.export.integer_latency import IntegerLatency, integer_latency
from distiller.export.integer_parity import IntegerParity, compare_integer
from distiller.export.latency import Latency
from distiller.export.onnx_export import onnx_bytes, reporting_failed_writes
from distiller.export.qdq_export import int8_onnx
from distiller.names import unwrap

_LOG = logging.getLogger(__name__)
FIGURES_FILE = "int8.json"


class Scored(Protocol):
    """How many of how many images are right: a result of an evaluation, or figures on a results card."""

    @property
    def top1_correct(self) -> int | None:
        """Those whose label has the highest logit."""

    @property
    def n(self) -> int | None:
        """Images."""


@dataclass(frozen=True, slots=True)
class Int8Figures:
    """An integer model beside its simulation, and beside the network in floating point.

    Attributes:
        path: of the file.
        parity: decisions on the test set, beside those of the simulation.
        trained: of a model that was trained with quantization: beside those of that model, as it was trained.
        floating: accuracy in floating point; None where nobody knows it.
        bytes_int8: of the file.
        bytes_float: of the file of the network in floating point, which is not kept.
        latency: of both in onnxruntime, and of PyTorch.
    """

    path: Path
    parity: IntegerParity
    trained: IntegerParity | None
    floating: Scored | None
    bytes_int8: int
    bytes_float: int
    latency: IntegerLatency

    def lines(self) -> list[str]:
        """What is told of it."""
        parity, latency = self.parity, self.latency
        largest = (
            f"{parity.max_difference:.2e}" if parity.max_steps is None else f"{parity.max_steps:.0f} steps"
        )
        trained = self.trained
        told = [
            f"agrees with the simulation on {_share(parity.agreeing, parity.samples)} of the test images; "
            f"largest difference of an output: {largest}",
            f"Top1 of the simulation:  {_accuracy(parity.simulation_correct, parity.labelled)}",
            f"Top1 in integers:        {_accuracy(parity.integer_correct, parity.labelled)}",
        ]
        if trained is not None:
            told.append(
                f"agrees with the trained model on {_share(trained.agreeing, trained.samples)}; its "
                f"Top1: {_accuracy(trained.simulation_correct, trained.labelled)}"
            )
        if self.floating is not None and self.floating.top1_correct is not None and self.floating.n:
            told.append(f"Top1 in floating point:  {_accuracy(self.floating.top1_correct, self.floating.n)}")
        return [
            *told,
            f"{self.bytes_int8:,} bytes, {self.bytes_int8 / self.bytes_float:.3f} of the "
            f"{self.bytes_float:,} in floating point",
            f"batch {latency.int8_onnx.batch_size}, threads: {latency.int8_onnx.threads}, medians: "
            f"int8 ONNX {_milliseconds(latency.int8_onnx)}, fp32 ONNX {_milliseconds(latency.float_onnx)}, "
            f"PyTorch fp32 {_milliseconds(latency.torch_float)}",
            latency.verdict(),
        ]

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data."""
        parity, latency = self.parity, self.latency
        floating = self.floating
        known = floating is not None and floating.top1_correct is not None and floating.n
        return {
            "version": 1,
            "file": str(self.path),
            "onnxruntime": importlib.metadata.version("onnxruntime"),
            "agreement": _plain_parity(parity),
            "agreement_with_trained": None if self.trained is None else _plain_parity(self.trained),
            "top1": {
                "simulation": _plain(parity.simulation_correct, parity.labelled),
                "integers": _plain(parity.integer_correct, parity.labelled),
                "floating_point": _plain(floating.top1_correct, floating.n) if floating and known else None,
            },
            "bytes": {
                "int8": self.bytes_int8,
                "float": self.bytes_float,
                "ratio": self.bytes_int8 / self.bytes_float,
            },
            "latency": {
                "int8_onnx_s": latency.int8_onnx.median_s,
                "float_onnx_s": latency.float_onnx.median_s,
                "torch_float_s": latency.torch_float.median_s,
                "speedup": latency.speedup,
                "batch_size": latency.int8_onnx.batch_size,
                "threads": latency.int8_onnx.threads,
                "cpu": str(latency.cpu),
                "verdict": latency.verdict(),
                "reasons": latency.reasons(),
            },
        }


def check_export(compressor: ClassifierCompressor) -> None:
    """See to it that `--export-int8`, where it is given, can be met.

    Raises:
        UsageError: the model will not be quantized, or the file cannot be where it is to be.
    """
    args = compressor.args
    if not args.export_int8:
        return
    path_outside("--export-int8", args.export_int8)
    if not args.quantize_eval and not compressor.is_quantized:
        raise UsageError(
            "--export-int8: the checkpoint is of a model in floating point; quantize it with --evaluate "
            "--quantize-eval, or write it as it is with --export-onnx"
        )


def unquantized(compressor: ClassifierCompressor) -> nn.Module:
    """The network of a quantized checkpoint in floating point, as thin, with fresh weights: to be timed."""
    _, model = compressor.whole(None)
    assert compressor.checkpoint is not None
    restore_structure(model, compressor.checkpoint)
    return model


def export_int8(
    compressor: ClassifierCompressor, float_model: nn.Module, floating: Scored | None
) -> Int8Figures:
    """Write the compressor's quantized model to the file that `--export-int8` names, and compare it.

    The figures are logged, and written into the run folder as `int8.json`.

    Args:
        compressor: its model is quantized; its test set is evaluated.
        float_model: the same network in floating point.
        floating: its accuracy, where it is known.

    Raises:
        QuantizationError: the model is quantized in a way that runtimes do not compute.
        DistillerError: it cannot be exported, or the file cannot be run.
    """
    given = compressor.args.export_int8
    _LOG.info("--- integers (ONNX) ---------------------")
    images = torch.randn(2, *compressor.input_shape, generator=torch.Generator().manual_seed(0))
    model, float_model = (copy.deepcopy(unwrap(m)).cpu().eval() for m in (compressor.model, float_model))
    batches = calibration_batches(compressor)
    found = int8_onnx(model, images, batches=lambda: (batch.cpu() for batch in batches()))
    in_float = onnx_bytes(float_model, images)
    parity = compare_integer(found.simulation, found.content, compressor.data.test)
    trained = None
    if found.simulation is not model:
        trained = compare_integer(model, found.content, compressor.data.test)
    if found.added_grids:
        _LOG.info("8-bit grids, by the calibration images, for: %s", ", ".join(found.added_grids))
    latency = integer_latency(
        float_model, in_float, found.content, compressor.input_shape, threads=torch.get_num_threads()
    )
    folder = compressor.run.require_folder()
    path = path_outside("--export-int8", given) or folder / given
    with reporting_failed_writes(path):
        write_whole(path, found.content)
    figures = Int8Figures(path, parity, trained, floating, len(found.content), len(in_float), latency)
    document = json.dumps(figures.to_json(), indent=2) + "\n"
    with reporting_failed_writes(folder / FIGURES_FILE):
        write_whole(folder / FIGURES_FILE, document)
    _LOG.info("Saved integer model to: %s", path)
    for line in figures.lines():
        _LOG.info("%s", line)
    return figures


def _plain_parity(parity: IntegerParity) -> dict[str, Any]:
    return {
        "agreeing": parity.agreeing,
        "n": parity.samples,
        "percent": 100 * parity.agreement,
        "max_difference": parity.max_difference,
        "max_steps": parity.max_steps,
    }


def _share(k: int, n: int) -> str:
    return f"{k:,}/{n:,} = {100 * k / n:.2f} %"


def _accuracy(k: int, n: int) -> str:
    low, high = wilson_interval(k, n)
    return f"{_share(k, n)} (95 % interval {100 * low:.2f} to {100 * high:.2f} %)"


def _plain(k: int | None, n: int | None) -> dict[str, Any] | None:
    if k is None or not n:
        return None
    return {
        "correct": k,
        "n": n,
        "percent": 100 * k / n,
        "interval_95_percent": [100 * end for end in wilson_interval(k, n)],
    }


def _milliseconds(latency: Latency) -> str:
    return f"{1000 * latency.median_s:.3f} ms"
