"""Distillation as the flags ask for it: the teacher joins the schedule, and the results card.

Knows nothing about how flags are parsed, or how distillation is done.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from distiller.apputils.distillation import KnowledgeDistillation
from distiller.apputils.distillation_usage import given_settings
from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.apputils.measurement import Measurement, measure
from distiller.apputils.results_card import ResultsCard
from distiller.apputils.teacher_networks import LoadedTeacher
from distiller.branch_points import exit_names
from distiller.errors import UsageError
from distiller.names import unwrap
from distiller.quantization import stored_params
from distiller.scheduler import CompressionScheduler, ScheduledPolicy

__all__ = [
    "NAME",
    "add_distillation",
    "refuse_lost_teacher",
    "refuse_unlearned_exits",
    "rehearse_hints",
    "with_teachers",
]

_LOG = logging.getLogger(__name__)
NAME = "knowledge distillation"
"""What the policy of the flags goes by."""


def add_distillation(
    scheduler: CompressionScheduler, compressor: ClassifierCompressor, *, will_train: bool = True
) -> None:
    """Let the model learn from the teacher that `--kd-teacher` names.

    A distillation of the schedule that names no teacher gets it; else one more policy is added, in epochs
    `--kd-start-epoch` to `--epochs`.

    Args:
        scheduler: of the schedule.
        compressor: whose model and flags they are.
        will_train: a distillation without a teacher is refused.

    Raises:
        DistillerError: the teacher cannot teach this model, a distillation of the schedule has none, or flags
            and schedule both say how to distil.
    """
    args = compressor.args
    awaiting = [entry for entry in scheduler.policies if _awaits_teacher(entry)]
    if args.kd_teacher is None:
        if awaiting and will_train:
            raise UsageError(
                f"--compress: '{awaiting[0].name}' names no teacher; give one in the schedule, or "
                "--kd-teacher ARCH with --kd-resume CHECKPOINT"
            )
        return
    source: dict[str, Any] = {"arch": args.kd_teacher}
    source |= {"pretrained": True} if args.kd_pretrained else {"checkpoint": args.kd_resume}
    settings = given_settings(args)
    if awaiting and settings:
        raise UsageError(
            f"{settings[0]}: '{awaiting[0].name}' of the schedule says how to distil; leave it out, or say "
            "it there"
        )
    if awaiting:
        for entry in awaiting:
            assert isinstance(entry.policy, KnowledgeDistillation)
            entry.policy.learn_from_files([source])
        return
    keywords = _settings_of(args)
    policy = KnowledgeDistillation(NAME, compressor.model, teacher=source, **keywords)
    scheduler.add_policy(
        policy,
        starting_epoch=args.kd_start_epoch,
        ending_epoch=args.epochs,
        name=NAME,
        settings={"class": KnowledgeDistillation.__name__, **keywords},
    )


def refuse_lost_teacher(compressor: ClassifierCompressor, scheduler: CompressionScheduler) -> None:
    """See to it that a run that learned from the teacher of `--kd-teacher` knows when it goes on without.

    Like a schedule that is left out, it is warned of; beside a schedule, whose policies would not be those of
    the checkpoint, it is refused.

    Raises:
        UsageError: the schedule was given, and the teacher was not.
    """
    checkpoint = compressor.checkpoint
    if checkpoint is None or compressor.args.kd_teacher is not None or NAME not in checkpoint.policies:
        return
    told = (
        f"{checkpoint.path}: its run learned from a teacher, given with --kd-teacher, and none is given now"
    )
    remedy = "give the --kd-* flags of that run"
    if scheduler.policies:
        raise UsageError(
            f"{told}; {remedy}, or start anew from its weights with --exp-load-weights-from or "
            "--reset-optimizer"
        )
    _LOG.warning(
        "%s: training goes on from the labels alone. %s to go on as it began", told, remedy.capitalize()
    )


def refuse_unlearned_exits(model: nn.Module, scheduler: CompressionScheduler) -> None:
    """See to it that early exits learn: they do from the labels alone, not from teachers.

    Raises:
        UsageError: a distillation leaves the labels out.
    """
    names = exit_names(unwrap(model))
    for entry in scheduler.policies:
        policy = entry.policy
        if not names or not isinstance(policy, KnowledgeDistillation):
            continue
        if not (policy.uses_labels and policy.loss_weights.student):
            why = "has no labels" if not policy.uses_labels else "gives the labels no weight"
            raise UsageError(
                f"'{entry.name}': {why}, and early exits ({', '.join(names)}) learn from labels alone; train "
                "with labels, or a network without exits"
            )


def rehearse_hints(scheduler: CompressionScheduler, compressor: ClassifierCompressor) -> None:
    """See to it, before anything is written, that the features of hints can be compared.

    Raises:
        DistillerError: those of one cannot.
    """
    images = torch.zeros(2, *compressor.input_shape, device=compressor.device)
    for entry in scheduler.policies:
        if isinstance(entry.policy, KnowledgeDistillation):
            entry.policy.rehearse_hints(compressor.model, images)


def with_teachers(
    card: ResultsCard, compressor: ClassifierCompressor, scheduler: CompressionScheduler
) -> ResultsCard:
    """The card with the figures of the teachers beside those of their student."""
    teachers = {
        id(teacher.model): teacher
        for entry in scheduler.policies
        if isinstance(entry.policy, KnowledgeDistillation) and entry.policy.teachers is not None
        for teacher in entry.policy.teachers.all
    }
    if not teachers:
        return card
    return replace(card, teachers=tuple(_figures(compressor, teacher) for teacher in teachers.values()))


def _figures(compressor: ClassifierCompressor, teacher: Any) -> Measurement:
    assert isinstance(teacher, LoadedTeacher)
    _LOG.info("--- test of %s ---------------------", teacher.told)
    result, stored = compressor.test(teacher.model), stored_params(teacher.model)
    figures = measure(
        teacher.model,
        result,
        macs=teacher.macs,
        bits_by_param=stored.bits,
        per_channel=stored.per_channel,
        stored=stored.tensors,
    )
    [figures] = compressor.with_latencies((figures, teacher.model))
    return figures


def _awaits_teacher(entry: ScheduledPolicy) -> bool:
    return isinstance(entry.policy, KnowledgeDistillation) and entry.policy.teachers is None


def _settings_of(args: Any) -> dict[str, Any]:
    """The keywords of `KnowledgeDistillation` that the flags say."""
    return {
        "temperature": args.kd_temperature,
        "distill_weight": args.kd_distill_wt,
        "student_weight": None if args.kd_no_labels else args.kd_student_wt,
        "teacher_weight": args.kd_teacher_wt,
        "loss": args.kd_loss,
        "temperature_squared": not args.kd_no_t_squared,
        "labels": "none" if args.kd_no_labels else "given",
        "half": args.kd_half,
        "cache_logits": not args.kd_no_cache,
    }
