import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distiller.errors import DistillerError
from distiller.pruning.scored_filters import filters_to_keep


def gone(scores, weights=None, fraction=0.5):
    scores = torch.tensor(scores, dtype=torch.float64)
    stay = filters_to_keep(scores, torch.ones(len(scores), 2) if weights is None else weights, fraction)
    return torch.nonzero(~stay).flatten().tolist()


def test_the_lowest_scores_go():
    assert gone([3.0, -1.0, 2.0, 0.5]) == [1, 3]


def test_of_equal_scores_exactly_as_many_go_the_lower_index_first():
    assert gone([1.0, 1.0, 1.0, 1.0, 1.0], fraction=0.4) == [0, 1]
    assert gone([2.0, 1.0, 1.0, 1.0], fraction=0.5) == [1, 2]


@given(st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_the_number_is_exact_and_grows_with_the_fraction(scores, one, other):
    less, more = sorted((one, other))
    assert set(gone(scores, fraction=less)) <= set(gone(scores, fraction=more))
    expected = len(scores) if one == 1 else min(int(one * len(scores)), len(scores) - 1)
    assert abs(len(gone(scores, fraction=one)) - expected) <= (0 if one in (0, 1) else 1)


def test_a_filter_that_is_zero_goes_first():
    """Behind a batch norm the output of a filter that is zero is as lively as beta makes it."""
    weights = torch.ones(4, 2, 3, 3)
    weights[2] = 0
    assert gone([0.1, 0.2, 9.0, 0.3], weights, 0.25) == [2]
    assert gone([0.1, 0.2, 9.0, 0.3], weights, 0.5) == [0, 2]


def test_infinite_scores_rank_as_they_are():
    assert gone([float("inf"), 1.0, float("-inf"), 2.0]) == [1, 2]


def test_scores_that_are_nan_are_refused():
    with pytest.raises(DistillerError) as error:
        gone([1.0, float("nan"), 2.0])
    assert str(error.value) == (
        "cannot rank by scores, got 1 NaN in 3 of them; training has diverged: resume from an earlier "
        "checkpoint with a lower learning rate"
    )
