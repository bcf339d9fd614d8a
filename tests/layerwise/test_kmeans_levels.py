from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distiller.layerwise import kmeans_levels as module
from distiller.layerwise.kmeans_levels import kmeans_levels, prefix_sum, segment_bounds


def error(values: np.ndarray, levels: np.ndarray) -> float:
    return float(np.min((values[:, None] - levels[None]) ** 2, axis=1).sum())


def levels_of(values, count: int) -> np.ndarray:
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    return kmeans_levels(ordered, prefix_sum(ordered), count)


def least(values: list[float], count: int) -> float:
    """Over all partitions of the sorted values into intervals."""
    ordered, n = np.sort(values), len(values)
    found = []
    for cuts in combinations(range(1, n), min(count, n) - 1):
        parts = np.split(ordered, cuts)
        found.append(sum(float(((part - part.mean()) ** 2).sum()) for part in parts))
    return min(found)


@given(st.lists(st.floats(-3, 3, width=16), min_size=1, max_size=9), st.integers(1, 4))
def test_few_values_have_the_best_levels_there_are(values, count):
    found = levels_of(values, count)
    assert (np.diff(found) >= 0).all()
    assert len(found) <= count
    assert error(np.array(values), found) == pytest.approx(least(values, count), abs=1e-9)


@pytest.mark.parametrize("count", [2, 4, 16, 64])
def test_many_values_are_close_to_the_exact_optimum(monkeypatch, count):
    ordered = np.sort(np.random.default_rng(0).normal(size=16_000))
    exact = error(ordered, levels_of(ordered, count))
    monkeypatch.setattr(module, "EXACT_WORK", 2**14)
    assert error(ordered, levels_of(ordered, count)) <= 1.02 * exact


def test_thousands_of_levels_err_no_more_than_the_theory_of_many_levels_allows():
    n, count = 100_000, 2000
    ordered = np.sort(np.random.default_rng(1).normal(size=n))
    # Panter and Dite: for a normal density, pi sqrt(3) / 2 / levels^2 of the variance.
    theory = np.pi * np.sqrt(3) / 2 / count**2
    found = kmeans_levels(ordered, prefix_sum(ordered), count)
    bounds = segment_bounds(ordered, found)
    nearest = np.repeat(found, np.diff(bounds))
    assert float(((ordered - nearest) ** 2).mean()) < 1.05 * theory


@pytest.mark.parametrize("count", [3, 500])
def test_heavy_ties_and_outliers_are_no_trouble(monkeypatch, count):
    monkeypatch.setattr(module, "EXACT_WORK", 1024)
    values = np.concatenate([np.zeros(5000), np.random.default_rng(2).normal(size=1000), [1e6]])
    found = levels_of(values, count)
    assert np.isfinite(found).all()
    assert len(found) <= count
    assert found[-1] == 1e6
    assert (np.diff(found) >= 0).all()


def test_segments_begin_where_values_are_nearer_to_the_next_level():
    ordered = np.array([0.0, 1.0, 2.0, 3.0, 10.0])
    assert segment_bounds(ordered, np.array([0.0, 2.0, 6.0])).tolist() == [0, 1, 4, 5]
    assert segment_bounds(ordered, np.array([7.0])).tolist() == [0, 5]
