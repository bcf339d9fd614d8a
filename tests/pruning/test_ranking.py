import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distiller.errors import DistillerError
from distiller.norms import l2_norm
from distiller.pruning.ranking import (
    count_structures,
    expand_structures,
    ranked_structure_mask,
    ranked_structures,
)

DIM = {"3D": 0, "Filters": 0, "Channels": 1, "Rows": 1}
SHAPE = {"3D": (6, 5, 2, 2), "Filters": (6, 5, 2, 2), "Channels": (5, 6, 2, 2), "Rows": (5, 6)}


def by_sorting(w: np.ndarray, dim: int, count: int) -> np.ndarray:
    """Reference: which structures stay, by a stable sort of their mean magnitudes."""
    others = tuple(other for other in range(w.ndim) if other != dim)
    order = np.argsort(np.abs(w).mean(axis=others), kind="stable")
    stay = np.ones(w.shape[dim], dtype=bool)
    stay[order[:count]] = False
    return stay


@pytest.mark.parametrize("group_type", DIM)
@pytest.mark.parametrize("fraction", [0, 0.1, 1 / 6, 0.34, 0.5, 0.99, 1.0])
def test_the_structures_of_least_mean_magnitude_go(group_type, fraction):
    w = torch.randn(SHAPE[group_type])
    expected = by_sorting(w.double().numpy(), DIM[group_type], math.floor(fraction * 6 + 1e-9))
    np.testing.assert_array_equal(ranked_structures(w, group_type, fraction).numpy(), expected)


@pytest.mark.parametrize("group_type", DIM)
def test_masks_are_constant_within_structures(group_type):
    w = torch.randn(SHAPE[group_type])
    stay = ranked_structures(w, group_type, 0.5)
    mask = ranked_structure_mask(w, group_type, 0.5)
    per_structure = mask.movedim(DIM[group_type], 0).flatten(1)
    assert torch.equal(per_structure, stay.float().unsqueeze(1).expand_as(per_structure))


@given(seed=st.integers(0, 99), fraction=st.floats(0, 1), constant=st.booleans())
def test_exactly_n_structures_go_ties_included_and_never_all(seed, fraction, constant):
    w = torch.randn(7, 2, 1, 1, generator=torch.Generator().manual_seed(seed)).round()
    stay = ranked_structures(torch.ones_like(w) if constant else w, "Filters", fraction)
    most = 7 if fraction == 1 else 6
    assert int((~stay).sum()) == min(most, math.floor(fraction * 7 + 1e-12))


def test_of_equal_structures_those_of_lower_index_go():
    assert ranked_structures(torch.ones(5, 2), "Filters", 0.4).tolist() == [False, False, True, True, True]


def test_rows_are_input_features_of_a_linear_weight():
    w = torch.tensor([[1.0, 0.1, 3.0], [1.0, 0.2, 3.0]])  # (out, in)
    assert ranked_structure_mask(w, "Rows", 0.34).tolist() == [[1, 0, 1], [1, 0, 1]]


@pytest.mark.parametrize("group_type", ["Filters", "Channels"])
def test_defect_conv1d_weights_are_ranked(group_type):
    """DEFECT of Distiller: it accepted 3-D weights in one assertion and refused them in the next."""
    w = torch.randn(4, 4, 3)
    expected = by_sorting(w.numpy(), DIM[group_type], 2)
    np.testing.assert_array_equal(ranked_structures(w, group_type, 0.5).numpy(), expected)


def test_l2_ranks_by_euclidean_norm():
    w = torch.tensor([[3.0, 0.0], [2.0, 2.0], [9.0, 9.0]])  # L1: 3 < 4; L2: 3 > 2.83
    assert ranked_structures(w, "Filters", 0.34).tolist() == [False, True, True]
    assert ranked_structures(w, "Filters", 0.34, l2_norm).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("rounding_fn", "fraction", "gone"),
    [
        (math.floor, 0.45, 4),
        (math.ceil, 0.45, 5),
        (round, 0.46, 5),
        (math.ceil, 0.95, 9),
        (math.ceil, 0.3, 3),
    ],
)
def test_defect_the_rounding_function_is_honoured(rounding_fn, fraction, gone):
    """DEFECT of Distiller: it stored rounding_fn and never used it."""
    assert (
        int((~ranked_structures(torch.randn(10, 2), "Filters", fraction, rounding_fn=rounding_fn)).sum())
        == gone
    )


@pytest.mark.parametrize("group_type", DIM)
def test_defect_groups_of_neighbours_stand_or_fall_together(group_type):
    """DEFECT of Distiller: it mixed counts of structures with counts of groups when group_size was above 1."""
    w = torch.randn(SHAPE[group_type])
    dim = DIM[group_type]
    pairs = w.double().abs().movedim(dim, 0).flatten(1).mean(1).view(3, 2).mean(1)
    expected = pairs != pairs.min()
    stay = ranked_structures(w, group_type, 0.5, group_size=2)  # floor(0.5 * 3 pairs) = 1
    assert stay.view(3, 2).tolist() == [[kept, kept] for kept in expected.tolist()]


def test_never_all_groups_go():
    stay = ranked_structures(torch.randn(4, 2), "Filters", 0.9, group_size=2, rounding_fn=math.ceil)
    assert int(stay.sum()) == 2


def test_one_structure_stays_unless_all_are_asked_for():
    assert ranked_structures(torch.ones(1, 3), "Filters", 0.9).tolist() == [True]
    assert ranked_structures(torch.ones(1, 3), "Filters", 1.0).tolist() == [False]


@pytest.mark.parametrize("group_type", DIM)
def test_count_structures(group_type):
    assert count_structures(torch.randn(SHAPE[group_type]), group_type) == 6


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: ranked_structures(torch.randn(2, 2), "Filter", 0.5),
            "group_type must be one of 3D, Filters, Channels, Rows, Blocks, got 'Filter'; did you mean 'Filters'?",
        ),
        (
            lambda: ranked_structures(torch.randn(2, 2, 1, 1), "Rows", 0.5),
            "group_type 'Rows' wants a tensor of 2 dimensions, got shape (2, 2, 1, 1)",
        ),
        (
            lambda: ranked_structures(torch.randn(6), "Channels", 0.5),
            "group_type 'Channels' wants a tensor of 2 dimensions or more, got shape (6,)",
        ),
        (
            lambda: ranked_structures(torch.randn(6, 2), "Filters", 1.5),
            "fraction must be in [0, 1], got 1.5",
        ),
        (
            lambda: ranked_structures(torch.randn(6, 2), "Filters", 0.5, group_size=4),
            "group_size must divide the 6 Filters, got 4",
        ),
        (
            lambda: expand_structures(torch.ones(5), torch.randn(5, 6), "Channels"),
            "binary_map: one value for each of 6 Channels is wanted, got 5",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(DistillerError) as error:
        call()
    assert str(error.value) == text
