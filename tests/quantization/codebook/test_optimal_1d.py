"""Exact k-means of numbers against all partitions of few values, and known answers."""

from __future__ import annotations

from itertools import combinations_with_replacement, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.quantization.codebook.optimal_1d import optimal_centroids


def error_of(values: np.ndarray, weights: np.ndarray, centroids: np.ndarray) -> float:
    """Each value to its nearest centroid, by looking at all."""
    return float((weights * ((values[:, None] - centroids[None]) ** 2).min(1)).sum())


def least_error(values: np.ndarray, weights: np.ndarray, clusters: int, has_zero: bool) -> float:
    """Over all ways to cut the sorted values; one cluster, any, may be about 0 instead of its mean."""
    least = np.inf
    for cuts in combinations_with_replacement(range(len(values) + 1), clusters + has_zero - 1):
        about_mean, about_zero = [], []
        for start, end in pairwise((0, *cuts, len(values))):
            v, w = values[start:end], weights[start:end]
            mean = np.average(v, weights=w) if w.sum() else 0.0
            about_mean.append((w * (v - mean) ** 2).sum())
            about_zero.append((w * v**2).sum())
        total = sum(about_mean)
        if has_zero:
            total = min(total - about_mean[i] + about_zero[i] for i in range(clusters + 1))
        least = min(least, float(total))
    return least


numbers = st.floats(-100, 100, allow_subnormal=False) | st.integers(-3, 3).map(float)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 7).flatmap(
        lambda n: st.lists(
            st.lists(st.tuples(numbers, st.sampled_from([0.0, 1.0, 3.0])), min_size=n, max_size=n),
            min_size=1,
            max_size=3,
        )
    ),
    count=st.integers(1, 4),
    has_zero=st.booleans(),
)
def test_no_partition_has_a_smaller_error(rows, count, has_zero):
    rows = [sorted(row) for row in rows]
    values = np.array([[value for value, _ in row] for row in rows])
    weights = np.array([[weight for _, weight in row] for row in rows])
    found = optimal_centroids(values, weights, count, has_zero)
    assert found.shape == (len(rows), count)
    for v, w, centroids in zip(values, weights, found, strict=True):
        assert (np.diff(centroids) >= 0).all()
        all_of_them = np.append(centroids, 0.0) if has_zero else centroids
        expected = least_error(v, w, count, has_zero)
        assert error_of(v, w, all_of_them) == pytest.approx(expected, abs=1e-9 * (1 + (w * v**2).sum()))


def test_two_clusters_by_hand():
    values = np.array([[1.0, 2.0, 3.0, 10.0, 12.0]])
    assert optimal_centroids(values, np.ones_like(values), 2).tolist() == [[2.0, 11.0]]


def test_zero_takes_what_is_near_it():
    values = np.array([[-9.0, -8.0, -0.5, 0.25, 6.0, 8.0]])
    assert optimal_centroids(values, np.ones_like(values), 2, has_zero=True)[0] == pytest.approx([-8.5, 7.0])
    without = optimal_centroids(values, np.ones_like(values), 3)[0]
    assert without == pytest.approx([-8.5, -0.125, 7.0])


def test_zero_is_of_no_use_far_from_all_values():
    values = np.array([[100.0, 101.0, 110.0, 111.0]])
    assert optimal_centroids(values, np.ones_like(values), 2, has_zero=True)[0] == pytest.approx(
        [100.5, 110.5]
    )


def test_weights_count_as_repetitions():
    values, counts = np.array([0.5, 1.0, 4.0, 4.5, 9.0]), np.array([3, 1, 2, 5, 1])
    repeated = np.repeat(values, counts)
    assert optimal_centroids(values[None], counts[None].astype(float), 3)[0] == pytest.approx(
        optimal_centroids(repeated[None], np.ones((1, repeated.size)), 3)[0]
    )


def test_rows_are_clustered_by_themselves():
    rows = np.sort(np.random.default_rng(1).normal(size=(5, 40)), axis=1)
    together = optimal_centroids(rows, np.ones_like(rows), 4)
    for row, found in zip(rows, together, strict=True):
        assert found == pytest.approx(optimal_centroids(row[None], np.ones((1, 40)), 4)[0])


def test_values_far_from_zero_are_told_apart():
    """Sums of squares of large values cancel unless they are shifted."""
    values = 1e7 + np.array([[0.0, 0.1, 5.0, 5.1]])
    assert optimal_centroids(values, np.ones_like(values), 2)[0] == pytest.approx(
        [1e7 + 0.05, 1e7 + 5.05], rel=1e-12
    )


def test_rows_where_nothing_counts_have_zeros():
    values = np.array([[1.0, 2.0]])
    assert optimal_centroids(values, np.zeros_like(values), 2).tolist() == [[0.0, 0.0]]
