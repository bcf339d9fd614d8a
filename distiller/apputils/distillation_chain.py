"""Teacher assistants: a chain of networks, each distilled from the one before it, ending in `--arch`.

Each stage is a training of its own, in a folder of its own, with a results card; an interrupted chain goes on
where it was. Knows nothing about how flags are parsed.

Source: Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant" (arXiv 1902.03393).
"""

from __future__ import annotations

import json
import logging
import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from distiller.apputils.classifier_training import ClassifierTraining
from distiller.apputils.distillation_job import add_distillation, with_teachers
from distiller.apputils.experiment import RunFolder
from distiller.apputils.image_classifier import ClassifierCompressor, Run
from distiller.apputils.intervals import wilson_interval
from distiller.apputils.measurement import Measurement, measurement_of, read_measurement
from distiller.apputils.quantization_usage import flag_of
from distiller.apputils.results_card import ResultsCard
from distiller.atomic_file import remove_stale_parts, write_whole
from distiller.data_loggers.loggers import CsvLogger, PythonLogger, TensorBoardLogger
from distiller.errors import DistillerError, UsageError
from distiller.scheduler import CompressionScheduler

__all__ = ["RECORD", "distill_in_a_chain"]

_LOG = logging.getLogger(__name__)
RECORD = "chain.json"
"""What the chain was begun with, and what its stages came to; in the run folder."""
_CARD, _CHECKPOINT = "results.json", "checkpoint.pth.tar"
_MAY_DIFFER = frozenset(
    ("data", "output_dir", "name", "print_freq", "verbose", "workers", "download", "device", "cpu", "gpus",
     "seed", "kd_chain_resume", "kd_resume", "compress", "load_serialized", "given")
)  # fmt: skip
"""Flags that may be others when a chain goes on."""


@dataclass(frozen=True, slots=True)
class _Stage:
    """One training.

    Attributes:
        arch: the network that learns.
        teacher: the network that it learns from.
        args: the flags of the training.
        folder: its own.
    """

    arch: str
    teacher: str
    args: Namespace
    folder: Path


def distill_in_a_chain(compressor: ClassifierCompressor) -> ResultsCard | None:
    """Train each stage of `--kd-chain` and then `--arch`, and log a table of them.

    All stages are checked before the first one begins: the networks, and the schedule against each of them.

    Returns:
        The results card of the last stage; None when it was finished before.

    Raises:
        DistillerError: a stage cannot be trained, or an interrupted chain was of other flags.
    """
    args = compressor.args
    left = None if args.kd_chain_resume is None else Path(args.kd_chain_resume)
    before = None if left is None else _interrupted(left, args)
    seed = compressor.seed if before is None else int(before["seed"])
    _check_stages(args, seed)
    folder = compressor.run.require_folder()
    if left is not None:
        _take_over(left, folder)
    _write_record(folder, args, seed, [])
    stages = _stages(args, seed, folder)
    figures: list[Measurement] = []
    teacher: Measurement | None = None
    card = None
    for number, stage in enumerate(stages, start=1):
        title = f"stage {number} of {len(stages)}: '{stage.arch}' learns from '{stage.teacher}'"
        if (stage.folder / _CARD).is_file():
            _LOG.info("--- %s: finished before ---", title)
            card = None
        else:
            _LOG.info("--- %s ---", title)
            card = _train(stage)
        figures.append(read_measurement(stage.folder / _CARD))
        teacher = _teacher_in(stages[0].folder / _CARD) if number == 1 else teacher
    rows = [_row("0", args.kd_teacher, "", teacher)]
    rows += [
        _row(str(number), stage.arch, stage.teacher, measured)
        for number, (stage, measured) in enumerate(zip(stages, figures, strict=True), start=1)
    ]
    headers = ["stage", "network", "learned from", "parameters", "top-1", "95 % interval"]
    aligned = ("right", "left", "left", "right", "right", "right")
    _LOG.info("--- chain ---\n%s", tabulate(rows, headers, colalign=aligned, disable_numparse=True))
    _write_record(folder, args, seed, rows)
    if card is None:
        write_whole(folder / _CARD, (stages[-1].folder / _CARD).read_text(encoding="utf-8"))
    return card


def _stages(args: Namespace, seed: int, folder: Path) -> list[_Stage]:
    stages: list[_Stage] = []
    teacher, source = args.kd_teacher, {"kd_resume": args.kd_resume, "kd_pretrained": args.kd_pretrained}
    for number, arch in enumerate([*args.kd_chain, args.arch], start=1):
        own = folder / f"{number}_{arch.replace(':', '.')}"
        changes = {
            "arch": arch,
            "kd_teacher": teacher,
            "kd_chain": None,
            "kd_chain_resume": None,
            "name": None,
            "seed": seed,
            **source,
        }
        stages.append(_Stage(arch, teacher, Namespace(**{**vars(args), **changes}), own))
        teacher, source = arch, {"kd_resume": str(own / _CHECKPOINT), "kd_pretrained": False}
    return stages


