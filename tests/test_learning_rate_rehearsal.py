"""Arguments that PyTorch lets pass, and schedulers that cannot follow their policy: told before training."""

from __future__ import annotations

import copy
import functools
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch.optim import SGD, Adagrad, Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR

from distiller.errors import DistillerError
from distiller.interfaces import EpochWindow
from distiller.learning_rate import check_arguments, copy_groups, put_back_groups, rehearse
from distiller.registry import LR_SCHEDULERS
from tests.test_learning_rate import BASES, CLOSED_FORMS, EPOCHS, every_scheduler, make, make_optimizer

WRONG = [
    ("StepLR", {"step_size": 0}, ("step_size",), "must be 1 or more, got 0"),
    ("CosineAnnealingWarmRestarts", {"T_0": 0}, ("T_0",), "must be 1 or more, got 0"),
    ("CosineAnnealingLR", {"T_max": 5, "eta_min": -1}, ("eta_min",), "must be 0 or more, got -1"),
    ("CyclicLR", {"base_lr": [0.1, -0.1], "max_lr": 1}, ("base_lr", 1), "must be 0 or more, got -0.1"),
    (
        "CyclicLR",
        {"base_lr": 0.1, "max_lr": 1, "step_size_up": 0},
        ("step_size_up",),
        "must be 1 or more, got 0",
    ),
    ("LinearLR", {"total_iters": 0}, ("total_iters",), "must be 1 or more, got 0"),
    (
        "OneCycleLR",
        {"max_lr": 1, "total_steps": 9, "div_factor": 0},
        ("div_factor",),
        "must be more than 0, got 0",
    ),
    ("ExponentialLR", {"gamma": math.inf}, ("gamma",), "must be a finite number, got inf"),
    ("MultiStepLR", {"milestones": [3, 1]}, ("milestones",), "must be in increasing order, got [3, 1]"),
]


@pytest.mark.parametrize(("name", "arguments", "path", "text"), WRONG)
def test_arguments_that_pytorch_lets_pass_are_refused(name, arguments, path, text):
    assert check_arguments(LR_SCHEDULERS[name], arguments) == [(path, text)]


@every_scheduler
def test_good_arguments_pass(name):
    assert check_arguments(LR_SCHEDULERS[name], CLOSED_FORMS[name][0]) == []


def test_milestones_may_begin_at_0_and_repeat():
    assert check_arguments(LR_SCHEDULERS["MultiStepLR"], {"milestones": [0, 2, 2]}) == []


def rehearsal(make_one, window: EpochWindow, optimizer: Optimizer | None = None):
    optimizer = optimizer or make_optimizer()
    return rehearse(make_one, copy_groups(optimizer), optimizer, window)


@every_scheduler
def test_a_rehearsal_of_a_good_scheduler_changes_nothing(name):
    optimizer = make_optimizer()
    before = copy.deepcopy(optimizer.state_dict())
    random_state = torch.get_rng_state()
    make_one = functools.partial(LR_SCHEDULERS[name], optimizer=optimizer, **CLOSED_FORMS[name][0])
    rehearsal(make_one, EpochWindow.spanning(0, EPOCHS), optimizer)
    assert optimizer.state_dict() == before
    assert not hasattr(optimizer.step, "_wrapped_by_lr_sched")
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("settings", [{}, {"mode": "max", "patience": 0, "factor": 0.0, "cooldown": 0}])
def test_plateau_is_rehearsed_with_a_constant_metric(settings):
    rehearsal(functools.partial(ReduceLROnPlateau, **settings), EpochWindow.spanning(0, 200))


def test_an_optimizer_without_momentum_and_with_tensor_rates_has_such_a_stand_in():
    weights = [torch.nn.Parameter(torch.zeros(1))]
    rehearsal(
        functools.partial(StepLR, step_size=2), EpochWindow((0, 5)), Adam(weights, lr=torch.tensor(0.1))
    )
    with pytest.raises(ValueError, match="optimizer must support momentum"):
        rehearsal(
            functools.partial(LR_SCHEDULERS["CyclicLR"], base_lr=0.1, max_lr=0.2),
            EpochWindow((0,)),
            Adagrad(weights),
        )


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(
    start=st.floats(1e-6, 1), end=st.floats(0, 1), iterations=st.integers(1, 50), t_max=st.integers(1, 50)
)
def test_a_rate_that_rounds_to_below_0_is_none_below_0(start, end, iterations, t_max):
    window = EpochWindow.spanning(0, 120)
    rehearsal(
        functools.partial(
            LR_SCHEDULERS["LinearLR"], start_factor=start, end_factor=end, total_iters=iterations
        ),
        window,
    )
    rehearsal(functools.partial(LR_SCHEDULERS["CosineAnnealingLR"], T_max=t_max, eta_min=end), window)


