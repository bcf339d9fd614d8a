from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distiller.pruning.unit_steps import (
    RankedGroup,
    kept_sizes,
    relative_to_mean,
    removal_steps,
    steps_until_small,
    steps_within_budget,
    steps_within_share,
    units_of,
)

INF = math.inf


def ranked(name: str, *scores: float, dense_size: int | None = None) -> RankedGroup:
    return RankedGroup(name, torch.tensor(scores, dtype=torch.float64), dense_size or len(scores))


def order(steps) -> list[tuple[str, tuple[int, ...]]]:
    return [(step.group, step.units) for step in steps]


def test_local_ranking_brings_groups_down_alike_whatever_their_scores():
    groups = [ranked("a", 900, 700, 800, 600), ranked("b", 2, 1)]
    steps = removal_steps(groups, "local", round_to=1, max_sparsity=1)
    #          a: 1/4     a: 2/4       b: 1/2     a: 3/4; the last unit of each stays
    assert order(steps) == [("a", (3,)), ("a", (1,)), ("b", (1,)), ("a", (2,))]


def test_global_ranking_compares_scores_with_the_mean_of_their_group():
    #        relative to 400: 0.25, 1.75, 1.0        to 2: 0.5, 1.5, 1.0
    groups = [ranked("a", 100, 700, 400), ranked("b", 1, 3, 2)]
    steps = removal_steps(groups, "global", round_to=1, max_sparsity=1)
    assert order(steps) == [("a", (0,)), ("b", (0,)), ("a", (2,)), ("b", (2,))]
    assert [step.score for step in steps] == [0.25, 0.5, 1.0, 1.0]


def test_what_is_zero_goes_first_and_counts_in_no_mean():
    groups = [ranked("a", 5, 1, 3), ranked("b", -INF, 6, 2)]
    assert relative_to_mean(groups[1].scores).tolist() == [-INF, 1.5, 0.5]
    steps = removal_steps(groups, "global", round_to=1, max_sparsity=1)
    assert order(steps) == [("b", (0,)), ("a", (1,)), ("b", (2,)), ("a", (2,))]


def test_scores_whose_mean_is_zero_stay_as_they_are():
    assert relative_to_mean(torch.tensor([0.0, -INF, 0.0])).tolist() == [0, -INF, 0]
    assert relative_to_mean(torch.tensor([-INF, -INF])).tolist() == [-INF, -INF]


def test_of_equal_scores_the_unit_of_lower_index_goes():
    assert order(removal_steps([ranked("a", 1, 1, 1)], "global", 1, 1)) == [("a", (0,)), ("a", (1,))]


@pytest.mark.parametrize(
    ("size", "dense_size", "round_to", "max_sparsity", "sizes"),
    [
        (5, 5, 1, 1.0, [4, 3, 2, 1]),
        (10, 10, 4, 1.0, [8, 4]),  # 10 is no multiple: the first step takes what is over
        (8, 8, 4, 1.0, [4]),
        (4, 4, 4, 1.0, []),  # too small to be touched
        (3, 3, 4, 1.0, []),
        (10, 10, 1, 0.3, [9, 8, 7]),
        (10, 10, 4, 0.3, [8]),
        (8, 10, 1, 0.3, [7]),  # two units of the dense ten were removed before
        (1, 1, 1, 1.0, []),
    ],
)
def test_sizes_that_a_group_may_come_down_to(size, dense_size, round_to, max_sparsity, sizes):
    assert kept_sizes(size, dense_size, round_to, max_sparsity) == sizes


def test_units_that_go_together_are_ranked_by_their_mean():
    #  b's units go alone (its mean is 4); a's by two, at 1.5 / 3.75 = 0.4 and 6 / 3.75, which would leave none
    groups = [ranked("a", 2, 1, 5, 7), ranked("b", 1, 7, 4)]
    steps = removal_steps(groups, "global", round_to=2, max_sparsity=1)
    assert order(steps) == [("b", (0,)), ("a", (0, 1))]
    assert steps[0].score == pytest.approx(0.25)
    assert steps[1].score == pytest.approx(0.4)


