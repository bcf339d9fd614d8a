import io
import math
import typing

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from distiller.errors import DistillerError
from distiller.learning_rate import MultiStepMultiGammaLR, PolynomialLR, advance_to
from distiller.registry import LR_SCHEDULERS

BASES = (0.1, 0.02)
EPOCHS = 60


def make_optimizer(bases=BASES) -> Optimizer:
    return SGD(
        [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in bases], lr=1.0, momentum=0.9
    )


def one_cycle(base, e):
    """Up by a cosine from max/25 to max until step 0.3 * 60 - 1, then down to max/25/1e4 until step 59."""
    top, low, end = 0.5, 0.5 / 25, 0.5 / 25 / 1e4
    if e <= 17:
        return top + (low - top) / 2 * (1 + math.cos(math.pi * e / 17))
    return end + (top - end) / 2 * (1 + math.cos(math.pi * (e - 17) / 42))


def cyclic(base, e):
    """A triangle wave between 0.01 and 0.05 with 8 epochs up and 8 down."""
    phase = e % 16
    return 0.01 + 0.04 * (phase if phase <= 8 else 16 - phase) / 8


def warm_restarts(base, e):
    """Cycles of 10, 20, 40 epochs."""
    start, length = next((s, n) for s, n in ((30, 40), (10, 20), (0, 10)) if e >= s)
    return 0.001 + (base - 0.001) * (1 + math.cos(math.pi * (e - start) / length)) / 2


def multi_gamma(base, e):
    return base * (1 if e < 20 else 0.1 if e < 30 else 0.1 * 0.5 if e < 45 else 0.1 * 0.5 * 0.2)


