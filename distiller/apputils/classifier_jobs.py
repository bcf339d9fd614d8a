"""The program's jobs, one function each: train, evaluate, quantize, collect statistics, sweep, summarise.

Each takes the flags by name (a namespace, which it only reads) and, where it writes files,
a run folder. Returns or logs its results. Knows nothing about parsing flags or handlers of logs.
"""

from __future__ import annotations

import importlib
import logging
import shlex
from argparse import Namespace
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from distiller.apputils.activation_phases import ActivationPhases
from distiller.apputils.classifier_training import ClassifierTraining
from distiller.apputils.distillation_chain import RECORD as CHAIN
from distiller.apputils.distillation_chain import distill_in_a_chain
from distiller.apputils.distillation_job import add_distillation
from distiller.apputils.early_exit_job import with_early_exit
from distiller.apputils.greedy_job import latest_greedy_checkpoint, prune_greedily
from distiller.apputils.image_classifier import ClassifierCompressor, Run
from distiller.apputils.int8_job import check_export, export_int8, unquantized
from distiller.apputils.layerwise_job import compress_layerwise
from distiller.apputils.onnx_job import export_to_onnx
from distiller.apputils.packing_job import check_pack, pack_checkpoint, unpack_checkpoint, with_packed
from distiller.apputils.packing_usage import packs_only
from distiller.apputils.pytorch_int8_job import evaluate_in_pytorch
from distiller.apputils.quantization_report_job import write_report
from distiller.apputils.quantization_steps import RECORD
from distiller.apputils.quantize_job import quantize_and_evaluate
from distiller.apputils.recommend_job import recommend_schedule
from distiller.apputils.results_card import ResultsCard
from distiller.apputils.schedule_preview import stretches_alike
from distiller.apputils.sensitivity_job import sweep_sensitivity
from distiller.apputils.statistics_job import collect_activation_histograms, collect_statistics
from distiller.apputils.thinnify_job import thinnify
from distiller.atomic_file import remove_stale_parts
from distiller.errors import UnknownNameError, UsageError
from distiller.layerwise.log import SETTINGS_NAME as LAYERWISE
from distiller.model_summaries import PICTURES, model_summary
from distiller.quantization.training import QatQuantizer
from distiller.sensitivity.folder import SETTINGS_NAME

_LOG = logging.getLogger(__name__)
_MAX_LISTED = 1000


def choose_job(args: Namespace) -> Callable[..., Any]:
    """The job that the flags ask for, in Distiller's order of precedence."""
    if args.unpack:
        return unpack_checkpoint
    if args.greedy:
        return prune_greedily
    if args.export_onnx:
        return export_to_onnx
    if args.activation_histograms is not None:
        return collect_activation_histograms
    if args.qe_calibration is not None and not (args.evaluate and args.quantize_eval):
        return collect_statistics
    if args.sensitivity:
        return sweep_sensitivity
    if args.recommend:
        return recommend_schedule
    if args.layerwise:
        return compress_layerwise
    if args.evaluate and args.quantize_eval:
        return quantize_and_evaluate
    if args.evaluate or args.export_int8:
        return evaluate
    if args.thinnify:
        return thinnify
    if packs_only(args):
        return pack_checkpoint
    return distill_in_a_chain if args.kd_chain else train


def run_job(args: Namespace, open_run: Callable[[], Run]) -> ResultsCard | None:
    """Do the job that the flags ask for; a results card goes into the run folder as `results.json`.

    Args:
        args: the flags by name.
        open_run: makes the run folder; called when all that was asked for is found to be in order.
    """
    job = choose_job(args)
    if job is unpack_checkpoint:
        unpack_checkpoint(args, open_run)
        return None
    if args.compress and job not in (train, thinnify, distill_in_a_chain):
        _LOG.warning("--compress %s: without effect, this job does not train", args.compress)
    _import_plugins(args.plugin)
    compressor = ClassifierCompressor(args, open_run)
    if job not in (evaluate, export_to_onnx, pack_checkpoint):  # the second tells of it itself
        _refuse_quantized(compressor, job)
    check_pack(compressor)
    card = job(compressor)
    if args.pack and job in (evaluate, quantize_and_evaluate):
        card = with_packed(compressor, card)
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
    elif job is compress_layerwise:
        flag, left = "--layerwise-resume", Path(args.layerwise_resume) if args.layerwise_resume else folder
        is_there = left is not None and (left / LAYERWISE).is_file()
    elif job is quantize_and_evaluate and folder is not None:
        flag, left = "--qe-resume", folder
        is_there = (folder / RECORD).is_file()
    elif job is prune_greedily and folder is not None:
        flag, left = "--resume-from", latest_greedy_checkpoint(folder)
        is_there = left is not None
    elif job is distill_in_a_chain:
        flag, left = "--kd-chain-resume", Path(args.kd_chain_resume) if args.kd_chain_resume else folder
        if folder is not None and (folder / CHAIN).is_file():
            left = folder
        is_there = left is not None and (left / CHAIN).is_file()
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
    add_distillation(scheduler, compressor, will_train=False)
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
    card = training.run()
    if not compressor.args.pack:
        return card
    with training.scheduler.masked():
        return with_packed(compressor, card, compressor.args.epochs - 1)


def evaluate(compressor: ClassifierCompressor) -> ResultsCard:
    """Test the model as it is; a quantized one may be exported or converted after it."""
    args = compressor.args
    check_export(compressor)
    if args.qe_convert_pytorch and not compressor.is_quantized:
        raise UsageError(
            "--qe-convert-pytorch: the checkpoint is of a model in floating point; add --quantize-eval"
        )
    if args.qe_report and not isinstance(compressor.quantizer, QatQuantizer):
        raise UsageError(
            "--qe-report: needs the model in floating point; give --quantize-eval and its checkpoint, or the "
            "checkpoint of a model that was trained with quantization"
        )
    activations = ActivationPhases(compressor.model, args.activation_stats)
    _ = compressor.data, compressor.run
    epoch = compressor.checkpoint.epoch if compressor.checkpoint is not None else None
    _LOG.info("--- test ---------------------")
    with activations.collected("test", epoch or 0, compressor.run):
        result = compressor.test()
    card = with_early_exit(compressor, compressor.card(result, compressor.known_reference()))
    if args.export_int8:
        export_int8(compressor, unquantized(compressor), card.before or card.reference)
    if args.qe_convert_pytorch:
        evaluate_in_pytorch(compressor)
    if args.qe_report:
        write_report(compressor, unquantized(compressor))
    return card


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