def _check_stages(args: Namespace, seed: int) -> None:
    """See to it that each network can be made and goes with the schedule, and the first with the teacher."""
    for number, stage in enumerate(_stages(args, seed, Path())):
        try:
            compressor = ClassifierCompressor(stage.args)
            scheduler = compressor.make_scheduler(compressor.make_optimizer())
            if number == 0:
                add_distillation(scheduler, compressor)
        except DistillerError as error:
            raise UsageError(f"--kd-chain: stage {number + 1}, '{stage.arch}': {error}") from error


def _train(stage: _Stage) -> ResultsCard:
    """Train a stage, from its checkpoint where there is one, and keep its card."""
    stage.folder.mkdir(exist_ok=True)
    remove_stale_parts(stage.folder)
    loggers = (PythonLogger(_LOG), TensorBoardLogger(stage.folder), CsvLogger(stage.folder))
    left = stage.folder / _CHECKPOINT
    args = Namespace(**{**vars(stage.args), "resumed_checkpoint_path": str(left) if left.is_file() else None})
    run = Run(RunFolder(stage.folder, stage.folder, (), ()), loggers)
    try:
        card = _finished(ClassifierCompressor(args, lambda: run), left)
    finally:
        for logger in loggers:
            logger.close()
    path = card.save(stage.folder / _CARD)
    _LOG.info("--- results card (%s) ---\n%s", path, card.to_text())
    return card


def _finished(compressor: ClassifierCompressor, left: Path) -> ResultsCard:
    """The card of a training that begins, goes on, or had ended but for its test."""
    checkpoint = compressor.checkpoint
    epoch = None if checkpoint is None else checkpoint.epoch
    if epoch is None or epoch + 1 < compressor.args.epochs:
        return ClassifierTraining(compressor).run()
    _LOG.info("%s: all epochs are trained, what is missing is the test", left)
    scheduler = CompressionScheduler(compressor.model)
    add_distillation(scheduler, compressor)
    return with_teachers(
        compressor.card(compressor.test(), compressor.known_reference()), compressor, scheduler
    )


def _interrupted(folder: Path, args: Namespace) -> dict[str, Any]:
    """What an interrupted chain was begun with.

    Raises:
        UsageError: there is none, or it was begun with other flags.
    """
    flag = f"--kd-chain-resume {folder}"
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        seed, flags = int(record["seed"]), dict(record["flags"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{flag}: no chain to go on with, there is no {RECORD} of one; give the run folder of a chain, "
            "or leave the flag out"
        ) from error
    for name, value in _flags(args).items():
        if flags.get(name) != value:
            raise UsageError(
                f"{flag}: the chain was begun with {flag_of(name)} {flags.get(name)}, now it is {value}; "
                "give the flags of the interrupted chain"
            )
    if args.seed not in (None, seed):
        raise UsageError(
            f"{flag}: the chain was begun with --seed {seed}, now it is {args.seed}; leave it out"
        )
    return record


def _take_over(old: Path, new: Path) -> None:
    """Copy what the stages of an interrupted chain have come to; a stage is copied whole or not at all."""
    for folder in sorted(path for path in old.iterdir() if path.is_dir() and _is_stage(path)):
        part = new / f"{folder.name}.part"
        shutil.copytree(folder, part, ignore=shutil.ignore_patterns("events.out.tfevents.*"))
        part.rename(new / folder.name)


def _is_stage(folder: Path) -> bool:
    return folder.name.partition("_")[0].isdigit() and not folder.name.endswith(".part")


def _write_record(folder: Path, args: Namespace, seed: int, rows: list[list[str]]) -> None:
    record = {"version": 1, "seed": seed, "flags": _flags(args), "stages": rows}
    write_whole(folder / RECORD, json.dumps(record, indent=2) + "\n")


def _flags(args: Namespace) -> dict[str, Any]:
    """The flags that must be the same when a chain goes on, as JSON gives them back."""
    flags = {name: value for name, value in sorted(vars(args).items()) if name not in _MAY_DIFFER}
    return json.loads(json.dumps(flags, default=str))


def _teacher_in(card: Path) -> Measurement | None:
    """The figures of the first teacher, from the card of the first stage."""
    found = json.loads(card.read_text(encoding="utf-8")).get("teachers")
    return measurement_of(found[0], str(card)) if found else None


def _row(number: str, arch: str, teacher: str, measured: Measurement | None) -> list[str]:
    if measured is None or measured.top1_correct is None or not measured.n:
        return [number, arch, teacher, "-", "-", "-"]
    low, high = wilson_interval(measured.top1_correct, measured.n)
    percent = 100 * measured.top1_correct / measured.n
    return [
        number,
        arch,
        teacher,
        f"{measured.parameters:,}",
        f"{measured.top1_correct:,}/{measured.n:,} = {percent:.2f} %",
        f"{100 * low:.2f} to {100 * high:.2f} %",
    ]
