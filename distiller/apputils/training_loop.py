"""One epoch of training under a scheduler, and one evaluation.

The loop of `interfaces.py` with data, a device and progress reports around it.
Knows nothing about checkpoints, files or command lines.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distiller.apputils.meters import ClassificationMeter, EvalResult, LossPartsMeter
from distiller.apputils.model_checks import single_image_explained
from distiller.auxiliary_outputs import loss_with_auxiliaries, main_logits
from distiller.branch_points import final_output
from distiller.errors import DivergenceError, UsageError
from distiller.interfaces import PolicyLoss
from distiller.scheduler import CompressionScheduler


class Batches(Protocol):
    """An iterable of (images, labels), shapes (batch, C, H, W) and (batch,), in the order of an epoch."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and augmentation of the next iteration."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """Where an epoch stands; `read` and `read_parts` wait for the device, and are called only when asked for.

    Attributes:
        phase: "train", "validate" or "test".
        epoch: from 0; None outside of training.
        step: mini-batches done.
        steps: mini-batches in all.
        seconds: since the beginning of the epoch.
        read: the figures so far; the loss is the overall one, with the penalties of the schedule.
        read_parts: the mean so far of each part of that loss: in training `Objective Loss` (the
            criterion's, without penalties) and each penalty by its name; nothing in an evaluation.
    """

    phase: str
    epoch: int | None
    step: int
    steps: int
    seconds: float
    read: Callable[[], EvalResult]
    read_parts: Callable[[], dict[str, float]]


Report = Callable[[Progress], None]


def train_epoch(
    model: nn.Module,
    loader: Batches,
    optimizer: Optimizer,
    scheduler: CompressionScheduler,
    epoch: int,
    *,
    criterion: Callable[[Any, Tensor], Tensor] | None = None,
    device: torch.device | str = "cpu",
    report: Report | None = None,
    check_every: int = 10,
    advice: str = "training stops here; try a lower learning rate",
) -> EvalResult:
    """Train for one epoch, calling the scheduler as `interfaces.py` draws it.

    Args:
        model: on `device`; put into training mode.
        loader: mini-batches of the epoch.
        optimizer: of the model's parameters.
        scheduler: its callbacks `on_epoch_begin` and `on_epoch_end` are the caller's.
        epoch: from 0.
        criterion: (logits, labels) -> scalar loss; cross-entropy by default. A model with early exits needs
            one that takes the list of its outputs, as `JointLoss`; its accuracy is that of the final one.
        device: where the batches go.
        report: called after each mini-batch.
        check_every: mini-batches between looks at whether the loss is still finite.
        advice: what to tell the user when it is not, and was in the first mini-batch.

    Returns:
        Overall loss (with the penalties of the schedule) and accuracy over the epoch, as training went.

    Raises:
        DivergenceError: the loss is NaN or infinite.
        UsageError: a batch norm sees a single value of each channel, as of a mini-batch of one image.
    """
    criterion = criterion or nn.CrossEntropyLoss()
    model.train()
    loader.set_epoch(epoch)
    steps = len(loader)
    meter, parts = ClassificationMeter(), LossPartsMeter()
    first_loss = torch.zeros(())
    begin = time.perf_counter()
    for step, (images, labels) in enumerate(loader):
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        scheduler.on_minibatch_begin(epoch, step, steps, optimizer)
        logits, loss = _forward(model, images, labels, criterion)
        policy_loss = scheduler.before_backward_pass(epoch, step, steps, loss, optimizer, True)
        assert isinstance(policy_loss, PolicyLoss)
        optimizer.zero_grad(set_to_none=True)
        policy_loss.overall_loss.backward()
        scheduler.before_parameter_optimization(epoch, step, steps, optimizer)
        optimizer.step()
        scheduler.on_minibatch_end(epoch, step, steps, optimizer)

        first_loss = policy_loss.overall_loss.detach() if step == 0 else first_loss
        meter.update(logits.detach(), labels, policy_loss.overall_loss.detach())
        penalties = ((part.name, part.value) for part in policy_loss.loss_components)
        parts.update([("Objective Loss", loss), *penalties], len(labels))
        if (step + 1) % check_every == 0 or step + 1 == steps:
            _require_finite(meter.result().loss, first_loss.item(), epoch, step, advice, policy_loss)
        if report is not None:
            seconds = time.perf_counter() - begin
            report(Progress("train", epoch, step + 1, steps, seconds, meter.result, parts.result))
    return meter.result()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Batches,
    *,
    criterion: Callable[[Any, Tensor], Tensor] | None = None,
    device: torch.device | str = "cpu",
    report: Report | None = None,
    phase: str = "test",
    epoch: int | None = None,
    num_classes: int | None = None,
) -> EvalResult:
    """Loss and accuracy of a model on all mini-batches of a loader, in evaluation mode.

    Args:
        num_classes: count a confusion matrix of so many classes too.

    Returns:
        The figures; the model's mode is restored.
    """
    criterion = criterion or nn.CrossEntropyLoss()
    was_training = model.training
    model.eval()
    steps = len(loader)
    meter = ClassificationMeter(num_classes=num_classes)
    begin = time.perf_counter()
    try:
        for step, (images, labels) in enumerate(loader):
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            output = model(images)
            meter.update(final_output(output), labels, criterion(output, labels))
            if report is not None:
                seconds = time.perf_counter() - begin
                report(Progress(phase, epoch, step + 1, steps, seconds, meter.result, dict))
    finally:
        model.train(was_training)
    return meter.result()


def _forward(
    model: nn.Module, images: Tensor, labels: Tensor, criterion: Callable[[Any, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Logits and loss; auxiliary classifiers (Inception, GoogLeNet) weigh in as in their papers."""
    with single_image_explained():
        output = model(images)
    if isinstance(output, Tensor):
        return output, criterion(output, labels)
    if isinstance(output, list):
        if isinstance(criterion, nn.CrossEntropyLoss):
            raise UsageError(
                f"training: the model has {len(output) - 1} early exits, whose losses need weights; give "
                "--earlyexit-lossweights, or a JointLoss as criterion"
            )
        return main_logits(final_output(output)), criterion(output, labels)
    return main_logits(output), loss_with_auxiliaries(output, labels, criterion)


def _require_finite(
    loss: float, first_loss: float, epoch: int, step: int, advice: str, policy_loss: PolicyLoss
) -> None:
    if not math.isfinite(first_loss):  # a lower learning rate would not have changed it
        raise DivergenceError(
            f"epoch {epoch}, mini-batch 0: the training loss is {first_loss} before the epoch's first step: "
            "the images, the weights or the model's output are not finite from its start; training stops here"
        )
    if not math.isfinite(loss):
        weighed = "".join(f", or a smaller weight for {part.name}" for part in policy_loss.loss_components)
        raise DivergenceError(
            f"epoch {epoch}, mini-batch {step}: the training loss is {loss}; {advice}{weighed}"
        )
