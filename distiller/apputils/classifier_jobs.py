"""The program's jobs, one function each: train, evaluate, quantize, collect statistics, sweep, summarise.

Each takes the flags by name (a namespace, which it only reads) and, where it writes files,
a run folder. Returns or logs its results. Knows nothing about parsing flags or handlers of logs.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import logging
import shlex
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distiller.apputils.activation_phases import ActivationPhases
from distiller.apputils.checkpoint import save_checkpoint
from distiller.apputils.classifier_training import ClassifierTraining
from distiller.apputils.greedy_job import latest_greedy_checkpoint, prune_greedily
from distiller.apputils.image_classifier import ClassifierCompressor, Run
from distiller.apputils.onnx_job import export_to_onnx
from distiller.apputils.results_card import ResultsCard, build_card
from distiller.apputils.schedule_preview import stretches_alike
from distiller.apputils.thinnify_job import thinnify
from distiller.apputils.training_loop import evaluate as evaluate_loop
from distiller.atomic_file import remove_stale_parts
from distiller.config import config_component_from_file_by_class
from distiller.data_loggers.collector import collector_context
from distiller.data_loggers.quant_stats import STATS_FILE, QuantCalibrationStatsCollector
from distiller.dummy_input import get_dummy_input
from distiller.errors import QuantizationError, UnknownNameError, UsageError
from distiller.functional_modules import to_modules
from distiller.model_summaries import PICTURES, model_summary
from distiller.names import strip_wrappers, unwrap
from distiller.quantization import PostTrainLinearQuantizer
from distiller.quantization.ptq_settings import parse_multiplier_bits
from distiller.quantization.training import QatQuantizer
from distiller.schedule_yaml import read_document
from distiller.sensitivity.axes import find_axis, sparsity_levels
from distiller.sensitivity.engine import applicable_parameters
from distiller.sensitivity.log import SETTINGS_NAME
from distiller.sensitivity.plot import sensitivities_to_png
from distiller.sensitivity.sweep import sensitivity_sweep

_LOG = logging.getLogger(__name__)
DEFAULT_CALIBRATION = 0.05
"""Share of the training set that calibrates a quantization for which no source of ranges is given."""
_MAX_LISTED = 1000
_FLAGS = {
    "bits_activations": "--qe-bits-acts",
    "bits_weights": "--qe-bits-wts",
    "bits_accum": "--qe-bits-accum",
    "clip_n_stds": "--qe-clip-n-stds",
}
"""The flag of a setting of the quantizer, by the name that its errors begin with."""


def choose_job(args: Namespace) -> Callable[[ClassifierCompressor], ResultsCard | None]:
    """The job that the flags ask for, in Distiller's order of precedence."""
    if args.greedy:
        return prune_greedily
    if args.export_onnx:
        return export_to_onnx
    if args.qe_calibration is not None and not (args.evaluate and args.quantize_eval):
        return collect_statistics
    if args.sensitivity:
        return sweep_sensitivity
    if args.evaluate and args.quantize_eval:
        return quantize_and_evaluate
    if args.evaluate:
        return evaluate
    if args.thinnify:
        return thinnify
    return train


def run_job(args: Namespace, open_run: Callable[[], Run]) -> ResultsCard | None:
    """Do the job that the flags ask for; a results card goes into the run folder as `results.json`.

    Args:
        args: the flags by name.
        open_run: makes the run folder; called when all that was asked for is found to be in order.
    """
    job = choose_job(args)
    if args.compress and job not in (train, thinnify):
        _LOG.warning("--compress %s: without effect, this job does not train", args.compress)
    _import_plugins(args.plugin)
    compressor = ClassifierCompressor(args, open_run)
    if job not in (evaluate, export_to_onnx):  # the latter tells of it itself
        _refuse_quantized(compressor, job)
    card = job(compressor)
    if card is not None:
        path = card.save(compressor.run.require_folder() / "results.json")
        _LOG.info("--- results card (%s) ---\n%s", path, card.to_text())
    return card


