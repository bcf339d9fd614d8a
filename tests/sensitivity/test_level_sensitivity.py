from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.errors import DistillerError
from distiller.pruning.criteria import create_mask_sensitivity_criterion
from distiller.sensitivity.level_sensitivity import sensitivity_of_level


@given(st.integers(0, 99), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_the_pruner_begins_with_exactly_the_level(percent, seed):
    weight = torch.randn(20, 25, generator=torch.Generator().manual_seed(seed))
    sensitivity = sensitivity_of_level(weight, percent / 100)
    mask = create_mask_sensitivity_criterion(weight, sensitivity)
    assert int((mask == 0).sum()) == 5 * percent


def test_it_is_written_in_few_digits():
    weight = torch.linspace(-1, 1, 40).view(4, 10)
    sensitivity = sensitivity_of_level(weight, 0.5)
    assert sensitivity == float(f"{sensitivity:.6g}")


def test_magnitudes_that_differ_by_less_than_six_digits_are_told_apart():
    weight = torch.tensor([1.0, 1.0 + 2**-23, -3.0, 4.0])
    mask = create_mask_sensitivity_criterion(weight, sensitivity_of_level(weight, 0.25))
    assert mask.tolist() == [0, 1, 1, 1]


def test_equal_magnitudes_go_together():
    weight = torch.tensor([1.0, -1.0, 1.0, 5.0])
    mask = create_mask_sensitivity_criterion(weight, sensitivity_of_level(weight, 0.25))
    assert mask.tolist() == [0, 0, 0, 1]


def test_a_weight_without_spread_has_no_sensitivity():
    with pytest.raises(DistillerError) as error:
        sensitivity_of_level(torch.ones(4), 0.5)
    assert str(error.value) == (
        "a sensitivity is a multiple of the standard deviation, which is 0; take 'agp'"
    )
