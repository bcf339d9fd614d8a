"""Sound states of every kind are taken; what is refused is in test_checkpoint_junk.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distiller.apputils.checkpoint import read_checkpoint, restore_scheduler, save_checkpoint
from distiller.apputils.optimizer_state import restore_optimizer
from distiller.errors import CheckpointError
from tests.contract.test_lr_schedulers import SETTINGS, build, rates

OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adam": {"lr": torch.tensor(0.1), "amsgrad": True},
    "AdamW": {},
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {},
    "Adamax": {},
    "ASGD": {},
    "LBFGS": {"max_iter": 2},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
}


def made(kind):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, getattr(torch.optim, kind)(model.parameters(), **OPTIMIZERS[kind])


def train(model, optimizer, steps):
    images = torch.linspace(-1, 1, 12).view(4, 3)

    def loss():
        optimizer.zero_grad()
        value = model(images).square().mean()
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(loss)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_goes_on_where_it_was(kind, tmp_path):
    model, optimizer = made(kind)
    train(model, optimizer, 2)
    checkpoint = read_checkpoint(save_checkpoint(0, "net", model, optimizer, dir=tmp_path))
    fresh, its_optimizer = made(kind)
    fresh.load_state_dict(model.state_dict())
    restore_optimizer(fresh, checkpoint, its_optimizer)
    train(model, optimizer, 2)
    train(fresh, its_optimizer, 2)
    assert torch.equal(fresh.weight, model.weight)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_learning_rate_goes_on_where_it_was(name, tmp_path):
    optimizer, scheduler = build(name)
    rates(optimizer, scheduler, range(4))
    path = save_checkpoint(3, "net", scheduler.model, optimizer, scheduler, dir=tmp_path)
    its_optimizer, fresh = build(name)
    restore_scheduler(fresh, read_checkpoint(path))
    restore_optimizer(fresh.model, read_checkpoint(path), its_optimizer)
    assert rates(its_optimizer, fresh, range(4, 9)) == rates(optimizer, scheduler, range(4, 9))


def test_switches_that_an_older_pytorch_did_not_have_are_the_given_optimizers(tmp_path):
    model, optimizer = made("SGD")
    path = save_checkpoint(0, "net", model, optimizer, dir=tmp_path)
    document = torch.load(path, weights_only=True)
    del document["optimizer"]["state_dict"]["param_groups"][0]["fused"]
    torch.save(document, path)
    restored = restore_optimizer(model, read_checkpoint(path), optimizer)
    assert restored is not None
    assert restored.param_groups[0]["fused"] is None


def test_a_run_may_go_on_under_a_schedule_that_it_did_not_have(tmp_path):
    optimizer, scheduler = build("StepLR")
    assert "initial_lr" in optimizer.param_groups[0]
    plain = torch.optim.SGD(scheduler.model.parameters(), lr=0.3, momentum=0.9)
    path = save_checkpoint(0, "net", scheduler.model, plain, dir=tmp_path)
    restore_optimizer(scheduler.model, read_checkpoint(path), optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.3


def test_hyper_parameters_that_pytorch_refuses_are_told_in_its_words(tmp_path):
    model, optimizer = made("Adam")
    optimizer.param_groups[0]["betas"] = (0.9, 1.5)
    path = save_checkpoint(0, "net", model, optimizer, dir=tmp_path)
    with pytest.raises(CheckpointError) as caught:
        restore_optimizer(model, read_checkpoint(path))
    assert str(caught.value) == (
        f"{path}: 'optimizer.state_dict.param_groups[0]' is refused by PyTorch: Invalid beta parameter at index 1: "
        "1.5; start with a fresh optimizer"
    )


def test_what_a_scheduler_left_in_a_group_is_a_number_without_the_scheduler_too(tmp_path):
    model, optimizer = made("SGD")
    optimizer.param_groups[0]["initial_lr"] = "x"
    path = save_checkpoint(0, "net", model, optimizer, dir=tmp_path)
    with pytest.raises(CheckpointError) as caught:
        restore_optimizer(model, read_checkpoint(path))
    assert str(caught.value) == (
        f"{path}: 'optimizer.state_dict.param_groups[0].initial_lr' must be a finite number from 0, got str 'x'; "
        "start with a fresh optimizer"
    )
