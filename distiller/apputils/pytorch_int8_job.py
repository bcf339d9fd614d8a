"""The program's flag `--qe-convert-pytorch`: a quantized classifier in PyTorch's own quantized form, tested.

Knows nothing about how it is converted.
"""

from __future__ import annotations

import json
import logging

import torch

from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.apputils.intervals import wilson_interval
from distiller.apputils.meters import EvalResult
from distiller.apputils.training_loop import evaluate
from distiller.atomic_file import write_whole
from distiller.export.pytorch_int8 import convert_distiller_ptq_model_to_pytorch

_LOG = logging.getLogger(__name__)
FIGURES_FILE = "pytorch_int8.json"


def evaluate_in_pytorch(compressor: ClassifierCompressor) -> EvalResult:
    """Convert the compressor's quantized model, and test what comes out, on the CPU.

    The figures are logged, and written into the run folder as `pytorch_int8.json`.

    Raises:
        QuantizationError: this PyTorch has no such backend, or the model cannot be converted.
    """
    backend = compressor.args.qe_pytorch_backend
    _LOG.info("--- PyTorch's quantized modules (%s) ---------------------", backend)
    images = torch.zeros(1, *compressor.input_shape)
    converted = convert_distiller_ptq_model_to_pytorch(compressor.model, images, backend)
    result = evaluate(converted, compressor.data.test)
    low, high = (100 * end for end in wilson_interval(result.top1_correct, result.n))
    figures = {
        "version": 1,
        "backend": backend,
        "torch": torch.__version__,
        "top1_correct": result.top1_correct,
        "n": result.n,
        "top1_percent": result.top1,
        "top1_interval_95_percent": [low, high],
    }
    folder = compressor.run.require_folder()
    write_whole(folder / FIGURES_FILE, json.dumps(figures, indent=2) + "\n")
    _LOG.info(result.line())
    _LOG.info("Top1: %s/%s, 95 %% interval %.2f to %.2f %%", result.top1_correct, result.n, low, high)
    return result
