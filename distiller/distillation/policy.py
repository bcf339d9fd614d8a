"""Knowledge distillation: while its policy is open, a student learns from the answers of its teachers.

    loss = w_student * loss of the labels + w_distill * T^2 * KL(teacher || student) + w_teacher * loss of the
           teacher's most likely label + sum of w_hint * loss of the hint

The policy sees the student's inputs and outputs by hooks that are there between `on_minibatch_begin` and
`before_backward_pass` alone: any loop that calls the scheduler distils, and evaluations are never seen.
Knows nothing about files or where teachers come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distiller.distillation.hints import Hint, Hints
from distiller.distillation.logits_cache import LogitsCache
from distiller.distillation.losses import (
    LossKind,
    blended_log_probabilities,
    check_temperature,
    divergence,
    teacher_label_loss,
)
from distiller.distillation.teachers import Teacher, Teachers, final_logits
from distiller.errors import CheckpointError, DistillerError, require
from distiller.evaluation_mode import evaluating
from distiller.interfaces import LossComponent, Policy, PolicyLoss, StepContext
from distiller.names import find_module, named_modules, unwrap
from distiller.observation import watch_inputs, watch_output
from distiller.tensor_cuts import TensorCuts

__all__ = ["DistillationLossWeights", "KnowledgeDistillationPolicy"]


class DistillationLossWeights(NamedTuple):
    """What the parts of the loss are multiplied with, each 0 or more.

    Attributes:
        distill: of the divergence from the teacher's softened probabilities.
        student: of the loss of the labels.
        teacher: of the cross-entropy with the teacher's most likely label.
    """

    distill: float = 0.5
    student: float = 0.5
    teacher: float = 0.0


class KnowledgeDistillationPolicy(Policy):
    """Lets a student learn from teachers, in the epochs of its policy.

    Only the loss that the training loop computes is weighted with `loss_weights.student`: penalties of
    regularizers, and whatever else other policies add, stay as they are, wherever they stand in the schedule.
    The teachers are no part of the student, nor of its checkpoints, and no other policy reaches them.

    Args:
        student_model: the model in training.
        teacher_model: the network that teaches, or several `Teacher`; None: told later, by `learn_from`.
        temperature: T, from 0.01 to 1000.
        loss_weights: of the parts of the loss.
        loss: the divergence from the teachers' answers.
        scale_by_temperature_squared: multiply it by T^2.
        uses_labels: False: the loss of the labels is not looked at, whatever its weight.
        hints: layers that learn from layers of the first teacher.
        regressor_lr: learning rate of the hints' regressors.
        half: let the teachers compute in 16 bits: float16 on CUDA, bfloat16 elsewhere.
        cache_logits: compute the teachers' answers once for each image, and keep them (at most 64 MiB, in the
            checkpoints too), unless images are augmented, which it sees by itself after two epochs. Not
            with hints, which need the teacher to run.

    Raises:
        DistillerError: a number out of range, or nothing to learn.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531); together
    with quantization-aware training: Mishra, Marr, "Apprentice" (arXiv 1711.05852).
    """

    weighs_objective = True

    def __init__(
        self,
        student_model: nn.Module,
        teacher_model: nn.Module | Sequence[Teacher] | None,
        temperature: float = 1.0,
        loss_weights: DistillationLossWeights = DistillationLossWeights(),  # noqa: B008 - a constant
        *,
        loss: LossKind = "kl",
        scale_by_temperature_squared: bool = True,
        uses_labels: bool = True,
        hints: Sequence[Hint] = (),
        regressor_lr: float = 1e-3,
        half: bool = False,
        cache_logits: bool = True,
    ) -> None:
        require(student_model, nn.Module, "KnowledgeDistillationPolicy: student_model", "a torch.nn.Module")
        _check_numbers(temperature, DistillationLossWeights(*loss_weights), hints)
        self.student = student_model
        self.temperature = temperature
        self.loss_weights = DistillationLossWeights(*loss_weights)
        self.uses_labels = uses_labels
        self.teachers: Teachers | None = None
        self.hints = Hints(hints, regressor_lr)
        self._kind: LossKind = loss
        self._scale = temperature**2 if scale_by_temperature_squared else 1.0
        self._half = half
        self._cache = LogitsCache() if cache_logits and not hints else None
        self._handles: list[RemovableHandle] = []
        self._inputs: tuple[Any, ...] | None = None
        self._versions: list[int] = []
        self._output: Any = None
        self._taught_by: str | None = None
        if teacher_model is not None:
            self.learn_from(teacher_model)

    def learn_from(self, teacher_model: nn.Module | Sequence[Teacher]) -> None:
        """Tell a policy that was made without them its teachers.

        Raises:
            DistillerError: there are none, or one of them has parameters of the student, or the first one
                lacks a layer that hints name.
            CheckpointError: they have other weights than those that taught before a restart.
        """
        if isinstance(teacher_model, nn.Module):
            teacher_model = [Teacher(teacher_model)]
        ours = {id(param) for param in self.student.parameters()}
        for teacher in teacher_model:
            if any(id(param) in ours for param in teacher.model.parameters()):
                raise DistillerError(
                    f"distillation: {teacher.told} has parameters of the student, which would not learn any "
                    "more; give a copy of it"
                )
        self.teachers = Teachers(teacher_model, self._half)
        for layer in self.hints.teacher_layers:
            find_module(self.teachers.all[0].model, layer)
        self._check_teachers()

    def forward(self, *inputs: Any) -> Any:
        """Distiller's call in place of `model(*inputs)`; both do here."""
        return self.student(*inputs)

    def check(self, model: nn.Module) -> None:  # noqa: D102
        self.hints.check(model)

    @torch.no_grad()
    def rehearse_hints(self, student: nn.Module, *inputs: Any) -> None:
        """See to it that the features of each hint can be compared, as far as the student has its layers yet.

        Args:
            student: as it is when training begins.
            inputs: zeros, as both networks take them.

        Raises:
            DistillerError: those of one cannot, or a layer gives no tensor.
        """
        names = {name for name, _ in named_modules(unwrap(student))}
        if self.teachers is None or not self.hints.all or not names.issuperset(self.hints.student_layers):
            return
        self.teachers.to(inputs[0].device)
        _, theirs = self.teachers.answers_and_features(self.hints.teacher_layers, *inputs)
        self.hints.attach(student)
        try:
            with evaluating(student):
                student(*inputs)
            self.hints.compare(theirs)
        finally:
            self.hints.detach()

    def on_epoch_begin(self, ctx: StepContext) -> None:
        """See to it that there are teachers, where the student is.

        Raises:
            DistillerError: there are none.
        """
        first = next(ctx.model.parameters(), None)
        self._required_teachers().to(first.device if first is not None else torch.device("cpu"))

    def on_minibatch_begin(self, ctx: StepContext) -> None:
        """Look at the student's next forward pass in training mode.

        The student is the scheduler's model: the one that this policy was made with may be a copy, as it will
        be when other policies have replaced its layers.
        """
        self._look_away()
        self._handles = [
            watch_inputs(ctx.model, self._see_inputs),
            watch_output(ctx.model, self._see_output),
        ]
        self.hints.attach(ctx.model)

    def before_backward_pass(self, ctx: StepContext, loss: Tensor) -> PolicyLoss:
        """The weighted sum; its parts are logged without their weights and without T^2.

        Raises:
            DistillerError: the student has not been run since `on_minibatch_begin`, in training mode, or has
                changed its inputs.
        """
        try:
            terms, parts = self._terms(loss)
        finally:
            self._look_away()
        return PolicyLoss(torch.stack([term.to(loss) for term in terms]).sum(), tuple(parts))

    def before_parameter_optimization(self, ctx: StepContext) -> None:  # noqa: D102
        self.hints.step()

    def on_epoch_end(self, ctx: StepContext, metrics: Mapping[str, float]) -> None:
        """Judge whether keeping answers is worth while; leave nothing on the student."""
        self._look_away()
        if self._cache is not None:
            self._cache.end_epoch()

    def follow_thinning(self, cuts: TensorCuts) -> None:  # noqa: D102
        self.hints.follow_thinning(cuts)

    def describe(self, ctx: StepContext) -> str:  # noqa: D102
        weights = self.loss_weights
        by = "a teacher that is not given yet" if self.teachers is None else self.teachers.told
        terms = [f"{weights.student:g} x labels"] if self.uses_labels and weights.student else []
        terms += [f"{weights.distill:g} x distillation at T {self.temperature:g}"] if weights.distill else []
        terms += [f"{weights.teacher:g} x its labels"] if weights.teacher else []
        terms += [f"{hint.weight:g} x {hint.student} ({hint.kind})" for hint in self.hints.all]
        return f"{type(self).__name__}: from {by}: {' + '.join(terms)}"

    def state_dict(self) -> dict[str, Any]:
        """Which teachers taught (not their weights), the answers that are kept, and the hints' regressors."""
        return {
            "taught_by": self._taught_by if self.teachers is None else self.teachers.fingerprint,
            "answers": None if self._cache is None else self._cache.state_dict(),
            "hints": self.hints.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with `state`.

        Raises:
            CheckpointError: it is of other hints, or of other teachers.
        """
        self._taught_by = state["taught_by"]
        self._check_teachers()
        if self._cache is not None and state["answers"] is not None:
            self._cache.load_state_dict(state["answers"])
        self.hints.load_state_dict(state["hints"])

    def _terms(self, loss: Tensor) -> tuple[list[Tensor], list[LossComponent]]:
        """The parts of the loss with their weights; and those that are logged."""
        teachers, weights = self._required_teachers(), self.loss_weights
        logits = final_logits(self._output, "the student") if self._output is not None else None
        if self._inputs is None or logits is None:
            raise DistillerError(
                "distillation: the student was not run in training mode between on_minibatch_begin and "
                "before_backward_pass; call the model that the scheduler has (or the policy's forward)"
            )
        tensors = [value for value in self._inputs if isinstance(value, Tensor)]
        if self._versions != [tensor._version for tensor in tensors]:
            raise DistillerError(
                "distillation: the student changes its inputs in place, so that its teacher would see "
                "others; let it work on a copy"
            )
        features: dict[str, Tensor] = {}
        if self.hints.all:
            answers, features = teachers.answers_and_features(self.hints.teacher_layers, *self._inputs)
        else:
            answers = self._answers(teachers, self._inputs)
        several = answers.unbind(1)
        terms = [weights.student * loss] if self.uses_labels and weights.student else []
        parts = []
        if weights.distill:
            targets = blended_log_probabilities(several, teachers.weights, self.temperature)
            distilled = divergence(logits, targets, self.temperature, self._kind)
            terms.append(weights.distill * self._scale * distilled)
            parts.append(LossComponent("Distill Loss", distilled.detach()))
        if weights.teacher:
            labelled = teacher_label_loss(logits, blended_log_probabilities(several, teachers.weights, 1.0))
            terms.append(weights.teacher * labelled)
            parts.append(LossComponent("Teacher Labels Loss", labelled.detach()))
        for hint, value in zip(self.hints.all, self.hints.losses(features), strict=True):
            terms.append(hint.weight * value)
            parts.append(LossComponent(f"Hint Loss {hint.student} ({hint.kind})", value.detach()))
        return terms, parts

    def _answers(self, teachers: Teachers, inputs: Sequence[Any]) -> Tensor:
        """(batch, teachers, classes, ...); from the cache where images alone say what the answer is."""
        is_image = len(inputs) == 1 and isinstance(inputs[0], Tensor)
        if self._cache is None or not is_image or not inputs[0].numel():
            return teachers.answers(*inputs)
        return self._cache.fetch(inputs[0], teachers.answers)

    def _check_teachers(self) -> None:
        if self.teachers is not None and self._taught_by not in (None, self.teachers.fingerprint):
            raise CheckpointError(
                f"distillation: {self.teachers.told} has other weights than when the checkpoint was written; "
                "give the teacher of that run, or start anew with --reset-optimizer"
            )

    def _required_teachers(self) -> Teachers:
        if self.teachers is None:
            raise DistillerError(
                "distillation: there is no teacher; name it in the schedule (teacher: {arch: ..., "
                "checkpoint: ...}), give --kd-teacher and --kd-resume, or call learn_from"
            )
        return self.teachers

    def _see_inputs(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training:
            self._inputs = inputs
            self._versions = [value._version for value in inputs if isinstance(value, Tensor)]

    def _see_output(self, module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        if module.training:
            self._output = output

    def _look_away(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.hints.detach()
        self._handles, self._versions = [], []
        self._inputs = self._output = None


def _check_numbers(temperature: float, weights: DistillationLossWeights, hints: Sequence[Hint]) -> None:
    require(temperature, (int, float), "distillation: temperature", "a number")
    check_temperature("temperature", temperature)
    for part, weight in weights._asdict().items():
        require(weight, (int, float), f"distillation: the weight '{part}'", "a number")
        if not 0 <= weight < float("inf"):
            raise DistillerError(f"the weight '{part}' of distillation must be 0 or more, got {weight}")
    for hint in hints:
        if not 0 < hint.weight < float("inf"):
            raise DistillerError(
                f"hints: the weight of '{hint.student}' must be more than 0, got {hint.weight}"
            )
    if not (weights.distill or weights.teacher or hints):
        raise DistillerError(
            "distillation: nothing to learn from the teacher: the weights 'distill' and 'teacher' are 0 and "
            "there are no hints"
        )