class Falling(LRScheduler):
    """Falls by 0.04 an epoch, past 0."""

    def get_lr(self):
        return [base - 0.04 * self.last_epoch for base in self.base_lrs]


class Failing(LRScheduler):
    """Ends after epoch 2."""

    def get_lr(self):
        return [base * [1.0, 0.5, 0.25][self.last_epoch] for base in self.base_lrs]


@pytest.mark.parametrize(
    ("make_one", "window", "text"),
    [
        (
            Falling,
            EpochWindow.spanning(0, 9),
            "Falling has a learning rate of -0.02 at epoch 1; rates must be from 0 to 3.4e+38",
        ),
        (Failing, EpochWindow((1, 7)), "Failing fails at epoch 8: IndexError: list index out of range"),
        (
            functools.partial(LR_SCHEDULERS["ExponentialLR"], gamma=1e40),
            EpochWindow((4,)),
            "ExponentialLR has a learning rate of 1e+199 at epoch 5; rates must be from 0 to 3.4e+38",
        ),
        (
            functools.partial(LR_SCHEDULERS["OneCycleLR"], max_lr=1.0, total_steps=2000),
            EpochWindow.spanning(0, 10**9),
            "OneCycleLR: total_steps (or epochs * steps_per_epoch) must reach to the end of its policy, "
            "epoch 1000000000, got 2000; it is stepped once an epoch",
        ),
    ],
)
def test_a_scheduler_that_cannot_follow_its_policy_is_refused(make_one, window, text):
    with pytest.raises(DistillerError) as error:
        rehearsal(make_one, window)
    assert str(error.value) == text


def test_a_rehearsal_ends_after_a_thousand_epochs():
    seen = []

    class Counting(LRScheduler):
        def get_lr(self):
            seen.append(self.last_epoch)
            return list(self.base_lrs)

    rehearsal(Counting, EpochWindow.spanning(0, 10**9))
    assert seen[-1] == 1000


def test_groups_are_put_back_whole_or_their_rates_alone():
    optimizer = make_optimizer()
    before = copy_groups(optimizer)
    make("CyclicLR", optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.01
    put_back_groups(optimizer, before, rates_only=True)
    assert [group["lr"] for group in optimizer.param_groups] == list(BASES)
    assert "initial_lr" in optimizer.param_groups[0]
    put_back_groups(optimizer, before)
    assert optimizer.param_groups == before


@pytest.mark.parametrize(
    ("kind", "name", "arguments", "text"),
    [
        (
            Adam,
            "CyclicLR",
            {"base_lr": 0.1, "max_lr": 1.0, "max_momentum": 1e300, "base_momentum": 1e300},
            "CyclicLR has a momentum of 1e+300 at epoch 0; as the first of Adam's betas it must be from 0 to below 1",
        ),
        (
            Adam,
            "OneCycleLR",
            {"max_lr": 1.0, "total_steps": 9, "max_momentum": 1.0},
            "OneCycleLR has a momentum of 1 at epoch 0; as the first of Adam's betas it must be from 0 to below 1",
        ),
        (
            functools.partial(SGD, momentum=0.9),
            "OneCycleLR",
            {"max_lr": 1.0, "total_steps": 9, "max_momentum": 1e300},
            "OneCycleLR has a momentum of 1e+300 at epoch 0; it must be from 0 to 3.4e+38",
        ),
    ],
)
def test_a_momentum_that_the_optimizer_cannot_take_is_refused(kind, name, arguments, text):
    optimizer = kind([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(DistillerError) as caught:
        rehearsal(functools.partial(LR_SCHEDULERS[name], **arguments), EpochWindow.spanning(0, 8), optimizer)
    assert str(caught.value) == text
