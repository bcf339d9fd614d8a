"""The program's job `--recommend`: from a finished sensitivity sweep to `schedule.yaml`, which trains.

With `--verify` the levels are tested all together before any training: as the masks of the schedule's last
pruning epoch leave the model, or its quantizer, or its factors, on a copy.
Knows nothing about how levels are chosen (`sensitivity.recommend`), nor how the sweep came about.
"""

from __future__ import annotations

import copy
import logging
import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.apputils.recommend_choice import Sweep, choose_levels
from distiller.apputils.recommend_text import Choice, Sources, header, verified
from distiller.atomic_file import write_whole
from distiller.config import document_config
from distiller.errors import SensitivityError, UsageError
from distiller.interfaces import StepContext
from distiller.layer_replacement import LayerReplacer
from distiller.names import named_parameters, unwrap
from distiller.policy import PruningPolicy
from distiller.schedule_yaml import parse_document
from distiller.scheduler import CompressionScheduler
from distiller.sensitivity.axes import find_axis, weight_owners
from distiller.sensitivity.fingerprint import weights_fingerprint
from distiller.sensitivity.folder import BLOCKS_NAME, CSV_NAME, SETTINGS_NAME, missing_points
from distiller.sensitivity.level_sensitivity import sensitivity_of_level
from distiller.sensitivity.point_file import read_settings
from distiller.sensitivity.report import points_from_csv
from distiller.sensitivity.schedule_text import Chosen, recommended_schedule, schedule_text
from distiller.sensitivity.write_errors import reporting_failed_writes

_LOG = logging.getLogger(__name__)
SCHEDULE_NAME = "schedule.yaml"
_BLOCK = 4


def recommend_schedule(compressor: ClassifierCompressor) -> None:
    """Choose levels, and write the schedule into the run folder.

    Raises:
        SensitivityError: the sweep cannot be read, is not finished, or is of other weights.
        UsageError: the goal cannot be met, or no schedule is made of the axis.
    """
    args, model = compressor.args, unwrap(compressor.model)
    sweep = _read_sweep(args, model)
    choice = choose_levels(compressor, sweep)
    chosen = _chosen(choice, model, args, sweep.axis)
    schedule = recommended_schedule(
        sweep.axis, chosen, args.recommend_epochs, args.recommend_pruner, sweep.block
    )
    dense = next(point for point in sweep.points if point.level == sweep.dense_level)
    sources = Sources(sweep.file.name, sweep.axis, args.arch, compressor.dataset, sweep.points, dense)
    comments = header(sources, choice, args.recommend_epochs, args.recommend_pruner, _command(compressor))
    text = schedule_text(schedule, comments)
    copied = copy.deepcopy(compressor.model)
    optimizer = compressor.make_optimizer(copied)
    scheduler = document_config(copied, optimizer, parse_document(text, SCHEDULE_NAME))
    if args.verify:
        comments.insert(-2, _verify(compressor, scheduler, optimizer, choice))
        text = schedule_text(schedule, comments)
    path = compressor.run.require_folder() / SCHEDULE_NAME
    with reporting_failed_writes(path):
        write_whole(path, text)
    _LOG.info("--- recommended ---------------------\n%s", "\n\n".join(comments))
    _LOG.info("Saved %s", path)


