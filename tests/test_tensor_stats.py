import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from distiller import tensor_stats
from distiller.errors import UsageError
from distiller.tensor_stats import (
    count_nonzeros,
    non_zero_channels,
    sparsity,
    sparsity_2D,
    sparsity_3D,
    sparsity_blocks,
    sparsity_ch,
    sparsity_cols,
    sparsity_rows,
    to_np,
    volume,
)

# Weights of which whole structures are zero: few values, most of them 0.
SPARSE_VALUES = st.sampled_from([0.0, 0.0, 0.0, -1.5, 2.0])
WEIGHTS_4D = arrays.arrays(np.float32, st.tuples(*[st.integers(1, 3)] * 4), elements=SPARSE_VALUES)
WEIGHTS_2D = arrays.arrays(np.float32, st.tuples(*[st.integers(1, 5)] * 2), elements=SPARSE_VALUES)


@given(WEIGHTS_4D)
def test_structures_of_a_convolution_agree_with_a_count_one_by_one(weights):
    filters, channels = weights.shape[:2]
    tensor = torch.from_numpy(weights)
    assert sparsity(tensor) == pytest.approx(np.mean(weights == 0))
    assert sparsity_3D(tensor) == pytest.approx(np.mean([not weights[f].any() for f in range(filters)]))
    assert sparsity_ch(tensor) == pytest.approx(np.mean([not weights[:, c].any() for c in range(channels)]))
    kernels = [not weights[f, c].any() for f in range(filters) for c in range(channels)]
    assert sparsity_2D(tensor) == pytest.approx(np.mean(kernels))
    assert non_zero_channels(tensor).tolist() == [c for c in range(channels) if weights[:, c].any()]


@given(WEIGHTS_2D)
def test_rows_and_columns_of_linear_weights_are_those_of_the_transposed_matrix(weights):
    outputs, inputs = weights.shape
    zero_outputs = np.mean([not weights[i].any() for i in range(outputs)])
    zero_inputs = np.mean([not weights[:, i].any() for i in range(inputs)])
    tensor = torch.from_numpy(weights)
    assert sparsity_cols(tensor) == sparsity_rows(tensor, transposed=False) == pytest.approx(zero_outputs)
    assert sparsity_rows(tensor) == sparsity_cols(tensor, transposed=False) == pytest.approx(zero_inputs)
    assert sparsity_2D(tensor) == pytest.approx(zero_outputs)


@given(st.one_of(WEIGHTS_2D, WEIGHTS_4D))
def test_density_is_what_sparsity_leaves(weights):
    tensor = torch.from_numpy(weights)
    for kind in ("", "_3D", "_ch", "_2D", "_cols", "_rows"):
        zero = getattr(tensor_stats, f"sparsity{kind}")(tensor)
        assert 0 <= zero <= 1
        assert getattr(tensor_stats, f"density{kind}")(tensor) == pytest.approx(1 - zero)


@given(WEIGHTS_4D)
def test_blocks_of_one_kernel_position_are_elements(weights):
    tensor = torch.from_numpy(weights)
    assert sparsity_blocks(tensor, [1, 1, 1, 1]) == pytest.approx(sparsity(tensor))


def test_a_block_is_one_position_in_a_run_of_kernels():
    weights = torch.ones(4, 6, 3, 3)
    weights[0, :3, 1, 1] = 0  # one block of depth 3: filter 0, channels 0-2, centre
    weights[2, 2:5] = 0  # straddles two blocks: neither is zero
    assert sparsity_blocks(weights, [1, 3, 1, 1]) == pytest.approx(1 / (4 * 2 * 9))


@pytest.mark.parametrize(
    ("shape", "block_shape", "message"),
    [
        ((4, 6), [1, 2, 1, 1], "sparsity_blocks: needs a tensor of 4 dimensions, got shape (4, 6)"),
        ((4, 6, 3, 3), [1, 2, 3, 3], "block_shape must be [repetitions, depth, 1, 1], got [1, 2, 3, 3]"),
        (
            (4, 6, 3, 3),
            [1, 5, 1, 1],
            "blocks of 5 kernels do not divide the 24 kernels of shape (4, 6, 3, 3)",
        ),
    ],
)
def test_blocks_that_do_not_fit_are_refused(shape, block_shape, message):
    with pytest.raises(UsageError) as caught:
        sparsity_blocks(torch.zeros(shape), block_shape)
    assert message in str(caught.value)


def test_a_bias_has_elements_but_no_structures():
    bias = torch.zeros(3)
    assert sparsity(bias) == 1
    assert [f(bias) for f in (sparsity_3D, sparsity_ch, sparsity_2D, sparsity_cols, sparsity_rows)] == [0] * 5
    with pytest.raises(UsageError, match=r"needs the weights of a convolution, got shape \(3,\)"):
        non_zero_channels(bias)


def test_1d_and_3d_convolutions_have_filters_channels_and_kernels():
    weights = torch.ones(4, 2, 5)
    weights[0] = 0
    weights[:, 1] = 0
    assert (sparsity_3D(weights), sparsity_ch(weights), sparsity_2D(weights)) == (1 / 4, 1 / 2, 5 / 8)
    assert sparsity_3D(torch.zeros(2, 2, 3, 3, 3)) == 1


def test_an_empty_tensor_is_not_sparse():
    assert sparsity(torch.zeros(0, 3)) == 0
    assert sparsity_cols(torch.zeros(0, 3)) == 0


def test_counts_come_per_tensor():
    assert count_nonzeros([torch.eye(3), torch.zeros(2), torch.ones(2, 2)]) == [3, 0, 4]
    assert count_nonzeros([]) == []


def test_volume_is_of_a_tensor_or_a_shape():
    assert volume(torch.zeros(2, 3, 4)) == volume((2, 3, 4)) == 24


def test_to_np_takes_a_parameter():
    np.testing.assert_array_equal(to_np(torch.nn.Parameter(torch.ones(2))), [1, 1])
