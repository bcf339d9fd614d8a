from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from distiller.errors import DistillerError, UsageError
from distiller.layerwise.techniques import (
    Factors,
    Magnitudes,
    SortedValues,
    break_even_rank,
    kmeans_by_fraction,
    prune_by_fraction,
    rank_left,
    svd_by_kept_rank,
)
from distiller.quantization.codebook import quantize_by_fraction

WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(-4, 4, width=16),
)
FRACTIONS = st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.9, 0.99, 1.0])


def pruned_as_the_source(w: np.ndarray, fraction: float) -> np.ndarray:
    """M 2.2, in numpy."""
    count = round(fraction * w.size)
    flat = w.ravel().copy()
    flat[np.argsort(np.abs(flat), kind="stable")[:count]] = 0
    return flat.reshape(w.shape)


def quantized_as_the_source(w: np.ndarray, fraction: float) -> np.ndarray:
    """M 2.2, one value after the other; with the middle for all where the source has no level."""
    distinct = len(np.unique(w))
    k = distinct - round(fraction * distinct)
    if k >= distinct:
        return w
    low, high = float(w.min()), float(w.max())
    if k <= 1:
        return np.full_like(w, (low + high) / 2)
    levels = np.linspace(low, high, k + 1)[1:-1]
    result = np.empty_like(w)
    for place, value in np.ndenumerate(w):
        gaps = np.abs(levels - float(value))
        result[place] = levels[np.flatnonzero(gaps == gaps.min())[-1]]
    return result


@given(WEIGHTS, FRACTIONS)
def test_pruning_is_the_sources(w, fraction):
    found = prune_by_fraction(torch.from_numpy(w), fraction).numpy()
    assert np.array_equal(found, pruned_as_the_source(w, fraction))


@pytest.mark.parametrize(
    "fraction, zeros", [(-1, 0), (0, 0), (0.1, 10), (0.5, 50), (0.999, 100), (1, 100), (2, 100)]
)
def test_pruning_zeroes_the_rounded_count_exactly(fraction, zeros):
    w = torch.linspace(-1, 1, 100).view(10, 10)
    assert int((prune_by_fraction(w, fraction) == 0).sum()) == zeros


def test_of_equal_magnitudes_the_first_go():
    w = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]])
    assert prune_by_fraction(w, 0.5).tolist() == [[0, 0, 0], [-1, 1, 1]]


def test_one_sort_prunes_at_any_fraction_and_leaves_the_weight_alone():
    w = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    before, magnitudes = w.clone(), Magnitudes(w)
    for fraction in (0.9, 0.1, 0.5):
        assert torch.equal(magnitudes.pruned(fraction), prune_by_fraction(w, fraction))
    assert torch.equal(w, before)


@given(WEIGHTS, FRACTIONS)
def test_linear_levels_are_the_sources(w, fraction):
    values = SortedValues(torch.from_numpy(w))
    count = values.distinct - round(fraction * values.distinct)
    found = values.shared(values.linear(count)).numpy()
    np.testing.assert_allclose(found, quantized_as_the_source(w, fraction), rtol=1e-6, atol=1e-6)
    assert np.array_equal(found, quantize_by_fraction(torch.from_numpy(w), fraction).numpy())


def test_a_value_in_the_middle_goes_to_the_upper_level():
    w = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])
    values = SortedValues(w)
    levels = values.linear(4)  # linspace(0, 4, 5)[1:-1]
    assert levels is not None
    assert levels.tolist() == [1, 2, 3]
    assert values.shared(np.array([1.0, 3.0])).tolist() == [[1, 1, 3, 3, 3]]


@pytest.mark.parametrize("count, value", [(1, 1.5), (0, 1.5), (-3, 1.5)])
def test_one_value_left_is_the_middle_where_the_source_has_no_level_at_all(count, value):
    values = SortedValues(torch.tensor([[0.0, 1.0, 3.0]]))
    assert values.shared(values.linear(count)).unique().tolist() == [value]


def test_the_two_interior_ends_of_linspace_are_left_out_but_both_ends_are_levels_of_bits():
    values = SortedValues(torch.linspace(-1, 1, 101))
    interior, whole = values.linear(5), values.linear_bits(2)
    assert interior is not None
    assert whole is not None
    np.testing.assert_allclose(interior, [-0.6, -0.2, 0.2, 0.6])
    np.testing.assert_allclose(whole, [-1, -1 / 3, 1 / 3, 1])


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_bits_are_so_many_distinct_values_at_most(bits):
    w = torch.randn(50, 60, generator=torch.Generator().manual_seed(1))
    values = SortedValues(w)
    assert values.shared(values.linear_bits(bits)).unique().numel() <= 2**bits
    assert values.shared(values.kmeans(2**bits)).unique().numel() <= 2**bits


