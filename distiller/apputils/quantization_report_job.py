"""The program's flag `--qe-report`: what quantization does to each layer, as CSV and picture.

Knows nothing about what is measured.
"""

from __future__ import annotations

import logging

from torch import nn

from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.apputils.statistics_job import calibration_batches
from distiller.apputils.training_loop import evaluate
from distiller.quantization.report import QuantizationReport, quantization_report

_LOG = logging.getLogger(__name__)
TABLE, PICTURE = "quantization_report.csv", "quantization_report.png"


def write_report(compressor: ClassifierCompressor, float_model: nn.Module) -> QuantizationReport:
    """Measure each quantized layer of the compressor's model by itself, into the run folder.

    Errors are those on the images to calibrate on, accuracy is that on the test set.

    Args:
        compressor: its model is quantized.
        float_model: the same in floating point, under the same names: `QuantizedWithData.float_model`; of a
            model that was trained with quantization the architecture.

    Raises:
        QuantizationError: the layers cannot be told apart, or a file cannot be written.
    """

    def score(model: nn.Module) -> tuple[float, float]:
        result = evaluate(model, compressor.data.test, device=compressor.device)
        return result.top1, result.loss

    _LOG.info("--- report on each layer ---------------------")
    batches = calibration_batches(compressor)
    report = quantization_report(float_model, compressor.model, batches, score, progress=_LOG.info)
    folder = compressor.run.require_folder()
    report.to_csv(folder / TABLE)
    report.to_png(folder / PICTURE)
    for row in report.worst(3):
        _LOG.info("%s: %.1f %% of the error", row.name, 100 * row.error_share)
    _LOG.info("Saved %s and %s", folder / TABLE, folder / PICTURE)
    return report