# name: (settings, learning rate of a group with the base rate `base` at epoch `e`)
CLOSED_FORMS: dict[str, tuple[dict, typing.Callable[[float, int], float]]] = {
    "StepLR": ({"step_size": 45, "gamma": 0.1}, lambda base, e: base * 0.1 ** (e // 45)),
    "MultiStepLR": (
        {"milestones": [10, 30, 30], "gamma": 0.2},
        lambda base, e: base * 0.2 ** sum(m <= e for m in (10, 30, 30)),
    ),
    "ExponentialLR": ({"gamma": 0.95}, lambda base, e: base * 0.95**e),
    "CosineAnnealingLR": (
        {"T_max": 25, "eta_min": 0.005},
        lambda base, e: 0.005 + (base - 0.005) * (1 + math.cos(math.pi * e / 25)) / 2,
    ),
    "CosineAnnealingWarmRestarts": ({"T_0": 10, "T_mult": 2, "eta_min": 0.001}, warm_restarts),
    "OneCycleLR": ({"max_lr": 0.5, "total_steps": EPOCHS}, one_cycle),
    "CyclicLR": ({"base_lr": 0.01, "max_lr": 0.05, "step_size_up": 8}, cyclic),
    "LinearLR": (
        {"start_factor": 0.25, "total_iters": 12},
        lambda base, e: base * (0.25 + 0.75 * min(e, 12) / 12),
    ),
    "ConstantLR": ({"factor": 0.3, "total_iters": 7}, lambda base, e: base * (0.3 if e < 7 else 1)),
    "PolynomialLR": ({"T_max": 50, "power": 1.5}, lambda base, e: base * (1 - min(e, 50) / 50) ** 1.5),
    "MultiStepMultiGammaLR": ({"milestones": [20, 30, 45], "gammas": [0.1, 0.5, 0.2]}, multi_gamma),
}

every_scheduler = pytest.mark.parametrize("name", CLOSED_FORMS)


def make(name: str, optimizer: Optimizer, **settings) -> LRScheduler:
    return LR_SCHEDULERS[name](optimizer, **(settings or CLOSED_FORMS[name][0]))


def rates(optimizer: Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def expected(name: str, epoch: int):
    return pytest.approx([CLOSED_FORMS[name][1](base, epoch) for base in BASES], rel=1e-9, abs=1e-12)


def test_every_registered_scheduler_but_plateau_has_a_closed_form_here():
    assert set(CLOSED_FORMS) == set(LR_SCHEDULERS) - {"ReduceLROnPlateau"}


def test_the_registered_polynomial_is_distillers():
    assert LR_SCHEDULERS["PolynomialLR"] is PolynomialLR


@every_scheduler
def test_plain_steps_follow_the_closed_form(name):
    optimizer = make_optimizer()
    scheduler = make(name, optimizer)
    for epoch in range(EPOCHS):
        assert rates(optimizer) == expected(name, epoch)
        optimizer.step()
        scheduler.step()


@every_scheduler
def test_advancing_epoch_by_epoch_follows_the_closed_form(name):
    optimizer = make_optimizer()
    scheduler = make(name, optimizer)
    for epoch in range(1, EPOCHS):
        advance_to(scheduler, epoch)
        assert scheduler.last_epoch == epoch
        assert rates(optimizer) == expected(name, epoch)


@every_scheduler
def test_a_policy_that_opens_late_has_the_rates_of_the_absolute_epoch(name):
    optimizer = make_optimizer()
    scheduler = make(name, optimizer)
    for epoch in (31, 33, 46, 59):
        advance_to(scheduler, epoch)
        assert rates(optimizer) == expected(name, epoch)


@every_scheduler
def test_what_others_did_to_the_optimizer_does_not_matter(name):
    optimizer = make_optimizer()
    scheduler = make(name, optimizer)
    for epoch in (5, 6, 40):
        for group in optimizer.param_groups:
            group["lr"] *= 0.37
        advance_to(scheduler, epoch)
        assert rates(optimizer) == expected(name, epoch)


@every_scheduler
def test_advancing_twice_to_the_same_epoch_is_advancing_once(name):
    optimizer = make_optimizer()
    scheduler = make(name, optimizer)
    for epoch in (0, 8):
        advance_to(scheduler, epoch)
        first = rates(optimizer)
        advance_to(scheduler, epoch)
        assert rates(optimizer) == first == expected(name, epoch)


@every_scheduler
def test_an_earlier_epoch_has_its_own_rates_again(name):
    optimizer = make_optimizer()
    scheduler = make(name, optimizer)
    advance_to(scheduler, 47)
    advance_to(scheduler, 13)
    assert rates(optimizer) == expected(name, 13)


@every_scheduler
@pytest.mark.parametrize("stop", [0, 1, 17, 45])
def test_resuming_from_a_state_dict_gives_identical_rates(name, stop):
    optimizer, resumed_optimizer = make_optimizer(), make_optimizer()
    scheduler = make(name, optimizer)
    for epoch in range(1, stop + 1):
        advance_to(scheduler, epoch)
    resumed = make(name, resumed_optimizer)

    stored = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, stored)
    stored.seek(0)
    state = torch.load(stored, weights_only=True)
    resumed_optimizer.load_state_dict(state["optimizer"])
    resumed.load_state_dict(state["scheduler"])

    for epoch in range(stop + 1, EPOCHS):
        advance_to(scheduler, epoch)
        advance_to(resumed, epoch)
        assert rates(resumed_optimizer) == rates(optimizer)
        assert resumed_optimizer.param_groups[0]["momentum"] == optimizer.param_groups[0]["momentum"]


def test_a_step_of_45_in_a_policy_from_epoch_30_decays_at_45_and_90():
    optimizer = make_optimizer([1.0])
    scheduler = make("StepLR", optimizer, step_size=45, gamma=0.1)
    seen = {}
    for epoch in range(30, 100):  # at the end of each epoch, as LRPolicy does
        advance_to(scheduler, epoch + 1)
        seen[epoch + 1] = rates(optimizer)[0]
    assert (seen[44], seen[45], seen[89], seen[90]) == (1.0, 0.1, 0.1, pytest.approx(0.01))


def test_a_second_scheduler_of_a_schedule_starts_from_the_base_rates():
    optimizer = make_optimizer()
    first = make("LinearLR", optimizer, start_factor=0.1, total_iters=10)
    second = make("ExponentialLR", optimizer, gamma=0.5)
    for epoch in range(1, 6):
        advance_to(first, epoch)
    assert rates(optimizer) == pytest.approx([base * 0.55 for base in BASES])
    advance_to(second, 6)
    assert rates(optimizer) == pytest.approx([base * 0.5**6 for base in BASES])


def test_one_cycle_moves_the_momentum_too():
    optimizer = AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = make("OneCycleLR", optimizer, max_lr=0.5, total_steps=20)
    advance_to(scheduler, 5)
    assert optimizer.param_groups[0]["betas"] == (pytest.approx(0.85), 0.999)


@pytest.mark.parametrize("anneal_strategy", ["cos", "linear"])
def test_one_cycle_keeps_its_last_rate_at_its_end(anneal_strategy):
    optimizer = make_optimizer([0.1])
    scheduler = make("OneCycleLR", optimizer, max_lr=1.0, total_steps=10, anneal_strategy=anneal_strategy)
    for epoch in range(1, 11):
        advance_to(scheduler, epoch)
    assert rates(optimizer) == pytest.approx([1.0 / 25 / 1e4])


def test_one_cycle_past_its_total_steps_is_refused():
    scheduler = make("OneCycleLR", make_optimizer(), max_lr=1.0, total_steps=10)
    with pytest.raises(DistillerError) as error:
        advance_to(scheduler, 11)
    assert str(error.value) == (
        "OneCycleLR: total_steps (or epochs * steps_per_epoch) must reach to the end of its policy, "
        "epoch 11, got 10; it is stepped once an epoch"
    )


def test_plateau_is_registered_and_resumes_from_plain_data():
    optimizer = make_optimizer([1.0])
    scheduler = LR_SCHEDULERS["ReduceLROnPlateau"](optimizer, patience=0)
    assert isinstance(scheduler, ReduceLROnPlateau)
    for loss in (1.0, 2.0):
        scheduler.step(loss)
    stored = io.BytesIO()
    torch.save(scheduler.state_dict(), stored)
    stored.seek(0)
    resumed = ReduceLROnPlateau(optimizer, patience=0)
    resumed.load_state_dict(torch.load(stored, weights_only=True))
    resumed.step(3.0)
    assert rates(optimizer) == pytest.approx([0.01])


# --- ours


def test_multiplicative_gammas_are_the_cumulative_product():
    scheduler = MultiStepMultiGammaLR(make_optimizer(), milestones=[60, 120, 160], gammas=[0.1, 0.1, 0.2])
    assert scheduler.multiplicative_gammas == pytest.approx([1, 0.1, 0.01, 0.002])


def test_polynomial_is_0_from_t_max_on():
    optimizer = make_optimizer([1.0])
    scheduler = PolynomialLR(optimizer, T_max=4, power=0.5)
    for epoch, rate in ((2, math.sqrt(0.5)), (4, 0.0), (9, 0.0)):
        advance_to(scheduler, epoch)
        assert rates(optimizer) == [pytest.approx(rate)]


@pytest.mark.parametrize(
    ("make_one", "text"),
    [
        (
            lambda o: MultiStepMultiGammaLR(o, [60, 40], [0.1, 0.1]),
            "milestones must be in increasing order, got [60, 40]",
        ),
        (
            lambda o: MultiStepMultiGammaLR(o, [40, 60], [0.1]),
            "gammas must be as many as milestones, got 1 for 2",
        ),
        (
            lambda o: MultiStepMultiGammaLR(o, [-1, 5], [0.1, 0.1]),
            "milestones must be numbers of 0 or more, got [-1, 5]",
        ),
        (
            lambda o: MultiStepMultiGammaLR(o, [1, 5], [0.1, math.nan]),
            "gammas must be numbers of 0 or more, got [0.1, nan]",
        ),
        (lambda o: PolynomialLR(o, 0, 2.0), "T_max must be 1 or more, got 0"),
        (lambda o: PolynomialLR(o, 10, 0.0), "power must be more than 0 and finite, got 0.0"),
    ],
)
def test_wrong_arguments_are_refused(make_one, text):
    with pytest.raises(DistillerError) as error:
        make_one(make_optimizer())
    assert str(error.value) == text
    assert isinstance(error.value, ValueError)


@pytest.mark.parametrize("scheduler_class", [PolynomialLR, MultiStepMultiGammaLR])
def test_constructor_annotations_are_real_types(scheduler_class):
    hints = typing.get_type_hints(scheduler_class.__init__)
    wanted = {
        PolynomialLR: {"T_max": int, "power": float},
        MultiStepMultiGammaLR: {"milestones": list[int], "gammas": list[float]},
    }[scheduler_class]
    assert {key: hints[key] for key in wanted} == wanted