def _read_sweep(args: Namespace, model: nn.Module) -> Sweep:
    given = Path(args.recommend)
    file = given / CSV_NAME if given.is_dir() else given
    if file.with_name(BLOCKS_NAME).exists():
        raise SensitivityError(f"--recommend {given}: the sweep is not over; finish it with --sense-resume")
    try:
        points, path = points_from_csv(file), file.with_name(SETTINGS_NAME)
    except SensitivityError as error:
        raise SensitivityError(
            f"--recommend: {error}; give the run folder of a sweep, or its CSV file"
        ) from error
    if not points:
        raise UsageError(f"--recommend {given}: there is no point in it; give a finished sweep")
    settings = read_settings(path) if path.is_file() else {}
    if not settings:
        _LOG.warning(
            "--recommend: there is no %s beside %s, so nothing tells whether it is of this model's weights",
            SETTINGS_NAME, file,
        )  # fmt: skip
    elif settings.get("weights") != weights_fingerprint(model):
        raise SensitivityError(
            f"--recommend {given}: is the sweep of other weights than this model's; give the checkpoint that "
            "was swept, with --resume-from or --exp-load-weights-from"
        )
    try:
        missing = missing_points(settings, points) if "axes" in settings else []
        block = int((settings.get("context") or {}).get("block", _BLOCK))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SensitivityError(
            f"--recommend {given}: {path.name} is not of a sweep, {type(error).__name__}: {error}; give the "
            "run folder of one, or its CSV file alone"
        ) from error
    if missing:
        raise SensitivityError(
            f"--recommend {given}: {len(missing)} points of the sweep are not in {file.name}, the first is "
            f"{missing[0]}; sweep anew, or give the whole file"
        )
    axis = _axis(args, [point.axis for point in points], settings)
    own = [point for point in points if point.axis in (axis, "")]
    return Sweep(file, axis, find_axis(axis).dense_level, own, block)


def _axis(args: Namespace, found: Sequence[str], settings: Mapping[str, Any]) -> str:
    axes = list(dict.fromkeys(found))
    if axes == [""]:
        told = settings.get("axis") if isinstance(settings.get("axis"), str) else None
        axes = [told or args.recommend_axis] if told or args.recommend_axis else []
        if not axes:
            raise UsageError(
                f"--recommend {args.recommend}: the file does not say its axis; give it with --recommend-axis"
            )
    if args.recommend_axis is None and len(axes) != 1:
        raise UsageError(
            f"--recommend {args.recommend}: has the axes {', '.join(axes)}; say which with --recommend-axis"
        )
    asked = axes[0] if args.recommend_axis is None else find_axis(args.recommend_axis).name
    if asked not in axes:
        raise UsageError(f"--recommend-axis {asked}: the sweep has {', '.join(axes)}")
    return asked


def _chosen(choice: Choice, model: nn.Module, args: Namespace, axis: str) -> list[Chosen]:
    params, owners = dict(named_parameters(model)), weight_owners(model)
    chosen = []
    for own in choice.prunables:
        level = choice.levels[own.name]
        if level in own.amounts:
            by_sensitivity = args.recommend_pruner == "sensitivity" and axis == "element"
            sensitivity = sensitivity_of_level(params[own.name], level) if by_sensitivity else None
            rank = own.size - own.amounts[level].units if axis == "rank" else None
            layers = tuple(owners.get(own.weights[0], ())) if len(own.weights) == 1 else ()
            chosen.append(Chosen(own.weights, level, sensitivity, rank, layers))
    return chosen


def _verify(
    compressor: ClassifierCompressor,
    scheduler: CompressionScheduler,
    optimizer: torch.optim.Optimizer,
    choice: Choice,
) -> str:
    """Test the dense model, and the copy that the scheduler is of as it is at the end of pruning."""
    dense = compressor.test()
    for entry in scheduler.policies:
        if isinstance(entry.policy, PruningPolicy):
            epoch = entry.window.last
        elif isinstance(entry.policy, LayerReplacer):
            epoch = entry.policy.epoch_of_replacement(entry.window)
        else:
            continue
        ctx = StepContext(scheduler.model, scheduler.masks, optimizer, entry.window, epoch)
        entry.policy.on_epoch_begin(ctx)
    with scheduler.masked():
        told = verified(choice.drop, dense, compressor.test(scheduler.model))
    _LOG.info("%s", told)
    return told


def _command(compressor: ClassifierCompressor) -> str:
    args = compressor.args
    words = ["python", "compress_classifier.py", *(["DATASET_DIR"] if args.data else [])]
    words += ["--arch", args.arch, "--dataset", compressor.dataset, "--compress", SCHEDULE_NAME]
    words += ["--resume-from", "CHECKPOINT", "--reset-optimizer", "--epochs", str(args.recommend_epochs)]
    checkpoint = compressor.checkpoint  # by its own seed the same images validate
    seed = 1 if checkpoint is None else checkpoint.extras.get("seed", 1)
    words += ["-b", str(args.batch_size), "--lr", "0.02", "--wd", "1e-4", "--seed", str(seed)]
    return shlex.join(words)
