from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.packing.grids import grid_scale, on_grid, row_scales
from tests.packing.networks import normal, rounded


@settings(max_examples=60)
@given(
    st.floats(2.0**-60, 2.0**40, width=32),
    st.lists(st.integers(-127, 127), min_size=2, max_size=50).filter(any),
)
def test_a_grid_is_found_whatever_its_scale(scale, steps):
    values = np.array(steps, dtype=np.float32) * np.float32(scale)
    found = grid_scale(values, values)
    if found is None:  # nothing but multiples far apart says what the scale was
        assert np.gcd.reduce(np.abs(steps)) > 1 or not {1, 2, 3} & set(
            np.diff(np.unique(np.abs([0, *steps])))
        )
        return
    again = on_grid(np.rint(values.astype(np.float64) / float(found)), found)
    np.testing.assert_array_equal(again, values.view(np.uint32))


@pytest.mark.parametrize("bits", [2, 4, 8, 12, 16])
def test_quantized_weights_are_on_a_grid_of_no_more_steps_than_theirs(bits):
    weight = rounded(normal(100, 300), bits, per_row=False).numpy().ravel()
    scale = grid_scale(weight, np.unique(weight))
    assert scale is not None
    assert np.abs(weight).max() / scale <= 2 ** (bits - 1) - 1 + 1e-3


@pytest.mark.parametrize(
    "values", [[0.0, 0.0], [1.0, np.inf], [np.nan, 1.0], [1.0, 1e-30], [1.0, 1.0000001, 1.7]], ids=str
)
def test_where_there_is_no_grid_none_is_found(values):
    found = np.array(values, dtype=np.float32)
    assert grid_scale(found, found) is None


def test_each_row_has_its_scale_and_a_row_of_zeros_any():
    weight = rounded(normal(5, 200), 4, per_row=True)
    weight[2] = 0
    rows = np.repeat(np.arange(5), 200)
    scales = row_scales(weight.numpy().ravel(), rows, 5)
    assert scales is not None
    assert scales[2] == 1
    torch.testing.assert_close(torch.from_numpy(scales)[[0, 1, 3, 4]] * 7, weight.abs().amax(1)[[0, 1, 3, 4]])
    weight[4] = normal(200)
    assert row_scales(weight.numpy().ravel(), rows, 5) is None
