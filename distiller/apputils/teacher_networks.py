"""Teachers out of checkpoints, and torchvision's: the networks that a student is to learn from.

A checkpoint may be of a thinned or quantized network. Knows nothing about losses, schedules or flags.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distiller.apputils.checkpoint import (
    Checkpoint,
    load_state,
    read_checkpoint,
    restore_quantizer,
    restore_structure,
)
from distiller.apputils.model_checks import check_finite
from distiller.dataset_facts import DATASET_FACTS
from distiller.distillation import Teacher, final_logits
from distiller.errors import CheckpointError, DistillerError, UsageError, did_you_mean, users_code
from distiller.evaluation_mode import buffers_kept, evaluating
from distiller.model_summaries import total_macs
from distiller.models import create_model
from distiller.names import unwrap
from distiller.observation import unobserved
from distiller.schedule_yaml import shown

__all__ = ["KEYS_OF_A_TEACHER", "LoadedTeacher", "check_teacher", "is_weight", "load_teacher"]

_LOG = logging.getLogger(__name__)

KEYS_OF_A_TEACHER = ("arch", "checkpoint", "pretrained", "weight")
_IMAGENET_CLASSES = 1000


@dataclass(frozen=True, slots=True)
class LoadedTeacher(Teacher):
    """A teacher of which more is known than its network.

    Attributes:
        macs: multiply-accumulates for one image, before it was quantized.
        is_quantized: its weights are.
    """

    macs: int = 0
    is_quantized: bool = False


def check_teacher(source: Mapping[str, Any]) -> None:
    """Refuse what does not name a teacher.

    Args:
        source: `arch` (with a checkpoint that tells it, not needed), one of `checkpoint` (file) and
            `pretrained` (true: torchvision's weights), and `weight` among several teachers, above 0.

    Raises:
        DistillerError: saying what is wrong.
    """
    for key, value in source.items():
        if key not in KEYS_OF_A_TEACHER:
            hint = did_you_mean(str(key), KEYS_OF_A_TEACHER) or f"; it takes {', '.join(KEYS_OF_A_TEACHER)}"
            raise DistillerError(f"'{key}' is unknown to a teacher{hint}")
        if key in ("arch", "checkpoint") and (not isinstance(value, str) or not value):
            raise DistillerError(f"'{key}' of a teacher must be text, got {shown(value)}")
        if key == "pretrained" and not isinstance(value, bool):
            raise DistillerError(f"'pretrained' of a teacher must be true or false, got {shown(value)}")
        if key == "weight" and not is_weight(value):
            raise DistillerError(f"'weight' of a teacher must be a number more than 0, got {shown(value)}")
    if bool(source.get("pretrained")) == ("checkpoint" in source):
        raise DistillerError("a teacher needs its weights: give one of 'checkpoint' and 'pretrained'")
    if source.get("pretrained") and "arch" not in source:
        raise DistillerError("a teacher with torchvision's weights needs its 'arch'")


def is_weight(value: Any) -> bool:
    """Whether a value out of a file is a finite number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def load_teacher(source: Mapping[str, Any], student: nn.Module) -> LoadedTeacher:
    """The network that `source` names, with its weights, as one that answers the student's images.

    Draws no random numbers that others would miss.

    Args:
        source: as in `check_teacher`.
        student: the model in training, of `create_model`.

    Raises:
        DistillerError: there is no such network, its checkpoint is of another one or of other data, or it
            does not answer the student's images with the student's classes.
    """
    check_teacher(source)
    shape = getattr(unwrap(student), "input_shape", None)
    if shape is None:
        raise UsageError(
            "distillation: the shape of the student's images is not known; create the student by "
            "create_model, or set its input_shape"
        )
    shape = (1, *shape[1:])
    classes = _classes(student, shape)
    path = source.get("checkpoint")
    checkpoint = read_checkpoint(path) if path is not None else None
    arch = source.get("arch") or (None if checkpoint is None else checkpoint.arch)
    if arch is None:
        raise CheckpointError(f"{path}: does not say which network it is of; give the teacher's 'arch'")
    told = f"teacher '{arch}'" + (f" of {path}" if path is not None else "")
    dataset = _dataset(student, checkpoint, told)
    if checkpoint is None and classes != _IMAGENET_CLASSES:
        raise UsageError(
            f"{told}: torchvision's weights answer with the {_IMAGENET_CLASSES:,} classes of ImageNet, the "
            f"student with {classes}; give a checkpoint of a network trained on the student's data"
        )
    with torch.random.fork_rng(devices=[]):
        model = create_model(
            checkpoint is None, dataset, arch, parallel=False, num_classes=classes, input_shape=shape
        )
    takes = tuple(getattr(model, "input_shape", shape))
    if takes != shape:
        raise UsageError(
            f"{told}: takes images of shape {takes[1:]}, the student's are {shape[1:]}; give a teacher for "
            "the same images"
        )
    macs, is_quantized = _brought_back(model, checkpoint, shape)
    model.to(next((param.device for param in student.parameters()), torch.device("cpu")))
    answer = _answer(model, shape, told)
    if answer.shape[1:2] != (classes,):
        raise DistillerError(
            f"{told}: answers an image with logits of shape {tuple(answer.shape)}, the student has {classes} "
            "classes; both must have the same"
        )
    return LoadedTeacher(model, float(source.get("weight", 1.0)), told, macs, is_quantized)


def _brought_back(
    model: nn.Module, checkpoint: Checkpoint | None, shape: tuple[int, ...]
) -> tuple[int, bool]:
    """Bring a network to what a checkpoint holds; returns its MACs, and whether it is quantized."""
    if checkpoint is None:
        return total_macs(model, shape), False
    for note in checkpoint.notes:
        _LOG.warning("%s: %s", checkpoint.path, note)
    restore_structure(model, checkpoint)
    macs = total_macs(model, shape)
    quantizer = restore_quantizer(model, checkpoint)
    load_state(model, checkpoint)
    check_finite(model, checkpoint.path)
    return macs, quantizer is not None


def _dataset(student: nn.Module, checkpoint: Checkpoint | None, told: str) -> str:
    ours = getattr(unwrap(student), "dataset", None)
    theirs = None if checkpoint is None else checkpoint.dataset
    # What a function of the user's gives may be called anything: the classes are compared further on.
    if ours != theirs and DATASET_FACTS.keys() >= {ours, theirs}:
        raise CheckpointError(
            f"{told}: is of data set '{theirs}', the student learns '{ours}'; give a teacher of the same data"
        )
    dataset = ours or theirs
    if dataset is None:
        raise UsageError(f"{told}: the data set is not known; create the student by create_model")
    return dataset


def _classes(student: nn.Module, shape: tuple[int, ...]) -> int:
    """How many the student has; one that `create_model` did not make is asked."""
    bare = unwrap(student)
    known = getattr(bare, "num_classes", None)
    if isinstance(known, int):
        return known
    facts = DATASET_FACTS.get(getattr(bare, "dataset", None) or "")
    return _answer(student, shape, "the student").shape[1] if facts is None else facts.num_classes


def _answer(model: nn.Module, shape: tuple[int, ...], told: str) -> Tensor:
    """What a network answers to one empty image; nothing of it changes."""
    device = next((param.device for param in model.parameters()), torch.device("cpu"))
    with (
        unobserved(model),
        evaluating(model),
        buffers_kept(model),
        users_code(f"{told}, given an image of shape {shape[1:]}"),
    ):
        return final_logits(model(torch.zeros(shape, device=device)), told)