def how_to_go_on(args: Namespace, folder: Path | None) -> str | None:
    """The flag that goes on with a job that was interrupted; None when there is nothing to go on with.

    Args:
        args: the flags by name.
        folder: the run's, if it had been made.
    """
    job = choose_job(args)
    if job is sweep_sensitivity:
        flag, left = "--sense-resume", Path(args.sense_resume) if args.sense_resume else folder
        is_there = left is not None and (left / SETTINGS_NAME).is_file()
    elif job is prune_greedily and folder is not None:
        flag, left = "--resume-from", latest_greedy_checkpoint(folder)
        is_there = left is not None
    elif job is train and folder is not None:
        name = f"{args.name}_checkpoint.pth.tar" if args.name else "checkpoint.pth.tar"
        flag, left = "--resume-from", folder / name
        is_there = left.is_file()
    else:
        return None
    return f"{flag} {shlex.quote(str(left))}" if is_there else None


def summaries(args: Namespace) -> list[str]:
    """The summaries that `--summary` asks for; writes nothing but pictures, into `--out-dir`."""
    compressor = ClassifierCompressor(args)
    folder = Path(args.output_dir).expanduser()
    return [
        model_summary(compressor.model, what, logdir=folder if what in PICTURES else None)
        for what in args.summary
    ]


def dry_run(args: Namespace) -> str:
    """What each policy of the schedule touches in which epochs; changes and writes nothing."""
    _import_plugins(args.plugin)
    compressor = ClassifierCompressor(args)
    _refuse_quantized(compressor, train)
    optimizer = compressor.make_optimizer()
    scheduler = compressor.make_scheduler(optimizer)
    lines = [
        f"{args.compress} on {args.arch}: {len(scheduler.policies)} policies, epochs 0..{args.epochs - 1}"
    ]
    lines += [f"  note: {note}" for note in scheduler.idle_notes(0, args.epochs)]
    stretches = stretches_alike(scheduler, args.epochs, optimizer)
    for begin, last, described in islice(stretches, _MAX_LISTED):
        epochs = f"epoch {begin}" if begin == last else f"epochs {begin}..{last}"
        lines += [f"  {epochs}:", *(f"    {line}" for line in described or ["nothing"])]
    if next(stretches, None) is not None:
        lines.append(f"  and so on: only the first {_MAX_LISTED} changes are listed")
    return "\n".join(lines)


def train(compressor: ClassifierCompressor) -> ResultsCard:
    """Train under the schedule, then test."""
    training = ClassifierTraining(compressor)
    if compressor.goes_on and compressor.checkpoint is not None:
        _ = compressor.data, compressor.run  # from here on files are changed
        remove_stale_parts(compressor.checkpoint.path.parent)
    return training.run()


def evaluate(compressor: ClassifierCompressor) -> ResultsCard:
    """Test the model as it is."""
    activations = ActivationPhases(compressor.model, compressor.args.activation_stats)
    _ = compressor.data, compressor.run
    epoch = compressor.checkpoint.epoch if compressor.checkpoint is not None else None
    _LOG.info("--- test ---------------------")
    with activations.collected("test", epoch or 0, compressor.run):
        result = compressor.test()
    return compressor.card(result, compressor.known_reference())


def collect_statistics(compressor: ClassifierCompressor) -> None:
    """Collect activation statistics on a share of the training set into `acts_quantization_stats.yaml`."""
    _name_operations(compressor)
    collector = _collect(compressor, compressor.args.qe_calibration)
    path = collector.save(compressor.run.require_folder() / STATS_FILE)
    _LOG.info("Saved activation statistics to: %s", path)


