"""The program's job `--layerwise`: each layer compressed by itself, at growing fractions, and tested.

    layerwise.csv                                     every point with bytes, bits, accuracy and latencies
    accuracy-TECHNIQUE.json, latency-TECHNIQUE.json   as nn-compress-haiku writes them
    accuracy*.png, latency*.png, and .svg             the figures

And `--layerwise-plot`: the figures of such a folder, drawn anew.
Knows nothing about how a layer is compressed.
"""

from __future__ import annotations

import logging
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate
from torch import nn

from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.apputils.sampling import fingerprint
from distiller.apputils.training_loop import evaluate
from distiller.errors import UsageError
from distiller.layerwise.log import SETTINGS_NAME, LayerwiseLog, LayerwiseSettings
from distiller.layerwise.plot import draw_layerwise
from distiller.layerwise.points import LayerwisePoint
from distiller.layerwise.source_files import write_source_files
from distiller.layerwise.sweep import SweepPlan, fraction_range, layers_to_compress, layerwise_points
from distiller.layerwise.timing import Timing, time_in_turns
from distiller.names import unwrap
from distiller.sensitivity.fingerprint import weights_fingerprint

_LOG = logging.getLogger(__name__)

_NOTES = """\
The fraction means another thing for each technique: zero weights (prune), distinct values that are gone
(quant, kmeans), rank that is gone (svd). A large layer has millions of distinct values: with a tenth of them
its codes still have some 20 bits. Less rank pays only below m n / (m + n) of an (m, n) matrix. Compare the
stored bytes. The weights stay dense, as in the original, so that the latency does not change; that of really
factored layers is in a column of its own. All are medians after a warm-up, taken in turns."""


def compress_layerwise(compressor: ClassifierCompressor) -> None:
    """Sweep, into the run folder or that of an interrupted sweep."""
    args, model = compressor.args, unwrap(compressor.model)
    plan = SweepPlan(
        args.layerwise, fraction_range(*args.fractions), tuple(dict.fromkeys(args.layerwise_bits))
    )
    layers = layers_to_compress(model, args.layerwise_layers)
    loader = compressor.data.test
    resumed = _interrupted(args.layerwise_resume) if args.layerwise_resume else None
    settings = LayerwiseSettings(
        plan=plan,
        layers=tuple(layers),
        weights=weights_fingerprint(model),
        test_images=f"{loader.num_samples} of {compressor.dataset}, {fingerprint(loader.indices())}",
    )
    target = resumed or compressor.run.require_folder()

    def evaluate_on_test_set(model: nn.Module) -> tuple[int, int, float]:
        result = evaluate(model, loader, device=compressor.device)
        return result.top1_correct, result.n, result.loss

    def in_turns(models: Sequence[nn.Module]) -> list[Timing]:
        return time_in_turns(models, compressor.input_shape, compressor.latency_batch, compressor.device)

    begin, measured_now = time.perf_counter(), 0
    with LayerwiseLog(target, settings) as log:
        total = len(plan.keys)
        for point in layerwise_points(
            model, layers, plan, evaluate_on_test_set, in_turns, frozenset(log.finished)
        ):
            log.append(point)
            measured_now += 1
            left = (time.perf_counter() - begin) / measured_now * (total - len(log.finished))
            _LOG.info("[%d/%d] %s (about %.0f s left)", len(log.finished), total, described(point), left)
        points = log.complete()
    write_source_files(points, target)
    figures = draw_layerwise(target, target)
    _LOG.info("--- layer-wise compression of %s ---\n%s\n%s", ", ".join(layers), table(points), _NOTES)
    _LOG.info("Saved %s, its JSON files and %d figures", log.path, len(figures))


def redraw_layerwise(args: Namespace) -> str:
    """Draw what `--layerwise-plot` names into `--out-dir`; says what was drawn."""
    into = Path(args.output_dir).expanduser()
    drawn = draw_layerwise(args.layerwise_plot, into)
    return "\n".join(f"Saved {path}" for path in drawn)


def described(point: LayerwisePoint) -> str:
    """A point in a line of the log."""
    setting = f"{point.value:.2f}" if point.axis == "fraction" else f"{point.value:.0f}"
    codes = f" (codes of {point.code_bits:.1f})" if point.code_bits is not None else ""
    return (
        f"{point.technique} at {point.axis} {setting}: Top1 {100 * point.accuracy:.3f}  "
        f"stored {100 * point.stored_share:.1f} % of the dense bytes, "
        f"{point.effective_bits:.2f} bits a weight{codes}"
    )


def table(points: Sequence[LayerwisePoint]) -> str:
    """The points, one row each."""
    rows = [
        {
            "technique": point.technique,
            "by": point.axis,
            "at": f"{point.value:g}",
            "top-1 (%)": f"{100 * point.accuracy:.2f}",
            "stored bytes": f"{point.stored_bytes:,}",
            "of dense (%)": f"{100 * point.stored_share:.1f}",
            "predicted": "" if point.predicted_bytes is None else f"{point.predicted_bytes:,}",
            "bits a weight": f"{point.effective_bits:.2f}",
            "latency (ms)": _milliseconds(point.latency_s, point.latency_q1_s, point.latency_q3_s),
            "dense (ms)": _milliseconds(point.dense_latency_s),
            "factored (ms)": _milliseconds(point.factored_latency_s),
        }
        for point in points
    ]
    timed = next((point for point in points if point.latency_s is not None), None)
    how = (
        f"\nlatency: {timed.batch_size} images, {timed.device}, threads: {timed.threads}; median (quartiles)"
        if timed
        else ""
    )
    return tabulate(rows, headers="keys", disable_numparse=True, stralign="right") + how


def _milliseconds(median: float | None, low: float | None = None, high: float | None = None) -> str:
    if median is None:
        return ""
    band = "" if low is None or high is None else f" ({1000 * low:.2f}-{1000 * high:.2f})"
    return f"{1000 * median:.2f}{band}"


def _interrupted(folder: str) -> Path:
    if not (Path(folder) / SETTINGS_NAME).is_file():
        raise UsageError(
            f"--layerwise-resume {folder}: no sweep to go on with, there is no {SETTINGS_NAME}; "
            "give the run folder of a --layerwise, or leave the flag out"
        )
    return Path(folder)
