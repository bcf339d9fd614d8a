"""Tensors in a few numbers, against numpy in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.data_loggers import tensor_summary
from distiller.data_loggers.tensor_summary import SoFar, new_scratch, summary_of, sums_agree

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "strided": lambda x: x[:, :, ::2],
    "expanded": lambda x: x[:1].expand(3, *x.shape[1:]),
}


def assert_is_of(summary, x: torch.Tensor, tolerance=1e-5) -> None:
    values = x.detach().double().numpy()
    samples = values.reshape(len(values), -1)
    mean = values.mean()
    apart = np.abs(values - mean).sum()
    assert np.array_equal(summary.ranges[0], samples.min(1))
    assert np.array_equal(summary.ranges[1], samples.max(1))
    low, high, low_sum, high_sum, total = summary.sums
    assert (low, high) == (values.min(), values.max())
    assert low_sum == pytest.approx(samples.min(1).sum())
    assert high_sum == pytest.approx(samples.max(1).sum())
    noise = tolerance * np.abs(values).sum()
    assert total == pytest.approx(values.sum(), abs=noise)
    assert summary.spread.mean == pytest.approx(mean, abs=noise / values.size)
    assert summary.spread.squared == pytest.approx(np.square(values - mean).sum(), rel=1e-3)
    assert summary.spread.absolute == pytest.approx(apart, rel=1e-4)
    points = summary.spread.points
    assert summary.spread.unsampled + points.deviation_sum(mean) == pytest.approx(apart, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_those_of_numpy_in_any_layout_and_precision(layout, dtype):
    torch.manual_seed(0)
    x = LAYOUTS[layout]((torch.randn(5, 6, 8, 10) * 3 + 1).to(dtype))
    assert_is_of(summary_of(x), x)


@settings(max_examples=40, deadline=None)
@given(
    offset=st.sampled_from([0.0, 1.0, -30.0, 1e3, 1e6]),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e20]),
    seed=st.integers(0, 999),
    shape=st.sampled_from([(3, 700), (40, 1), (7,), (1, 2, 3, 4)]),
)
def test_no_digits_are_lost_far_from_zero_or_out_of_single_precisions_squares(offset, scale, seed, shape):
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset) * scale
    summary = summary_of(x)
    values = x.double().numpy()
    assert summary.spread.squared == pytest.approx(np.square(values - values.mean()).sum(), rel=1e-3)
    assert summary.spread.absolute == pytest.approx(np.abs(values - values.mean()).sum(), rel=1e-3)


def test_squares_of_many_alike_values_do_not_drift():
    # In single precision 0.01 is rounded the same way each time that it is added to a large sum
    x = torch.full((3, 1 << 19), 0.1)
    x[:, ::2] = 0.0
    assert summary_of(x).spread.squared == pytest.approx(3 * (1 << 19) * 0.1**2 / 4, rel=2e-4)


def test_parts_make_a_whole(monkeypatch):
    monkeypatch.setattr(tensor_summary, "_PART", 50)
    x = torch.randn(7, 120)  # samples larger than a part
    assert_is_of(summary_of(x), x)
    x = torch.randn(90, 12)  # several samples in a part, and a last part that is smaller
    assert_is_of(summary_of(x, scratch=new_scratch(x.device)), x)


def test_a_scalar_is_one_sample():
    summary = summary_of(torch.tensor(2.0))
    assert summary.sums == (2, 2, 2, 2, 2)
    assert (summary.spread.squared, summary.spread.absolute) == (0, 0)


def test_equal_elements_have_no_spread_whatever_their_sum_is_rounded_to():
    spread = summary_of(torch.full((3, 1000), 0.1)).spread
    assert (spread.squared, spread.absolute) == (0, 0)
    assert spread.mean == pytest.approx(0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_has_no_spread(bad):
    x = torch.zeros(2, 8)
    x[1, 3] = bad
    assert summary_of(x).spread is None


def test_the_extremes_of_a_relu_are_taken_from_its_input():
    torch.manual_seed(0)
    x = torch.randn(6, 50) - torch.linspace(0, 8, 6)[:, None]  # the last samples are all below zero
    before = summary_of(x)
    assert_is_of(summary_of(x.relu(), rectified=before), x.relu())


def test_the_sum_of_deviations_is_estimated_only_where_the_stream_makes_up_for_the_doubt():
    torch.manual_seed(0)
    x = torch.randn(4, 100_000)
    exact = summary_of(x)
    assert exact.spread.doubt == 0
    # a stream of nothing so far: exact again
    assert summary_of(x, before=SoFar(0.0, 0.0, 0.0)).spread.doubt == 0
    # a stream a hundred times as large: one element in 64 will do
    estimated = summary_of(x, before=SoFar(exact.spread.mean, 100 * exact.spread.absolute, 0.0)).spread
    assert estimated.absolute == pytest.approx(exact.spread.absolute, rel=0.03)
    assert 0 < math.sqrt(estimated.doubt) < 0.01 * exact.spread.absolute
    # unless its doubt is used up
    full = SoFar(exact.spread.mean, 100 * exact.spread.absolute, (0.21 * exact.spread.absolute) ** 2)
    assert summary_of(x, before=full).spread.doubt == 0


def test_a_tensor_of_heavy_tails_is_summed_exactly():
    x = torch.zeros(4, 100_000)
    x[0, 17] = 1e6  # which no sample would see
    stream = SoFar(2.5, 100 * 2 * 1e6, 0.0)
    assert summary_of(x, before=stream).spread.absolute == pytest.approx(
        2 * 1e6 * (1 - 1 / 400_000), rel=1e-4
    )


def test_few_points_are_kept_of_what_does_not_move_the_mean():
    x = torch.randn(4, 100_000)
    exact = summary_of(x)
    calm = summary_of(x, before=SoFar(exact.spread.mean, 10 * exact.spread.absolute, 0.0))
    moved = summary_of(x + 9, before=SoFar(exact.spread.mean, 10 * exact.spread.absolute, 0.0))
    assert (len(exact.spread.points.values), len(calm.spread.points.values)) == (1024, 256)
    assert len(moved.spread.points.values) == 1024


def test_sums_tell_whether_a_tensor_was_changed():
    x = torch.randn(3, 8)
    summary = summary_of(x)
    assert sums_agree(x, summary)
    assert not sums_agree(x.relu(), summary)
    assert not sums_agree(x[:2], summary)
