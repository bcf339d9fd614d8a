"""k-means of numbers against scikit-learn and scipy, and the properties of its starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans
from sklearn import cluster

from distiller.quantization.codebook import kmeans_1d as module
from distiller.quantization.codebook.kmeans_1d import Start, initial_centroids, kmeans_1d, lloyd

KMeans: Any = cluster.KMeans
STARTS: list[Start] = ["exact", "linear", "quantile", "random"]


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    """Of two lumps and tails: no start finds the best without looking."""
    generator = np.random.default_rng(seed)
    return generator.standard_t(4, size=shape) + generator.choice([-2.0, 1.5], size=shape)


def error_of(values: np.ndarray, centroids: np.ndarray) -> float:
    return float(((values[:, None] - centroids[None]) ** 2).min(1).sum())


@pytest.mark.parametrize("count", [2, 5, 16])
def test_exact_error_is_not_above_that_of_sklearn_and_scipy(count):
    values = weights(600)
    found = error_of(values, kmeans_1d(values[None], count)[0])
    sklearn = KMeans(count, n_init=8, random_state=0).fit(values[:, None])
    book, _ = kmeans(values[:, None], count, iter=8, rng=0)
    assert found <= sklearn.inertia_ * (1 + 1e-9)
    assert found <= error_of(values, book.ravel()) * (1 + 1e-9)


@pytest.mark.parametrize("start", STARTS[1:])
def test_lloyd_ends_where_sklearn_ends_from_the_same_start(start):
    values = weights(500)
    distinct, counts = np.unique(values, return_counts=True)
    begun = initial_centroids(distinct, counts, 6, start)
    reference = KMeans(6, init=begun[:, None], n_init=1, tol=0, max_iter=1000, algorithm="lloyd")
    reference.fit(values[:, None])
    assert kmeans_1d(values[None], 6, start)[0] == pytest.approx(
        np.sort(reference.cluster_centers_.ravel()), rel=1e-6
    )


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-50, 50).map(lambda x: round(x, 3)), min_size=1, max_size=60),
    count=st.integers(1, 9),
    start=st.sampled_from(STARTS),
    has_zero=st.booleans(),
)
def test_no_start_is_better_than_exact(values, count, start, has_zero):
    row = np.array(values)
    other = kmeans_1d(row[None], count, start, has_zero)[0]
    exact = kmeans_1d(row[None], count, "exact", has_zero)[0]
    assert other.shape == (count,)
    assert (np.diff(other) >= 0).all()
    kept = [0.0] if has_zero else []
    nonzero = row[row != 0]
    if nonzero.size:
        assert error_of(nonzero, np.append(exact, kept)) <= error_of(nonzero, np.append(other, kept)) + 1e-7


def test_zeros_do_not_count():
    values = weights(80)
    padded = np.concatenate([values, np.zeros(500)])
    for start in STARTS:
        assert kmeans_1d(padded[None], 4, start)[0] == pytest.approx(kmeans_1d(values[None], 4, start)[0])


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("has_zero", [False, True])
def test_few_values_are_their_own_centroids(start, has_zero):
    rows = np.array([[3.0, 1.0, 0.1, 1.0, 0.0], [0.0] * 5])
    assert kmeans_1d(rows, 4, start, has_zero).tolist() == [[0.1, 1.0, 3.0, 3.0], [0.0] * 4]


@pytest.mark.parametrize("start", STARTS)
def test_rows_have_centroids_of_their_own(start):
    rows = weights(4, 60)
    rows[1, 5:] = 0
    together = kmeans_1d(rows, 5, start)
    for row, found in zip(rows, together, strict=True):
        assert found == pytest.approx(kmeans_1d(row[None], 5, start)[0])


def test_exact_is_lloyd_from_quantiles_where_there_is_too_much_to_do(monkeypatch):
    values = weights(1, 300)
    expected = kmeans_1d(values, 8, "quantile")
    assert not np.allclose(kmeans_1d(values, 8), expected)
    monkeypatch.setattr(module, "EXACT_WORK", 300 * 8 - 1)
    assert np.array_equal(kmeans_1d(values, 8), expected)


def test_starts_are_those_of_deep_compression():
    values, counts = np.array([0.0, 1.0, 2.0, 3.0, 10.0]), np.array([1, 1, 1, 1, 4])
    assert initial_centroids(values, counts, 3, "linear").tolist() == [0.0, 5.0, 10.0]
    assert initial_centroids(values, counts, 1, "linear").tolist() == [5.0]
    # the values in the middle of each half of the eight
    assert initial_centroids(values, counts, 2, "quantile").tolist() == [2.0, 10.0]
    drawn = initial_centroids(values, counts, 3, "random")
    assert set(drawn) <= set(values)
    assert len(set(drawn)) == 3
    assert drawn.tolist() == initial_centroids(values, counts, 3, "random").tolist()


def test_lloyd_never_raises_the_error_and_keeps_zero_where_it_is(monkeypatch):
    values = np.sort(weights(200))
    errors = []
    for iterations in range(1, 12):
        monkeypatch.setattr(module, "MOST_ITERATIONS", iterations)
        centroids = lloyd(values, np.ones(200), np.linspace(-3, 4, 6), has_zero=True)
        assert centroids.shape == (6,)
        errors.append(error_of(values, np.append(centroids, 0.0)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_a_centroid_without_values_stays():
    values = np.array([0.0, 1.0, 10.0])
    assert lloyd(values, np.ones(3), np.array([0.0, 5.4, 5.6, 10.0])).tolist() == [0.5, 5.4, 5.6, 10.0]


def test_a_value_in_the_middle_goes_to_the_upper_centroid():
    assert lloyd(np.array([0.0, 1.0, 2.0]), np.ones(3), np.array([0.0, 2.0])).tolist() == [0.0, 1.5]
