"""Weights of few values, against slow references."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays
from torch import nn

from distiller.weight_sharing.shared_values import KEPT, SharedWeights, component_values, means_by_code

FINITE = st.floats(-10, 10, width=32)
VALUES = torch.tensor([0.0, -1.0, 2.0], dtype=torch.float64)


def shared(*codes: int) -> SharedWeights:
    return SharedWeights(VALUES, {"w": torch.tensor(codes, dtype=torch.uint8)})


def test_codes_stand_for_values_and_what_is_kept_stays():
    weights = torch.tensor([5.0, 6.0, 7.0, 8.0])
    codes = torch.tensor([0, 1, KEPT, 2], dtype=torch.uint8)
    assert component_values(weights, codes, VALUES).tolist() == [0.0, -1.0, 7.0, 2.0]


@given(
    arrays(np.float32, (5, 4), elements=FINITE),
    arrays(np.uint8, (5, 4), elements=st.sampled_from([0, 1, 2, KEPT])),
)
def test_means_are_those_of_all_elements_of_a_code_in_all_tensors(tensor, codes):
    tensors, places = {"a": tensor[:2], "b": tensor[2:]}, {"a": codes[:2], "b": codes[2:]}
    found = means_by_code(
        {name: torch.from_numpy(part) for name, part in tensors.items()},
        {name: torch.from_numpy(part) for name, part in places.items()},
    )
    for code in (0, 1, 2, KEPT):
        of_code = tensor[codes == code]
        if len(of_code):
            np.testing.assert_allclose(found[code], of_code.mean(dtype=np.float64), rtol=1e-9, atol=1e-12)
        else:
            assert found[code].isnan()


def test_a_value_becomes_the_mean_of_its_elements_and_one_without_stays():
    moved = shared(1, 1, 0, KEPT).recentred({"w": torch.tensor([3.0, 5.0, 9.0, 9.0])})
    assert moved.values.tolist() == [0.0, 4.0, 2.0]


def test_gradients_are_shared_and_pruned_elements_have_none():
    param = nn.Parameter(torch.tensor([1.0, 1.0, 0.0, 0.0, 3.0]))
    param.grad = torch.tensor([2.0, 4.0, 8.0, 16.0, 32.0])
    shared(1, 1, 1, 0, KEPT).share_gradients({"w": param})
    assert param.grad.tolist() == [3.0, 3.0, 0.0, 0.0, 32.0]


def test_a_parameter_without_a_gradient_is_left_alone():
    param = nn.Parameter(torch.ones(2))
    shared(1, 2).share_gradients({"w": param})
    assert param.grad is None


def test_what_has_become_zero_counts_no_more():
    alive = shared(1, 2, KEPT).without_pruned({"w": torch.tensor([0.0, 1.0, 0.0])})
    assert alive.codes["w"].tolist() == [0, 2, KEPT]
    assert alive.codes["w"].dtype == torch.uint8


def test_codes_follow_cuts():
    assert shared(0, 1, 2).after_cuts({"w": {0: (0, 2)}}).codes["w"].tolist() == [0, 2]
    assert shared(0, 1, 2).after_cuts({"other": {0: (0,)}}).codes["w"].tolist() == [0, 1, 2]


def test_sparsity_counts_zeros():
    assert shared(0, 0, 1, KEPT).sparsity == pytest.approx(0.5)


def test_elements_of_a_value_are_equal_to_the_bit():
    tensor = torch.randn(3)
    SharedWeights(
        torch.tensor([0.0, 0.1], dtype=torch.float64), {"w": torch.ones(3, dtype=torch.uint8)}
    ).write({"w": tensor})
    assert len(tensor.unique()) == 1