def test_with_no_more_values_than_levels_nothing_changes():
    w = torch.tensor([[0.5, -0.25], [0.5, 1.0]])
    values = SortedValues(w)
    assert values.distinct == 3
    for levels in (values.linear(3), values.linear_bits(2), values.kmeans(3), values.kmeans(7)):
        assert levels is None
    assert torch.equal(values.shared(None), w)


def test_zeros_that_pruning_left_stay_and_do_not_count():
    w = torch.tensor([[0.0, 3.0, 0.0], [1.0, 2.0, 5.0]])
    values = SortedValues(w, keeps_zeros=True)
    assert values.distinct == 4
    assert values.shared(np.array([2.0, 4.0])).tolist() == [[0, 4, 0], [2, 2, 4]]


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.9, 1.0])
def test_kmeans_errs_less_than_equal_levels_of_the_same_number(fraction):
    w = torch.randn(40, 25, generator=torch.Generator().manual_seed(2))
    mine, linear = kmeans_by_fraction(w, fraction), quantize_by_fraction(w, fraction)
    assert float(((mine - w) ** 2).sum()) <= float(((linear - w) ** 2).sum())
    assert torch.equal(mine, w) == (fraction == 0)


@given(WEIGHTS, FRACTIONS)
def test_rank_is_cut_as_in_numpy(w, kept):
    rank = round(kept * min(w.shape))
    u, s, vt = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vt[:rank]
    found = svd_by_kept_rank(torch.from_numpy(w), kept).numpy()
    gap = s[rank - 1] - s[rank] if 0 < rank < len(s) else 1.0  # equal singular values may change places
    if gap > 1e-2:
        np.testing.assert_allclose(found, expected, atol=1e-3)
    if rank == min(w.shape):
        assert np.array_equal(found, w)


def test_factors_multiply_to_the_product():
    factors = Factors(torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(3)))
    assert factors.shape == (6, 36)
    left, right = factors.pair(2)
    assert (left.shape, right.shape) == ((6, 2), (2, 36))
    torch.testing.assert_close((left @ right).view(6, 4, 3, 3), factors.product(2))
    assert not factors.product(0).any()


@pytest.mark.parametrize(
    "rows, columns, kept", [(3000, 6144, 0.67), (2000, 3000, 0.60), (2000, 2000, 0.50), (1000, 2000, 0.67)]
)
def test_break_even_ranks_are_those_computed_for_the_source(rows, columns, kept):
    assert break_even_rank(rows, columns) / min(rows, columns) == pytest.approx(kept, abs=0.005)


@pytest.mark.parametrize("fraction, rank", [(0, 2000), (0.1, 1800), (0.9, 200), (1, 0)])
def test_ranks_have_no_float_noise(fraction, rank):
    assert rank_left(2000, 3000, fraction) == rank


@pytest.mark.parametrize("make", [Magnitudes, SortedValues, Factors])
@pytest.mark.parametrize(
    "weight", [torch.tensor([[1.0, float("nan")]]), torch.tensor([[float("inf")]]), torch.zeros(0, 3)]
)
def test_what_is_no_number_is_refused(make, weight):
    with pytest.raises(
        DistillerError, match="^layer-wise compression: a weight must hold numbers, all of them finite$"
    ):
        make(weight)


def test_a_vector_has_no_rank():
    with pytest.raises(UsageError) as error:
        Factors(torch.ones(3))
    assert str(error.value) == "svd: a weight of two or more dimensions is needed, got (3,)"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_come_back_as_they_were(dtype):
    w = torch.randn(8, 9, generator=torch.Generator().manual_seed(4)).to(dtype)
    for found in (prune_by_fraction(w, 0.5), kmeans_by_fraction(w, 0.5), svd_by_kept_rank(w, 0.5)):
        assert found.dtype == dtype
        assert found.shape == w.shape


def test_a_fraction_that_is_no_number_is_refused():
    w = torch.ones(3, 4)
    for call in (
        lambda: prune_by_fraction(w, math.nan),
        lambda: svd_by_kept_rank(w, math.nan),
        lambda: rank_left(3, 4, math.inf),
    ):
        with pytest.raises(DistillerError) as error:
            call()
        assert str(error.value).startswith("layer-wise compression: a fraction must be a finite number, got ")
