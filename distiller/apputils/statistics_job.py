"""The program's jobs that collect what activations are like: statistics for quantization, histograms.

Knows nothing about quantizers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.apputils.training_loop import evaluate
from distiller.data_loggers.collector import collector_context
from distiller.data_loggers.histograms import ActivationHistogramsCollector, collect_histograms
from distiller.data_loggers.one_pass import OnePassQuantStatsCollector
from distiller.data_loggers.quant_stats import STATS_FILE, QuantCalibrationStatsCollector
from distiller.dummy_input import get_dummy_input
from distiller.functional_modules import to_modules
from distiller.names import unwrap

_LOG = logging.getLogger(__name__)
DEFAULT_CALIBRATION = 0.05
"""Share of the training set that calibrates a quantization for which no source of ranges is given."""

StatsCollector = QuantCalibrationStatsCollector | OnePassQuantStatsCollector


def collect_statistics(compressor: ClassifierCompressor) -> None:
    """Collect activation statistics on a share of the training set into `acts_quantization_stats.yaml`."""
    name_operations(compressor)
    _ = compressor.data  # what is wrong with data and folder is told before anything takes long
    folder = compressor.run.require_folder()
    collector = collected(compressor, compressor.model, compressor.args.qe_calibration)
    path = collector.save(folder / STATS_FILE)
    _LOG.info("Saved activation statistics to: %s", path)


def collect_activation_histograms(compressor: ClassifierCompressor) -> None:
    """Collect histograms of activations, with pictures, into the run folder.

    They lie between the ranges of `--qe-stats-file`, or of statistics that are collected before.
    """
    args = compressor.args
    name_operations(compressor)
    model = unwrap(compressor.model)
    if args.qe_stats_file:  # what is wrong with them is told before the run folder is made
        ActivationHistogramsCollector(model, args.qe_stats_file)
    loader = compressor.data.calibration(args.activation_histograms)
    folder = compressor.run.require_folder()
    _LOG.info("Collecting histograms of activations on %d training images", loader.num_samples)
    found = collect_histograms(
        model,
        lambda model: evaluate(model, loader, device=compressor.device),
        folder,
        args.qe_stats_file,
        save_hist_imgs=True,
    )
    _LOG.info("Saved histograms of %d layers to: %s", len(found), folder)


def name_operations(compressor: ClassifierCompressor) -> None:
    """Make modules of the model's functional operations, so that statistics and the quantizer know them."""
    shape = (1, *compressor.input_shape)
    to_modules(unwrap(compressor.model), get_dummy_input(device=compressor.device, input_shape=shape))


def calibration_share(compressor: ClassifierCompressor) -> float:
    """The share of the training set to calibrate on."""
    return compressor.args.qe_calibration or DEFAULT_CALIBRATION


def calibration_batches(compressor: ClassifierCompressor) -> Callable[[], Iterator[Tensor]]:
    """The images to calibrate on, in mini-batches, the same each time."""
    loader = compressor.data.calibration(calibration_share(compressor))
    return lambda: (images.to(compressor.device) for images, _ in loader)


def collected(compressor: ClassifierCompressor, model: nn.Module, portion: float) -> StatsCollector:
    """Statistics of a model's activations on a share of the training set, in one pass or two."""
    loader = compressor.data.calibration(portion)
    model, is_one = unwrap(model), compressor.args.qe_one_pass
    passes = "one pass" if is_one else "two passes"
    _LOG.info("Collecting activation statistics on %d training images, in %s", loader.num_samples, passes)
    collector = (OnePassQuantStatsCollector if is_one else QuantCalibrationStatsCollector)(model)
    with collector_context(collector):
        evaluate(model, loader, device=compressor.device)
        if isinstance(collector, QuantCalibrationStatsCollector):
            collector.start_second_pass()
            evaluate(model, loader, device=compressor.device)
            collector.stop_second_pass()
    return collector
