"""Pruners and loops that tests put in the place of real ones."""

from __future__ import annotations

import torch

from distiller.interfaces import Pruner
from distiller.names import resolve_all


class HalfPruner(Pruner):
    """Prunes every other element of its weights; notes the epochs it was asked in."""

    def __init__(self, *weights: str) -> None:
        self.name = "half"
        self.weights = weights
        self.epochs: list[int] = []

    def select(self, param_names):
        return resolve_all(self.weights, param_names)

    def compute_masks(self, params, ctx):
        self.epochs.append(ctx.epoch)
        return {name: every_other(param) for name, param in params.items()}

    def state_dict(self):
        return {"epochs": list(self.epochs)}

    def load_state_dict(self, state):
        self.epochs = list(state["epochs"])


def every_other(param):
    mask = torch.ones_like(param).flatten()
    mask[::2] = 0
    return mask.view_as(param)


def train(model, scheduler, epochs, optimizer=None, batches=2):
    """The loop of interfaces.py; returns the sparsity of conv2 at each evaluation."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    sparsities = []
    for epoch in epochs:
        scheduler.on_epoch_begin(epoch, optimizer)
        for step in range(batches):
            scheduler.on_minibatch_begin(epoch, step, batches, optimizer)
            loss = model(torch.randn(4, 1, 8, 8)).square().mean()
            loss = scheduler.before_backward_pass(epoch, step, batches, loss, optimizer)
            optimizer.zero_grad()
            loss.backward()
            scheduler.before_parameter_optimization(epoch, step, batches, optimizer)
            optimizer.step()
            scheduler.on_minibatch_end(epoch, step, batches, optimizer)
        with scheduler.masked():
            sparsities.append((model.conv2.weight == 0).float().mean().item())
        scheduler.on_epoch_end(epoch, optimizer, {"loss": 1.0, "top1": 50.0})
    return sparsities
