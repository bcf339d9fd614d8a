"""The program's flag `--export-int8`: a quantized classifier as an ONNX file of integers, compared and timed.

Its decisions on the test set are set beside those of the simulation, its size and its latency beside those of
the same network in floating point. Knows nothing about the file's format.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import logging
import os
import tempfile
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
from distiller.config import config_component_from_file_by_class, post_training_steps
from distiller.errors import QuantizationError, UsageError
from distiller.export.integer_latency import IntegerLatency, integer_latency
from distiller.export.integer_parity import IntegerParity, compare_integer
from distiller.export.integer_view import MAX_BITS, is_trained
from distiller.export.latency import Latency
from distiller.export.onnx_export import onnx_bytes, reporting_failed_writes
from distiller.export.pytorch_int8 import check_backend
from distiller.export.qdq_export import check_integers, int8_onnx
from distiller.names import named_modules, strip_wrappers, unwrap

_LOG = logging.getLogger(__name__)
FIGURES_FILE = "int8.json"
_FEW_STEPS = 10
"""An output of the file that is farther from the simulation, in steps of its grid, is warned of."""
_WITH_WEIGHTS = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)
_SUMMING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


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
            f"{parity.max_difference:.2e}" if parity.max_steps is None else _counted(round(parity.max_steps))
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

    def warning(self) -> str | None:
        """What is told of outputs that are far from the simulation's; None if none is."""
        steps = self.parity.max_steps
        if steps is None or steps <= _FEW_STEPS:
            return None
        return (
            f"an output of {self.path} is {steps:.0f} steps of its grid away from the simulation; up to "
            f"{_FEW_STEPS} come of rounding, more may be onnxruntime computing an operation otherwise: see "
            "whether it is the same without its graph optimizations (ORT_DISABLE_ALL)"
        )

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data."""
        parity, latency = self.parity, self.latency
        floating = self.floating
        known = floating is not None and floating.top1_correct is not None and floating.n
        return {
            "version": 1,
            "file": self.path.name,
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
    """See to it that `--export-int8` and `--qe-convert-pytorch`, where they are given, can be met.

    So that what cannot be made is told before statistics are collected and anything is tested.

    Raises:
        UsageError: the model will not be quantized, or the file cannot be where it is to be.
        QuantizationError: the model is, or will be, quantized in a way that runtimes do not compute; this
            PyTorch has not the backend.
    """
    args = compressor.args
    if args.qe_convert_pytorch:
        check_backend(args.qe_pytorch_backend)
    if not args.export_int8:
        return
    path = path_outside("--export-int8", args.export_int8)
    if path is not None:
        _check_writable(path)
    if args.quantize_eval:
        _check_settings(compressor)
    elif compressor.is_quantized:
        model = copy.deepcopy(unwrap(compressor.model)).cpu().eval()
        check_integers(model, torch.zeros(2, *compressor.input_shape))
    else:
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
        float_model,
        in_float,
        found.content,
        compressor.input_shape,
        threads=torch.get_num_threads(),
        can_get_grids=is_trained(model) and not found.added_grids,
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
    if (warning := figures.warning()) is not None:
        _LOG.warning("%s", warning)
    return figures


def _check_writable(path: Path) -> None:
    """Refuse a path that nothing can be written to: a device or a pipe, a folder that is not the user's."""
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise UsageError(f"--export-int8 {path}: is no ordinary file; give the name of one, or of a new one")
    with reporting_failed_writes(target), tempfile.TemporaryFile(dir=target.parent):
        pass


def _check_settings(compressor: ClassifierCompressor) -> None:
    """Refuse settings of the quantization to come that leave no integer model, as far as they tell."""
    args = compressor.args
    modules = named_modules(unwrap(compressor.model))
    layers: dict[str, Any] = {name: m for name, m in modules if isinstance(m, _WITH_WEIGHTS)}
    quantizer: Any = None
    if args.qe_config_file:
        quantizer = config_component_from_file_by_class(
            compressor.model, args.qe_config_file, "PostTrainLinearQuantizer"
        )
        found, bits_accum = quantizer.module_qbits_map, quantizer.bits_accum
        source, weights_by, accum_by = f"{args.qe_config_file}: ", "bits_weights", "bits_accum"
        bits = {name: (of.acts or 0, of.wts or 0) for name, of in found.items()}
    else:
        source, weights_by, accum_by = "", "--qe-bits-wts", "--qe-bits-accum"
        bits_accum = args.qe_bits_accum
        left_out = {strip_wrappers(name) for name in args.qe_no_quant_layers}
        bits = {name: (args.qe_bits_acts, args.qe_bits_wts) for name in layers if name not in left_out}
    for name, widths in bits.items():
        if max(widths) > MAX_BITS:
            raise QuantizationError(
                f"--export-int8: {source}'{name}' has {max(widths)} bits, an integer model has at most "
                f"{MAX_BITS}; give it fewer"
            )
    if not any(weights for _, weights in bits.values()):
        raise QuantizationError(
            f"--export-int8: {source}no weight would be quantized, so that all layers would be computed in "
            f"floating point; give weights 2 to {MAX_BITS} bits ({weights_by}), or write the model as it is "
            "with --export-onnx"
        )
    for name, (activations, weights) in bits.items():
        layer = layers.get(name)
        if not activations or not weights or not isinstance(layer, _SUMMING):
            continue
        # At least: asymmetric grids have larger integers, and there is a bias.
        largest = layer.weight[0].numel() * (2 ** (activations - 1) - 1) * (2 ** (weights - 1) - 1)
        if largest.bit_length() + 1 > bits_accum:
            raise QuantizationError(
                f"--export-int8: {source}accumulators of {bits_accum} bits ({accum_by}) can saturate in "
                f"'{name}', those of runtimes have 32; set {accum_by} to 32"
            )
    if quantizer is not None and any(activations for activations, _ in bits.values()):
        has_steps = bool(post_training_steps(args.qe_config_file).names)  # they collect statistics
        if quantizer.model_activation_stats is None and not has_steps:
            raise QuantizationError(
                f"--export-int8: {source}without model_activation_stats ranges are dynamic, those of each "
                "batch; an integer model needs fixed scales: give statistics there, or bits_activations: 0"
            )


def _plain_parity(parity: IntegerParity) -> dict[str, Any]:
    return {
        "agreeing": parity.agreeing,
        "n": parity.samples,
        "percent": 100 * parity.agreement,
        "max_difference": parity.max_difference,
        "max_steps": parity.max_steps,
    }


def _counted(steps: int) -> str:
    return f"{steps} step" if steps == 1 else f"{steps} steps"


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
