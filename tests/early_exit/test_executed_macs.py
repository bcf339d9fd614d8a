from __future__ import annotations

import pytest
import torch

from distiller.early_exit import (
    ExitCosts,
    ExitRule,
    ImageCounter,
    attach_exits_to,
    early_exits,
    every_exit,
    exit_costs,
)
from distiller.model_summaries import total_macs
from tests.early_exit.nets import Chain, images, seeded

# Of an image: conv1 4*64*9, conv2 6*16*36, hidden 96*12, fc 12*10; the branches' linear layers.
CONV1, CONV2, HIDDEN, FC = 4 * 64 * 9, 6 * 16 * 36, 96 * 12, 120
BRANCHES = (4 * 4 * 4 * 10, 6 * 4 * 4 * 10)


@pytest.fixture
def model():
    model = seeded(Chain)
    attach_exits_to(model, ["relu1", "relu2"])
    return model.eval()


def test_costs_are_the_layers_up_to_each_exit(model):
    costs = exit_costs(model, images(1))
    assert costs.trunk == (CONV1, CONV1 + CONV2, CONV1 + CONV2 + HIDDEN + FC)
    assert costs.branches == BRANCHES
    assert costs.trunk[-1] == total_macs(model, (1, 1, 8, 8))


def test_only_open_branches_on_the_way_count():
    costs = ExitCosts((10.0, 20.0, 30.0), (1.0, 2.0))
    assert costs.of_leaving([True, True]) == (11, 23, 33)
    assert costs.of_leaving([False, True]) == (10, 22, 32)
    assert costs.of_leaving([False, False]) == (10, 20, 30)


def test_what_is_counted_while_images_leave_is_what_the_exits_cost(model):
    costs, counter = exit_costs(model, images(1)), ImageCounter(model, images(1))
    with every_exit(model), torch.no_grad():
        sure = model(images(20))[0].softmax(1).max(1).values
    rule = ExitRule("confidence", (float(sure.median()), None))
    with early_exits(model, rule) as answer, counter.counting():
        exits = torch.cat([answer(part).exits for part in images(20).split(7)])
    left = torch.bincount(exits, minlength=3).tolist()
    assert 0 < left[0] < 20
    assert counter.images["conv2"] == 20 - left[0]
    by_exit = costs.of_leaving([True, False])
    assert counter.macs == sum(n * cost for n, cost in zip(left, by_exit, strict=True))


def test_counting_leaves_no_hooks(model):
    ImageCounter(model, images(1))
    assert not any(module._forward_pre_hooks for module in model.modules() if module is not model)
