"""Rankings by gradients against chance, and against Distiller's sign, on small nets trained on digits."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from distiller.interfaces import EpochWindow, StepContext
from distiller.masks import MaskStore
from distiller.pruning import (
    GradientRankedFilterPruner,
    RandomRankedFilterPruner,
    TaylorFORankedFilterPruner,
    filters_to_keep,
    loss_removed,
)

WEIGHTS = ["conv1.weight", "conv2.weight"]
SPARSITY = 0.25
BOTH = [GradientRankedFilterPruner, TaylorFORankedFilterPruner]


class DigitsNet(nn.Module):
    """Two convolutions, each with a ReLU and a pooling, and a linear layer."""

    def __init__(self, *, batch_norm: bool) -> None:
        super().__init__()
        self.input_shape = (1, 1, 8, 8)
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16) if batch_norm else nn.Identity()
        self.conv2 = nn.Conv2d(16, 24, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(24) if batch_norm else nn.Identity()
        self.fc = nn.Linear(96, 10)

    def forward(self, x):
        x = F.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(torch.relu(self.bn2(self.conv2(x))), 2)
        return self.fc(x.flatten(1))


class Digits:
    """A net that is trained on 1200 digits, and what the others say of it."""

    def __init__(self, seed: int, *, batch_norm: bool) -> None:
        torch.manual_seed(seed)
        values, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
        order = torch.randperm(len(values))
        self.images, self.labels = (values / 8 - 1).float().view(-1, 1, 8, 8)[order], labels[order]
        self.model = DigitsNet(batch_norm=batch_norm)
        self.params = dict(self.model.named_parameters())
        self.ctx = StepContext(self.model, MaskStore(self.model), None, EpochWindow.spanning(0, 1), 0)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(4):
            for part in torch.randperm(1200).split(64):
                self.backward(part)
                optimizer.step()

    def backward(self, part: Tensor) -> None:
        self.model.zero_grad()
        F.cross_entropy(self.model(self.images[part]), self.labels[part]).backward()

    def masks_of(self, pruner_class: type) -> dict[str, Tensor]:
        pruner = pruner_class("p", "Filters", SPARSITY, WEIGHTS)
        if pruner_class in BOTH:
            pruner.attach(self.model)
            for part in torch.arange(640).split(64):
                self.backward(part)
                pruner.after_backward(self.params, self.ctx)
        return pruner.compute_masks({name: self.params[name].detach() for name in WEIGHTS}, self.ctx)

    def masks_by_signed_sums(self, *, lowest_go: bool) -> dict[str, Tensor]:
        """Distiller's, but that behind a batch norm the sums are not zero: those of one mini-batch."""
        self.backward(torch.arange(64))
        masks = {}
        for name in WEIGHTS:
            gate = name.replace("conv", "bn") if isinstance(self.model.bn1, nn.BatchNorm2d) else name
            params = [self.params[gate], self.params[gate.replace("weight", "bias")]]
            sums = loss_removed(params, [param.grad for param in params if param.grad is not None])
            keep = filters_to_keep(sums if lowest_go else -sums, self.params[name], SPARSITY)
            masks[name] = keep.view(-1, 1, 1, 1)
        return masks

    def loss_under(self, masks: Mapping[str, Tensor]) -> float:
        """On the other 597 digits, once batch norms have adapted to the masks, as training lets them."""
        model = deepcopy(self.model)
        with torch.no_grad():
            for name, mask in masks.items():
                model.get_parameter(name).mul_(mask)
            for norm in (model.bn1, model.bn2):
                norm.momentum = 1.0  # type: ignore[assignment]
            model.train()(self.images[:1200])
            return F.cross_entropy(model.eval()(self.images[1200:]), self.labels[1200:]).item()


@cache
def mean_losses(batch_norm: bool) -> dict[str, float]:
    """The loss without a quarter of the filters, the mean of several nets, by how they were chosen."""
    losses: dict[str, list[float]] = {}
    for seed in range(4):
        digits = Digits(seed, batch_norm=batch_norm)
        chosen = [(pruner_class.__name__, digits.masks_of(pruner_class)) for pruner_class in BOTH]
        chosen += [("random", digits.masks_of(RandomRankedFilterPruner)) for _ in range(5)]
        chosen += [("lowest sums", digits.masks_by_signed_sums(lowest_go=True))]
        chosen += [("highest sums", digits.masks_by_signed_sums(lowest_go=False))]
        for choice, masks in chosen:
            losses.setdefault(choice, []).append(digits.loss_under(masks))
    return {choice: sum(found) / len(found) for choice, found in losses.items()}


with_and_without_batch_norm = pytest.mark.parametrize("batch_norm", [True, False])


@with_and_without_batch_norm
@pytest.mark.parametrize("pruner_class", BOTH)
def test_a_trained_net_loses_less_than_by_random_pruning(pruner_class, batch_norm):
    losses = mean_losses(batch_norm)
    assert losses[pruner_class.__name__] < 0.85 * losses["random"]


@with_and_without_batch_norm
def test_the_filters_of_lowest_signed_sum_are_not_those_that_go(batch_norm):
    """DEFECT of Distiller: removal changes the loss by about -sum, so theirs raises it, more than chance does."""
    losses = mean_losses(batch_norm)
    assert losses["lowest sums"] > 1.2 * losses["random"]
    assert losses["GradientRankedFilterPruner"] < 0.5 * losses["lowest sums"]


@with_and_without_batch_norm
def test_neither_are_those_of_highest_signed_sum(batch_norm):
    """A filter that the loss falls by weakening is one that it depends on: removed, it is missed."""
    losses = mean_losses(batch_norm)
    assert losses["highest sums"] > 1.2 * losses["random"]
