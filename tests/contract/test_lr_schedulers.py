"""Every registered learning-rate scheduler: named by a schedule, resumed, written as plain data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distiller.apputils.checkpoint import read_checkpoint, restore_optimizer, save_checkpoint
from distiller.config import dict_config
from distiller.registry import LR_SCHEDULERS

SETTINGS = {
    "ConstantLR": {"factor": 0.5, "total_iters": 3},
    "CosineAnnealingLR": {"T_max": 8},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2},
    "ExponentialLR": {"gamma": 0.9},
    "LinearLR": {"start_factor": 0.25},
    "MultiStepLR": {"milestones": [2, 5], "gamma": 0.1},
    "MultiStepMultiGammaLR": {"milestones": [2, 5], "gammas": [0.1, 0.5]},
    "OneCycleLR": {"max_lr": 0.2, "total_steps": 10},
    "PolynomialLR": {"T_max": 10, "power": 2.0},
    "ReduceLROnPlateau": {"patience": 0, "factor": 0.5},
    "StepLR": {"step_size": 3},
}


def test_every_registered_scheduler_has_settings_here():
    assert set(SETTINGS) == set(LR_SCHEDULERS)


def build(name):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = {
        "lr_schedulers": {"lr": {"class": name, **SETTINGS[name]}},
        "policies": [{"lr_scheduler": {"instance_name": "lr"}, "starting_epoch": 0, "ending_epoch": 9}],
    }
    return optimizer, dict_config(model, optimizer, schedule)


def rates(optimizer, scheduler, epochs):
    found = []
    for epoch in epochs:
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.on_epoch_end(epoch, optimizer, {"loss": 1.0, "top1": 50.0})
    return found


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_rates_are_positive_and_change(name):
    optimizer, scheduler = build(name)
    found = rates(optimizer, scheduler, range(9))
    assert len(set(found)) > 1
    assert all(rate >= 0 for rate in found)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_restart_goes_on_with_the_same_rates(name, tmp_path):
    optimizer, scheduler = build(name)
    whole = rates(optimizer, scheduler, range(9))

    optimizer, scheduler = build(name)
    assert rates(optimizer, scheduler, range(4)) == whole[:4]
    path = save_checkpoint(3, "linear", scheduler.model, optimizer, scheduler, dir=tmp_path)
    checkpoint = read_checkpoint(path)

    optimizer, scheduler = build(name)
    restore_optimizer(scheduler.model, checkpoint, optimizer)
    scheduler.load_state_dict(checkpoint.scheduler)
    assert rates(optimizer, scheduler, range(4, 9)) == whole[4:]
