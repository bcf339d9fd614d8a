"""Ranks by energy, by fraction, and by budgets, beside searches through all there is."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distiller.errors import UsageError
from distiller.factorization.decompositions import tucker2
from distiller.factorization.forms import LayerShape, candidate_ranks
from distiller.factorization.ranks import (
    RankPoint,
    loss_of_energy,
    points_by_energy,
    rank_for_energy,
    rank_within,
    rank_without,
    ranks_for_budget,
)


def weight(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
def test_the_rank_for_an_energy_is_the_lowest_that_keeps_it(energy):
    own = weight(9, 7)
    (rank,) = rank_for_energy(own, "svd", energy)
    squares = np.linalg.svd(own.numpy())[1] ** 2
    kept = np.cumsum(squares) / squares.sum()
    assert kept[rank - 1] >= energy - 1e-9
    assert rank == 1 or kept[rank - 2] < energy


def test_a_weight_of_low_rank_needs_no_more():
    assert rank_for_energy(weight(9, 2) @ weight(2, 7, seed=1), "svd", 1.0) == (2,)
    assert rank_for_energy(torch.zeros(4, 4), "svd", 0.9) == (1,)


@pytest.mark.parametrize("energy", [0.5, 0.8, 0.95])
def test_both_modes_of_tucker_together_keep_the_energy(energy):
    own = weight(12, 8, 3, 3)
    into, out = rank_for_energy(own, "tucker2", energy)
    first, core, last = tucker2(own, into, out, sweeps=0)
    near = torch.einsum("ob,bayx,ai->oiyx", last.flatten(1), core, first.flatten(1))
    assert float((own - near).square().sum() / own.square().sum()) <= 1 - energy + 1e-9


@pytest.mark.parametrize("form", ["channel", "spatial", "tucker2"])
@pytest.mark.parametrize("cost", ["parameters", "macs"])
def test_a_fraction_of_its_own_cost_is_used_up_as_far_as_it_goes(form, cost):
    shape = LayerShape((16, 8, 3, 3), 49, 25, 35)
    count = shape.factored_parameters if cost == "parameters" else shape.factored_macs
    whole = getattr(shape, cost)
    rank = rank_within(shape, form, cost, 0.5)
    ranks = candidate_ranks(shape, form)
    assert count(form, rank) <= 0.5 * whole
    assert count(form, ranks[ranks.index(rank) + 1]) > 0.5 * whole


def test_less_than_rank_1_costs_is_refused():
    with pytest.raises(UsageError) as error:
        rank_within(LayerShape((10, 10)), "svd", "parameters", 0.1)
    assert str(error.value) == "parameters must be at least 0.2000, which rank 1 costs, got 0.1"


def test_what_a_rank_loses_is_minus_the_logarithm_of_its_energy():
    loss = loss_of_energy(torch.diag(torch.tensor([3.0, 2.0, 1.0])), "svd")
    assert [loss((rank,)) for rank in (1, 2, 3)] == pytest.approx([-np.log(9 / 14), -np.log(13 / 14), 0])


def test_points_end_with_the_whole_layer_and_all_are_cheaper():
    shape = LayerShape((10, 6))
    points = points_by_energy(shape, weight(10, 6), "svd")
    assert points[-1] == RankPoint(None, 60, 60, 0.0)
    assert [point.rank for point in points[:-1]] == [(1,), (2,), (3,)]
    assert all(point.parameters < 60 for point in points[:-1])
    losses = [point.loss for point in points]
    assert losses == sorted(losses, reverse=True)


def layers(*sizes):
    return {
        f"fc{index}": points_by_energy(LayerShape(size), weight(*size, seed=index), "svd")
        for index, size in enumerate(sizes)
    }


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.7, 0.9])
def test_a_budget_is_kept_and_little_is_lost_beside_the_best_of_all_choices(fraction):
    points = layers((12, 10), (8, 14), (6, 5))
    budget = int(fraction * sum(own[-1].parameters for own in points.values()))
    chosen = ranks_for_budget(points, "parameters", budget)
    assert sum(point.parameters for point in chosen.values()) <= budget
    best = min(
        sum(point.loss for point in choice)
        for choice in product(*points.values())
        if sum(point.parameters for point in choice) <= budget
    )
    assert sum(point.loss for point in chosen.values()) <= 1.35 * best


def test_a_budget_that_all_keep_to_leaves_them_whole():
    points = layers((12, 10), (8, 14))
    chosen = ranks_for_budget(points, "macs", 120 + 112)
    assert [point.rank for point in chosen.values()] == [None, None]


def test_a_layer_of_low_rank_gives_first():
    points = {
        "full": points_by_energy(LayerShape((20, 20)), torch.linalg.qr(weight(20, 20))[0], "svd"),
        "low": points_by_energy(LayerShape((20, 20)), weight(20, 3) @ weight(3, 20, seed=1), "svd"),
    }
    chosen = ranks_for_budget(points, "parameters", 520)
    assert chosen["full"].rank is None
    assert chosen["low"].rank == (3,)


def test_a_budget_below_rank_1_of_all_is_refused():
    with pytest.raises(UsageError) as error:
        ranks_for_budget(layers((12, 10), (8, 14)), "parameters", 40)
    assert str(error.value) == (
        "the layers cost 44 parameters at the least, more than the 40 that the budget leaves them; "
        "allow more, or name more layers"
    )


def test_points_above_the_hull_are_passed_over():
    points = {
        "a": [
            RankPoint((1,), 10, 10, 1.0),
            RankPoint((2,), 20, 20, 0.9),
            RankPoint((3,), 30, 30, 0.1),
            RankPoint(None, 100, 100, 0.0),
        ],
        "b": [RankPoint((1,), 10, 10, 0.5), RankPoint(None, 100, 100, 0.0)],
    }
    chosen = ranks_for_budget(points, "macs", 130)
    assert (chosen["a"].rank, chosen["b"].rank) == ((3,), None)
    assert ranks_for_budget(points, "macs", 40)["a"].rank == (3,)
    assert ranks_for_budget(points, "macs", 30)["a"].rank == (2,)


@given(st.integers(1, 600), st.integers(0, 100))
def test_the_rank_is_what_the_floor_of_the_share_leaves(full, hundredths):
    expected = max(1, full - int(Fraction(hundredths, 100) * full))

    assert rank_without(full, hundredths / 100) == expected
