"""A schedule's policies run in the epochs that matter to them, and in no other.

Pruning over a hundred epochs is compressed in time by leaving out the epochs in which no policy begins or
ends: the others keep their numbers, so windows, their order and their overlaps are those of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distiller.interfaces import PolicyLoss
from distiller.names import named_parameters
from distiller.scheduler import CompressionScheduler
from tests.compat.distiller_schedules import Task
from tests.compat.promises import GroupLasso, Measured, Promise

BASE_RATE = 1e-5
"""So low that groups made small do not grow over a threshold of 0.0002 within a few steps."""


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        epochs: the epochs that were trained.
        measured: of every promise, at the evaluation in its policy's last epoch and in the model after the last
            step of all.
        rates: learning rate after each epoch, as a factor of the first one.
        penalties: by epoch, what the regularizers added to the first loss and what was promised.
    """

    epochs: list[int]
    measured: list[Measured] = field(default_factory=list)
    rates: dict[int, float] = field(default_factory=dict)
    penalties: dict[int, tuple[list[float], list[float]]] = field(default_factory=dict)


def epochs_that_matter(scheduler: CompressionScheduler, promises: Sequence[Promise]) -> list[int]:
    """First and last epoch of each policy, and one after the last pruner and regularizer."""
    matter = {epoch for entry in scheduler.policies for epoch in (entry.window.start, entry.window.last)}
    if promises:
        matter.add(max(promise.window.epochs[-1] for promise in promises) + 1)
    return sorted(matter)


def make_optimizer(task: Task) -> Optimizer:
    return torch.optim.SGD(task.model.parameters(), lr=BASE_RATE, momentum=0.9, weight_decay=1e-4)


def look_at(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Thinning gives the parameters other data."""
    weights.update({name: param.detach() for name, param in named_parameters(model)})


def run(
    task: Task,
    optimizer: Optimizer,
    scheduler: CompressionScheduler,
    promises: Sequence[Promise],
    batches: int,
) -> Outcome:
    """The loop of `distiller.interfaces`, with the promises beside it."""
    weights: dict[str, Tensor] = {}
    look_at(task.model, weights)
    outcome = Outcome(epochs_that_matter(scheduler, promises))
    for promise in promises:
        promise.begins(weights)
        promise.prepare(weights)
    for epoch in outcome.epochs:
        for promise in promises:
            promise.epoch_begins(epoch, weights)
        scheduler.on_epoch_begin(epoch, optimizer)
        for minibatch in range(batches):
            for promise in promises:
                promise.minibatch_begins(epoch, minibatch, weights)
            scheduler.on_minibatch_begin(epoch, minibatch, batches, optimizer)
            look_at(task.model, weights)
            for promise in promises:
                promise.forward(epoch, minibatch, weights)
            loss = scheduler.before_backward_pass(epoch, minibatch, batches, task.loss(), optimizer, True)
            assert isinstance(loss, PolicyLoss)
            if minibatch == 0:
                added = [float(part.value) for part in loss.loss_components]
                outcome.penalties[epoch] = (
                    added,
                    [
                        promise.penalty(weights)
                        for promise in promises
                        if isinstance(promise, GroupLasso) and epoch in promise.window.epochs
                    ],
                )
            optimizer.zero_grad()
            loss.overall_loss.backward()
            scheduler.before_parameter_optimization(epoch, minibatch, batches, optimizer)
            optimizer.step()
            for promise in promises:
                promise.stepped(epoch, weights)
            scheduler.on_minibatch_end(epoch, minibatch, batches, optimizer)
        if epoch == outcome.epochs[-1]:
            for promise in promises:
                outcome.measured += promise.measure(weights)
        with scheduler.masked():
            for promise in promises:
                if epoch == promise.window.epochs[-1]:
                    outcome.measured += promise.measure(weights)
        scheduler.on_epoch_end(epoch, optimizer, {"loss": 1.0, "top1": 10.0})
        outcome.rates[epoch] = optimizer.param_groups[0]["lr"] / BASE_RATE
    return outcome