def quantize_and_evaluate(compressor: ClassifierCompressor) -> ResultsCard:
    """Test the model, quantize it, test it again, and save the quantized checkpoint.

    The uncompressed model on the card is the one that the checkpoint knows of; this one, when it is
    not pruned and knows of none.
    """
    args = compressor.args
    _ = compressor.data
    dense = copy.deepcopy(compressor.model)
    quantizer, collector = _make_quantizer(compressor)
    shape = (1, *compressor.input_shape)
    quantizer.prepare_model(get_dummy_input(device=compressor.device, input_shape=shape))
    folder = compressor.run.require_folder()
    if collector is not None:
        collector.save(folder / STATS_FILE)
    quantizer.save_per_layer_parameters(folder)
    _LOG.info("--- test before quantization ---------------------")
    before = compressor.test(dense)
    _LOG.info("--- test after quantization (simulated) ---------------------")
    after = compressor.test()
    figures = compressor.measure(dense, before)
    card = compressor.card(after, figures, dense)
    uncompressed = compressor.known_reference()
    if compressor.is_thinned:
        uncompressed, whole = compressor.whole(uncompressed)
        measured, thin, uncompressed = compressor.with_latencies(
            (card.measured, compressor.model), (figures, dense), (uncompressed, whole)
        )
        card = build_card(measured, uncompressed, before=thin, is_thinned=True)
    elif uncompressed is not None or compressor.is_pruned(figures):
        card = build_card(card.measured, uncompressed, before=card.reference)
    extras = {
        "quantized_top1": after.top1,
        "reference": None if card.reference is None else asdict(card.reference),
        "before_quantization": None if card.before is None else asdict(card.before),
    }
    name = f"{args.name}_quantized" if args.name else "quantized"
    path = save_checkpoint(0, args.arch, compressor.model, extras=extras, name=name, dir=folder)
    _LOG.info("Saved quantized checkpoint to: %s", path)
    return card


def sweep_sensitivity(compressor: ClassifierCompressor) -> None:
    """Sweep accuracy against sparsity, layer by layer, into `sensitivity.csv` and `sensitivity.png`."""
    args, model = compressor.args, unwrap(compressor.model)
    levels = sparsity_levels(*args.sense_range)
    if not any(True for _ in model.parameters()):
        raise UsageError(
            f"--sense {args.sensitivity}: '{args.arch}' has no parameters to prune; "
            "give a model that has some, or test this one with --evaluate"
        )
    applicable_parameters(model, find_axis(args.sensitivity), ["*"])
    loader = compressor.data.test
    target = _interrupted_sweep(args.sense_resume) if args.sense_resume else compressor.run.require_folder()
    begin = time.perf_counter()
    measured_now: list[int] = []

    def test_func(model: nn.Module) -> tuple[float, float, float]:
        result = evaluate_loop(model, loader, device=compressor.device)
        return result.top1, result.top5, result.loss

    def on_point(point, finished: int, total: int) -> None:
        measured_now.append(finished)
        left = (time.perf_counter() - begin) / len(measured_now) * (total - finished)
        _LOG.info(
            "[%d/%d] %s at sparsity %.2f: Top1 %.3f  Top5 %.3f  Loss %.3f  (about %.0f s left)",
            finished, total, point.parameter, point.level, *point.score, left,
        )  # fmt: skip

    curves = sensitivity_sweep(
        model,
        args.sensitivity,
        levels,
        test_func,
        target,
        f"{loader.num_samples} of {compressor.dataset}, {_fingerprint(loader.indices())}",
        on_point=on_point,
    )
    picture = sensitivities_to_png(curves, target / "sensitivity.png")
    _LOG.info("Saved %s and %s", target / "sensitivity.csv", picture)


def _import_plugins(packages: Iterable[str]) -> None:
    """Import the packages of the user's own, so that what is wrong with one is told at once.

    Raises:
        UnknownNameError: there is no such package, or its code fails.
    """
    for package in packages:
        try:
            importlib.import_module(package)
        except Exception as error:
            raise UnknownNameError(
                f"--plugin {package}: cannot be imported, {type(error).__name__}: {error}; "
                "give a package that lies in the current folder or is installed"
            ) from error


def _refuse_quantized(compressor: ClassifierCompressor, job: Callable[..., Any]) -> None:
    if isinstance(compressor.quantizer, QatQuantizer) and job is not train:
        raise UsageError(
            "the checkpoint is of a model in quantization-aware training, which can be trained on and "
            "evaluated (--evaluate), and nothing else"
        )
    if compressor.is_quantized and not isinstance(compressor.quantizer, QatQuantizer):
        raise UsageError(
            "the checkpoint is of a quantized model, which can be evaluated (--evaluate) and nothing else"
        )


