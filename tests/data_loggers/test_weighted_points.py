"""Few points in place of many values: what the sums of deviations lose by it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.data_loggers.weighted_points import merged, points_of

SHAPES = {
    "normal": lambda random, n: random.normal(size=n),
    "cauchy": lambda random, n: random.standard_cauchy(size=n),
    "two values": lambda random, n: random.choice([-1.0, 1.0], size=n),
    "sparse": lambda random, n: random.normal(size=n) * (random.random(n) < 0.01),
    "constant": lambda random, n: np.full(n, 3.0),
}


def deviation_sum(values, centre) -> float:
    return float(np.abs(values - centre).sum())


@settings(max_examples=40, deadline=None)
@given(shape=st.sampled_from(sorted(SHAPES)), seed=st.integers(0, 999), size=st.integers(1, 3000))
def test_the_sum_shrinks_by_less_than_two_groups_shares_around_any_centre(shape, seed, size):
    random = np.random.default_rng(seed)
    values = SHAPES[shape](random, size)
    points = points_of(values, weight=1.0, groups=100)
    for centre in (values.mean(), np.median(values), values.min() - 1, random.normal()):
        exact, found = deviation_sum(values, centre), points.deviation_sum(centre)
        slack = 1e-9 * (np.abs(values).sum() + size)
        assert exact * (1 - 2 / 100 - 2 / size) - slack <= found <= exact + slack


def test_weight_and_mean_are_kept():
    values = np.random.default_rng(0).normal(size=1001)
    points = points_of(values, weight=7.0, groups=10)
    assert len(points.values) == 10
    assert points.weights.sum() == pytest.approx(7 * 1001)
    assert np.average(points.values, weights=points.weights) == pytest.approx(values.mean())
    assert (np.diff(points.values) > 0).all()


def test_no_more_values_than_groups_are_kept_as_they_are():
    points = points_of(np.array([3.0, 1.0, 2.0]), weight=2.0, groups=8)
    assert (points.values.tolist(), points.weights.tolist()) == ([1, 2, 3], [2, 2, 2])


@settings(max_examples=30, deadline=None)
@given(shape=st.sampled_from(sorted(SHAPES)), seed=st.integers(0, 999), border=st.floats(-2, 2))
def test_merging_keeps_the_sum_around_the_border(shape, seed, border):
    random = np.random.default_rng(seed)
    values = SHAPES[shape](random, 700)
    parts = tuple(points_of(part, 1.0, 350) for part in (values[:350], values[350:]))
    together = merged(parts, 50, border)
    assert len(together.values) <= 51
    assert together.weights.sum() == pytest.approx(700)
    assert together.deviation_sum(border) == pytest.approx(deviation_sum(values, border))


def test_merging_respects_weights():
    # 1 once and 4 three times: one group, at their mean
    together = merged((points_of(np.array([1.0]), 1.0, 1), points_of(np.array([4.0]), 3.0, 1)), 1, 9.0)
    assert (together.values.tolist(), together.weights.tolist()) == ([3.25], [4.0])
