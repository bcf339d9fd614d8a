"""The program's job `--export-onnx`: the classifier with a softmax as an ONNX file, compared in onnxruntime.

A model that cannot be exported, or whose file computes something else, leaves nothing behind.
Knows nothing about the file's format.
"""

from __future__ import annotations

import importlib.metadata
import logging

import torch

from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.apputils.onnx_path import path_outside
from distiller.atomic_file import write_whole
from distiller.branch_points import every_exit, exits_of
from distiller.errors import QuantizationError
from distiller.export.onnx_export import OPSET, onnx_bytes, reporting_failed_writes, with_softmax
from distiller.export.onnx_parity import TOLERANCE, check_onnx

_LOG = logging.getLogger(__name__)
_BATCH_SIZES = (1, 3)


def export_to_onnx(compressor: ClassifierCompressor) -> None:
    """Write the model to the file that `--export-onnx` names: a bare name in the run folder, else a path."""
    given, checkpoint = compressor.args.export_onnx, compressor.checkpoint
    if checkpoint is not None and checkpoint.quantizer is not None:
        raise QuantizationError(
            f"--export-onnx: {checkpoint.path} is of a quantized model, whose quantization is simulated in "
            "floating point; write integers with --export-int8, or give the checkpoint from before"
        )
    outside = path_outside("--export-onnx", given)
    model = compressor.model
    images = torch.randn(max(_BATCH_SIZES), *compressor.input_shape)
    exits = len(exits_of(model))
    names = [*(f"exit{index + 1}" for index in range(exits)), "output"]
    with every_exit(model), with_softmax(model):
        data = onnx_bytes(model, images, output_names=names)
        parity = check_onnx(data, model, images, batch_sizes=_BATCH_SIZES)
    folder = compressor.run.require_folder()
    path = outside or folder / given
    with reporting_failed_writes(path):
        write_whole(path, data)
    shape = ", ".join(["batch", *map(str, compressor.input_shape)])
    _LOG.info("Saved ONNX model to: %s", path)
    _LOG.info("%d bytes, opset %d, input (%s), output probabilities", len(data), OPSET, shape)
    if exits:
        _LOG.info("outputs %s: all are computed, who runs the file chooses", ", ".join(names))
    _LOG.info(
        "onnxruntime %s, random images in batches of %s: differs from PyTorch by at most %.2e, %.2e of the "
        "largest output (allowed: %.0e); the same class for %.0f %% of the images",
        importlib.metadata.version("onnxruntime"),
        " and ".join(map(str, _BATCH_SIZES)),
        parity.max_difference,
        parity.relative_difference,
        TOLERANCE,
        100 * parity.argmax_agreement,
    )