def test_a_share_is_of_each_dense_group():
    steps = removal_steps([ranked("a", *range(10)), ranked("b", 1, 2, 3)], "local", 1, 0.9)
    assert units_of(steps_within_share(steps, 0.5)) == {"a": [0, 1, 2, 3, 4], "b": [0]}
    assert units_of(steps_within_share(steps, 0.29)) == {"a": [0, 1]}
    thinned = removal_steps([ranked("a", *range(8), dense_size=10)], "local", 1, 0.9)
    assert units_of(steps_within_share(thinned, 0.5)) == {"a": [0, 1, 2]}


def test_a_budget_ends_at_the_first_step_that_does_not_fit():
    steps = removal_steps([ranked("a", 1, 2, 9, 9), ranked("b", 6, 7)], "global", 2, 1)
    assert order(steps) == [("a", (0, 1))]  # b has two, which is what it may have
    assert steps_within_budget(steps, 1) == []
    assert steps_within_budget(steps, 2) == steps


def costs(prices: dict[str, int], total: int):
    return lambda steps: total - sum(prices[step.group] * len(step.units) for step in steps)


def test_as_few_steps_as_make_it_small_enough():
    steps = removal_steps([ranked("a", 1, 2, 3), ranked("b", 1.5, 2.5, 9)], "global", 1, 1)
    size = costs({"a": 10, "b": 3}, 100)
    for most in range(75, 101):
        taken = steps_until_small(steps, size, most)
        assert taken is not None
        assert size(taken) <= most
        assert taken == [] or size(taken[:-1]) > most
    assert steps_until_small(steps, size, 10) is None


def test_zeros_stay_zero_while_the_target_shrinks_whatever_order_they_are_in():
    """The dear unit went last and overshot; now that all are zero, the cheap one could be spared for it."""
    size = costs({"cheap": 1, "dear": 10}, 100)
    before = removal_steps([ranked("cheap", 1, 9), ranked("dear", 2, 2)], "global", 1, 1)
    taken = steps_until_small(before, size, 95)
    assert taken is not None
    assert units_of(taken) == {"cheap": [0], "dear": [0]}
    groups = [ranked("dear", -INF, 2), ranked("cheap", -INF, 9)]
    after = steps_until_small(removal_steps(groups, "global", 1, 1), size, 94)
    assert after is not None
    assert units_of(after) == {"cheap": [0], "dear": [0]}


def test_zeros_come_back_when_the_target_grows():
    size = costs({"a": 10}, 100)
    steps = removal_steps([ranked("a", -INF, -INF, -INF, 5)], "global", 1, 1)
    taken = steps_until_small(steps, size, 90)
    assert taken is not None
    assert units_of(taken) == {"a": [0]}


@given(
    st.lists(st.lists(st.floats(0, 10), min_size=1, max_size=9), min_size=1, max_size=4),
    st.sampled_from(["local", "global"]),
    st.integers(1, 4),
    st.floats(0.1, 1),
)
def test_steps_take_each_unit_at_most_once_the_least_first_and_leave_the_right_sizes(
    groups, ranking, round_to, max_sparsity
):
    by_name = {str(i): scores for i, scores in enumerate(groups)}
    steps = removal_steps([ranked(k, *v) for k, v in by_name.items()], ranking, round_to, max_sparsity)
    gone: dict[str, list[int]] = {name: [] for name in by_name}
    for step in steps:
        scores = by_name[step.group]
        gone[step.group].extend(step.units)
        assert len(set(gone[step.group])) == len(gone[step.group]) == step.gone
        left = [score for unit, score in enumerate(scores) if unit not in gone[step.group]]
        assert max(scores[unit] for unit in step.units) <= min(left)
        assert len(left) % round_to == 0
        assert step.gone <= max_sparsity * len(scores) + 1e-9