def _fingerprint(indices: Tensor) -> str:
    """A short text that is another one for other images, or another order."""
    return hashlib.sha256(indices.numpy().tobytes()).hexdigest()[:16]


def _interrupted_sweep(folder: str) -> Path:
    if not (Path(folder) / SETTINGS_NAME).is_file():
        raise UsageError(
            f"--sense-resume {folder}: no sweep to go on with, there is no {SETTINGS_NAME}; "
            "give the run folder of a sweep, or leave the flag out"
        )
    return Path(folder)


def _make_quantizer(
    compressor: ClassifierCompressor,
) -> tuple[PostTrainLinearQuantizer, QuantCalibrationStatsCollector | None]:
    """The quantizer that the flags ask for, and the statistics collected for it; nothing is written."""
    args, model = compressor.args, compressor.model
    if args.qe_config_file:
        name = "PostTrainLinearQuantizer"
        quantizer = config_component_from_file_by_class(model, args.qe_config_file, name)
        document = read_document(args.qe_config_file).data
        others = [key for key, value in document.items() if key not in ("version", "quantizers") and value]
        if others:
            _LOG.warning(
                "--qe-config-file %s: without effect: %s; of such a file only its quantizers are read",
                args.qe_config_file,
                ", ".join(others),
            )
        return quantizer, None
    is_weights_only = args.qe_bits_acts == 0 and args.qe_calibration is None
    if args.qe_stats_file or args.qe_dynamic or is_weights_only:
        return _quantizer_of_flags(model, args), None
    _name_operations(compressor)
    # What is wrong with the flags is told before statistics are collected, which may take long.
    parse_multiplier_bits(args.qe_scale_approx_bits, "--qe-scale-approx-bits")
    _quantizer_of_flags(model, _with(args, qe_dynamic=True, qe_scale_approx_bits=None))
    portion = args.qe_calibration or DEFAULT_CALIBRATION
    if args.qe_calibration is None:
        _LOG.info(
            "no source of activation ranges given: calibrating on %.0f %% of the training set", 100 * portion
        )
    collector = _collect(compressor, portion)
    return _quantizer_of_flags(model, _with(args, qe_stats_file=collector.value())), collector


def _quantizer_of_flags(model: nn.Module, args: Namespace) -> PostTrainLinearQuantizer:
    """The quantizer; what is wrong with a setting is told of its flag."""
    try:
        return PostTrainLinearQuantizer.from_args(model, args)
    except UnknownNameError as error:
        no_clip = {strip_wrappers(name) for name in args.qe_no_clip_layers}
        told = [
            text.replace("overrides", "--qe-no-clip-layers" if name in no_clip else "--qe-no-quant-layers", 1)
            for name, text in error.faults.items()
        ]
        raise UnknownNameError("\n".join(told), faults=error.faults) from error
    except QuantizationError as error:
        setting, colon, text = str(error).partition(": ")
        raise QuantizationError(f"{_FLAGS.get(setting, setting)}{colon}{text}") from error


def _name_operations(compressor: ClassifierCompressor) -> None:
    """Make modules of the model's functional operations, so that statistics and the quantizer know them."""
    shape = (1, *compressor.input_shape)
    to_modules(unwrap(compressor.model), get_dummy_input(device=compressor.device, input_shape=shape))


def _collect(compressor: ClassifierCompressor, portion: float) -> QuantCalibrationStatsCollector:
    loader = compressor.data.calibration(portion)
    model = unwrap(compressor.model)
    _LOG.info("Collecting activation statistics on %d training images, in two passes", loader.num_samples)
    collector = QuantCalibrationStatsCollector(model)
    with collector_context(collector):
        evaluate_loop(model, loader, device=compressor.device)
        collector.start_second_pass()
        evaluate_loop(model, loader, device=compressor.device)
        collector.stop_second_pass()
    return collector


def _with(args: Namespace, **changes: Any) -> Namespace:
    return Namespace(**{**vars(args), **changes})
