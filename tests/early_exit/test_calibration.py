from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from distiller.early_exit import (
    CRITERIA,
    ExitCosts,
    ExitTable,
    attach_exits_to,
    curve,
    early_exits,
    exit_costs,
    exit_table,
    thresholds_for_drop,
    thresholds_for_shares,
)
from distiller.errors import DatasetError, UsageError
from tests.early_exit.nets import Chain, images, seeded

COSTS = ExitCosts((20.0, 60.0, 100.0), (1.0, 1.0))


def table(criterion: str = "confidence", count: int = 40, seed: int = 0) -> ExitTable:
    """Sure answers are right more often; deeper exits are better."""
    rng = np.random.default_rng(seed)
    sure = rng.uniform(0.1, 1, (2, count))
    correct = np.stack(
        [
            rng.uniform(size=count) < sure[0] ** 0.5,
            rng.uniform(size=count) < sure[1] ** 0.25,
            np.ones(count, bool),
        ]
    )
    return ExitTable(criterion, sure if criterion == "confidence" else np.log(sure), correct, COSTS)


def test_a_trade_is_that_of_going_through_the_images_one_by_one():
    data = table()
    trade = data.try_bounds([0.7, 0.4])
    rule = trade.rule
    right, work, left = 0, 0.0, [0, 0, 0]
    for image in range(40):
        where = next((i for i in (0, 1) if data.certainties[i, image] >= rule.bound(i)), 2)
        right += int(data.correct[where, image])
        work += (21, 62, 102)[where]
        left[where] += 1
    assert trade.top1 == pytest.approx(100 * right / 40)
    assert trade.mean_macs == pytest.approx(work / 40)
    assert trade.shares == pytest.approx([n / 40 for n in left])


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("drop", [0.0, 5.0, 20.0, 100.0])
def test_a_drop_is_kept_and_no_two_bounds_of_a_grid_do_much_better(criterion, drop):
    data = table(criterion)
    chosen = thresholds_for_drop(data, drop)
    final = data.top1[-1]
    assert chosen.top1 >= final - drop - 1e-9
    bounds = [
        [*np.quantile(row, np.linspace(0, 1, 12), method="higher").tolist(), math.inf]
        for row in data.certainties
    ]
    best = min(
        trade.mean_macs
        for trade in map(data.try_bounds, itertools.product(*bounds))
        if trade.top1 >= final - drop
    )
    assert chosen.mean_macs <= 1.1 * best


def test_without_a_drop_an_exit_that_errs_among_its_surest_stays_closed():
    sure, correct = np.array([[0.9, 0.8, 0.7]]), np.array([[False, True, True], [True, True, True]])
    data = ExitTable("confidence", sure, correct, ExitCosts((1.0, 10.0), (1.0,)))
    assert thresholds_for_drop(data, 0).rule.thresholds == (None,)
    assert thresholds_for_drop(data, 34).rule.thresholds == (0.0,)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("shares", [(0.3, 0.3), (0.0, 0.5), (0.5, 0.5), (1.0, 0.0), (0.25, 0.0)])
def test_shares_are_met(criterion, shares):
    assert thresholds_for_shares(table(criterion), shares).shares[:2] == pytest.approx(shares, abs=1 / 40)


def test_the_curve_goes_from_the_whole_network_to_the_first_exit():
    trades = curve(table())
    assert trades[0].shares == (0, 0, 1)
    assert trades[-1].shares == (1, 0, 0)
    assert [trade.shares[2] for trade in trades] == sorted(
        (trade.shares[2] for trade in trades), reverse=True
    )


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_table_foretells_what_the_network_does(criterion):
    model = seeded(Chain)
    attach_exits_to(model, ["relu1", "relu2"])
    x, labels = images(60), torch.arange(60) % 10
    costs = exit_costs(model, x[:1])
    data = exit_table(model, zip(x.split(16), labels.split(16), strict=True), criterion, costs)
    trade = thresholds_for_shares(data, (0.4, 0.3))
    with early_exits(model, trade.rule) as answer:
        logits, exits = answer(x)
    assert np.bincount(exits.numpy(), minlength=3) / 60 == pytest.approx(trade.shares)
    assert 100 * (logits.argmax(1) == labels).float().mean().item() == pytest.approx(trade.top1)


@pytest.mark.parametrize(
    "call, kind, told",
    [
        (lambda: thresholds_for_drop(table(), -1), UsageError,
         "early exit: the drop is a number of points from 0, got -1"),
        (lambda: thresholds_for_shares(table(), (0.9, 0.2)), UsageError,
         "early exit: shares are numbers from 0 to 1, together at most 1, got 0.9 0.2"),
        (lambda: thresholds_for_shares(table(), (0.9,)), UsageError,
         "early exit: the model has 2 exits, got 1 shares; give one for each exit, none for the final output"),
        (lambda: exit_table(seeded(Chain), [], "entropy", COSTS), DatasetError,
         "early exit: no image to choose thresholds on; give more data"),
    ],
)  # fmt: skip
def test_what_cannot_be_met_is_refused(call, kind, told):
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == told
