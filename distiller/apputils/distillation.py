"""The extension `KnowledgeDistillation`: distillation as a schedule asks for it, with teachers out of files.

It is in this package because it reads checkpoints; importing `distiller` registers it.
Knows nothing about flags.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, get_args

from torch import nn

from distiller.apputils.teacher_networks import KEYS_OF_A_TEACHER, check_teacher, is_weight, load_teacher
from distiller.distillation import DistillationLossWeights, Hint, KnowledgeDistillationPolicy
from distiller.distillation.hints import HintKind
from distiller.distillation.losses import LEAST_TEMPERATURE, MOST_TEMPERATURE, LossKind, check_temperature
from distiller.errors import DistillerError, did_you_mean
from distiller.pruning.settings import NotNegative, checked_number
from distiller.registry import EXTENSIONS
from distiller.schedule_yaml import shown
from distiller.signatures import Checked

__all__ = ["KnowledgeDistillation"]

_HINT_KEYS = ("teacher", "student", "weight", "kind")
_LARGEST = 1e6


def _check_hint(entry: Mapping[str, Any]) -> None:
    for key, value in entry.items():
        if key not in _HINT_KEYS:
            hint = did_you_mean(str(key), _HINT_KEYS) or f"; it takes {', '.join(_HINT_KEYS)}"
            raise DistillerError(f"'{key}' is unknown to a hint{hint}")
        if key in ("teacher", "student") and (not isinstance(value, str) or not value):
            raise DistillerError(f"'{key}' of a hint must be the name of a layer, got {shown(value)}")
        if key == "weight" and not is_weight(value):
            raise DistillerError(f"'weight' of a hint must be a number more than 0, got {shown(value)}")
        if key == "kind" and value not in get_args(HintKind):
            kinds = " or ".join(get_args(HintKind))
            raise DistillerError(f"'kind' of a hint must be {kinds}, got {shown(value)}")
    for key in ("teacher", "student"):
        if key not in entry:
            raise DistillerError(f"a hint needs the name of a layer of the {key}, '{key}'")


_TEXT, _ABOVE_0 = {"type": "string", "minLength": 1}, {"type": "number", "exclusiveMinimum": 0}
_TEACHER = Checked(
    check_teacher,
    {
        "properties": dict(
            zip(KEYS_OF_A_TEACHER, (_TEXT, _TEXT, {"type": "boolean"}, _ABOVE_0), strict=True)
        ),
        "oneOf": [
            {"required": ["checkpoint"], "properties": {"pretrained": {"const": False}}},
            {
                "required": ["arch", "pretrained"],
                "properties": {"pretrained": {"const": True}},
                "not": {"required": ["checkpoint"]},
            },
        ],
        "additionalProperties": False,
    },
)
_HINT = Checked(
    _check_hint,
    {
        "properties": {
            "teacher": _TEXT,
            "student": _TEXT,
            "weight": _ABOVE_0,
            "kind": {"enum": list(get_args(HintKind))},
        },
        "required": ["teacher", "student"],
        "additionalProperties": False,
    },
)
_ABOVE = checked_number(above=0, most=_LARGEST)
_TEMPERATURE = Checked(
    partial(check_temperature, ""), {"minimum": LEAST_TEMPERATURE, "maximum": MOST_TEMPERATURE}
)


@EXTENSIONS.register
class KnowledgeDistillation(KnowledgeDistillationPolicy):
    """Lets the model learn from teachers: trained networks, larger ones or its own uncompressed self.

    loss = student_weight * loss of the labels + distill_weight * T^2 * KL(teacher || student)
    + teacher_weight * cross-entropy with the teacher's most likely class + the hints, each with its weight.

    Penalties of regularizers are added to it as they are, wherever they stand. Teachers are in evaluation
    mode and never change, and are no part of the model nor of its checkpoints. Their answers are computed
    once for each image and kept (64 MiB at most, in the checkpoints too) as long as images come back; where
    they are augmented, it sees so after two epochs and keeps none.

    Args:
        name: the instance's name in the schedule.
        model: the model in training.
        teacher: one teacher: `arch`, and `checkpoint` (a file; of a thinned or quantized network too) or
            `pretrained: true` (torchvision's weights). Without it and `teachers` the teacher is that of
            `--kd-teacher`.
        teachers: several, each as `teacher`, with a `weight` above 0 (default 1): the student learns from the
            weighted mean of their softened probabilities.
        temperature: T, from 0.01 to 1000.
        distill_weight: of the divergence from the teachers, 0 or more.
        student_weight: of the loss of the labels, 0 or more; default 0.5.
        teacher_weight: of the cross-entropy with the teachers' most likely class, 0 or more.
        loss: `kl`, or `cross_entropy` with the teachers' softened probabilities.
        temperature_squared: multiply the divergence by T^2.
        labels: `none`: labels are not learned from at all.
        hints: layers that learn from layers of the first teacher, each {teacher: layer, student: layer,
            weight: above 0 (default 1), kind: fitnets or attention}.
        regressor_lr: learning rate of the regressors of `fitnets` hints, above 0.
        half: the teachers compute in 16 bits: float16 on CUDA, bfloat16 elsewhere. Not quantized ones.
        cache_logits: keep the teachers' answers; hints need the teacher to run each time, and go without.

    Raises:
        DistillerError: settings that do not go together, or a teacher that cannot teach this model.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531); hints:
    Romero et al., "FitNets" (arXiv 1412.6550); attention: Zagoruyko, Komodakis (arXiv 1612.03928); with
    quantization: Mishra, Marr, "Apprentice" (arXiv 1711.05852).
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        teacher: Annotated[dict[str, Any], _TEACHER] | None = None,
        teachers: list[Annotated[dict[str, Any], _TEACHER]] | None = None,
        temperature: Annotated[float, _TEMPERATURE] = 1.0,
        distill_weight: NotNegative = 0.5,
        student_weight: NotNegative | None = None,
        teacher_weight: NotNegative = 0.0,
        loss: LossKind = "kl",
        temperature_squared: bool = True,
        labels: Literal["given", "none"] = "given",
        hints: list[Annotated[dict[str, Any], _HINT]] | None = None,
        regressor_lr: Annotated[float, _ABOVE] = 1e-3,
        half: bool = False,
        cache_logits: bool = True,
    ) -> None:
        self.name = name
        if labels == "none" and student_weight:
            raise DistillerError(
                f"the weight of labels is {student_weight:g}, and labels: none says there are none; leave "
                "one of them out"
            )
        for entry in hints or ():
            _check_hint(entry)
        weights = DistillationLossWeights(
            distill_weight, 0.5 if student_weight is None else student_weight, teacher_weight
        )
        super().__init__(
            model,
            None,
            temperature,
            weights,
            loss=loss,
            scale_by_temperature_squared=temperature_squared,
            uses_labels=labels == "given",
            hints=[Hint(**entry) for entry in hints or ()],
            regressor_lr=regressor_lr,
            half=half,
            cache_logits=cache_logits,
        )
        if teacher is not None and teachers is not None:
            raise DistillerError("both 'teacher' and 'teachers' given; give one")
        sources = [teacher] if teacher is not None else teachers
        if sources is not None:
            self.learn_from_files(sources)

    def learn_from_files(self, sources: Sequence[Mapping[str, Any]]) -> None:
        """Load the teachers, and learn from them.

        Args:
            sources: each as `teacher` in a schedule.

        Raises:
            DistillerError: there are none, or one cannot teach this model.
        """
        loaded = [load_teacher(source, self.student) for source in sources]
        for teacher in loaded:
            if self._half and teacher.is_quantized:
                raise DistillerError(f"half: {teacher.told} is quantized, and stays as it is; leave half out")
        self.learn_from(loaded)
