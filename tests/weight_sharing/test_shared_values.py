"""Weights of few values, against slow references."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays

from distiller.weight_sharing.shared_values import codes_of, mean_by_code, values_by_code

FINITE = st.floats(-10, 10, width=32)


@given(
    arrays(np.float32, st.integers(1, 40), elements=FINITE),
    st.lists(FINITE, min_size=1, max_size=7, unique=True),
)
def test_each_element_has_the_code_of_the_nearest_value(weight, values):
    ordered = np.sort(np.array(values, np.float64))
    codes = codes_of(torch.from_numpy(weight), torch.from_numpy(ordered)).numpy()
    assert ((codes == 0) == (weight == 0)).all()
    alive = weight != 0
    distances = np.abs(weight[alive, None].astype(np.float64) - ordered)
    chosen = distances[np.arange(alive.sum()), codes[alive] - 1]
    np.testing.assert_allclose(chosen, distances.min(axis=1), rtol=1e-12, atol=1e-12)


def test_of_two_values_as_near_the_larger_is_taken():
    assert codes_of(torch.tensor([1.0]), torch.tensor([0.5, 1.5])).tolist() == [2]


def test_codes_stand_for_values_and_zero():
    values = torch.tensor([-1.0, 2.0])
    assert values_by_code(values, torch.tensor([[0, 1], [2, 2]])).tolist() == [[0.0, -1.0], [2.0, 2.0]]


@given(arrays(np.float32, (5, 4), elements=FINITE), arrays(np.int64, (5, 4), elements=st.integers(0, 3)))
def test_elements_of_one_code_get_their_mean_to_the_bit(tensor, codes):
    found = mean_by_code(torch.from_numpy(tensor), torch.from_numpy(codes)).numpy()
    assert (found[codes == 0] == 0).all()
    for code in set(codes.flatten()) - {0}:
        of_code = found[codes == code]
        assert len(set(of_code)) == 1
        np.testing.assert_allclose(
            of_code[0], tensor[codes == code].mean(dtype=np.float64), rtol=1e-6, atol=1e-6
        )


def test_the_memory_format_stays():
    tensor = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert mean_by_code(tensor, torch.ones_like(tensor, dtype=torch.long)).stride() == tensor.stride()


def test_an_empty_tensor_stays_empty():
    assert mean_by_code(torch.empty(0), torch.empty(0, dtype=torch.long)).shape == (0,)
