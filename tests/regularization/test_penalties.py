from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.errors import DistillerError
from distiller.regularization.penalties import family_norms, group_lasso, group_mask, group_variance, l1
from distiller.regularization.regimes import FAMILIES

CONV, LINEAR = (4, 3, 2, 2), (4, 3)


def shape_of(group: str) -> tuple[int, ...]:
    return LINEAR if "Rows" in group or "Cols" in group else CONV


def groups_of(w: np.ndarray, family: str) -> list[np.ndarray]:
    """Each group as its elements, spelt out."""
    out, into = w.shape[:2]
    return {
        "2D": lambda: [w[i, j] for i in range(out) for j in range(into)],
        "Rows": lambda: [w[i] for i in range(out)],
        "Cols": lambda: [w[:, j] for j in range(into)],
        "Channels": lambda: [w[:, j] for j in range(into)],
        "Filters": lambda: [w[i] for i in range(out)],
        "3D": lambda: [w[i] for i in range(out)],
        "4D": lambda: [w],
    }[family]()


def all_groups_of(w: np.ndarray, group: str) -> list[np.ndarray]:
    return [one for family in group.split("+") for one in groups_of(w, family)]


every_group = pytest.mark.parametrize("group", FAMILIES)


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20))
def test_l1_is_the_sum_of_magnitudes(values):
    assert float(l1(torch.tensor(values))) == pytest.approx(sum(map(abs, values)), rel=1e-5, abs=1e-30)


@every_group
@given(seed=st.integers(0, 1000))
@settings(max_examples=15)
def test_group_lasso_is_the_sum_of_the_norms_of_the_groups(group, seed):
    w = np.random.default_rng(seed).normal(size=shape_of(group))
    expected = sum(np.sqrt((one**2).sum()) for one in all_groups_of(w, group))
    assert float(group_lasso(torch.from_numpy(w), group)) == pytest.approx(expected, rel=1e-6)


def test_channels_of_a_linear_layer_are_its_columns():
    w = torch.tensor([[3.0, 1.0], [4.0, 0.0]])
    assert float(group_lasso(w, "Channels")) == pytest.approx(5 + 1)


def test_a_channel_of_zeros_weighs_a_ten_thousandth():
    """Distiller's sqrt(sum + 1e-8)."""
    assert float(group_lasso(torch.zeros(4, 3, 2, 2), "Channels")) == pytest.approx(3e-4)
    assert float(group_lasso(torch.zeros(4, 3, 2, 2), "Filters")) == 0


def test_channels_and_4d_can_be_penalised_together():
    """DEFECT of Distiller: Channels+4D called a method that it did not have."""
    w = torch.ones(2, 3, 2, 2)
    assert float(group_lasso(w, "Channels+4D")) == pytest.approx(3 * 8**0.5 + 24**0.5)


@given(seed=st.integers(0, 1000))
@settings(max_examples=15)
def test_group_variance_is_one_by_the_variance_of_the_channels_norms(seed):
    w = np.random.default_rng(seed).normal(size=CONV)
    norms = [np.sqrt((one**2).sum()) for one in groups_of(w, "Channels")]
    assert float(group_variance(torch.from_numpy(w))) == pytest.approx(
        1 / np.var(norms, ddof=1), rel=1e-5, abs=1e-5
    )


def test_group_variance_of_equal_channels_is_finite():
    """DEFECT of Distiller: the loss of channels of equal norms was infinite."""
    for w in (torch.zeros(CONV), torch.full(CONV, 0.5)):
        w.requires_grad_()
        penalty = group_variance(w)
        penalty.backward()
        assert penalty.item() == pytest.approx(1e8)
        assert torch.isfinite(gradient_of(w)).all()


def gradient_of(w: torch.Tensor) -> torch.Tensor:
    assert w.grad is not None
    return w.grad


def numeric_gradient(function, w: torch.Tensor) -> torch.Tensor:
    gradient = torch.zeros_like(w)
    for index in np.ndindex(*w.shape):
        step = torch.zeros_like(w)
        step[index] = 1e-6
        gradient[index] = (function(w + step) - function(w - step)) / 2e-6
    return gradient


@every_group
def test_the_gradient_of_group_lasso_is_that_of_finite_differences(group):
    w = torch.randn(shape_of(group), dtype=torch.float64, requires_grad=True)
    group_lasso(w, group).backward()
    torch.testing.assert_close(
        gradient_of(w), numeric_gradient(lambda x: group_lasso(x, group), w.detach()), rtol=1e-5, atol=1e-6
    )


def test_the_gradient_of_group_variance_is_that_of_finite_differences():
    w = torch.randn(CONV, dtype=torch.float64, requires_grad=True)
    group_variance(w).backward()
    torch.testing.assert_close(
        gradient_of(w), numeric_gradient(group_variance, w.detach()), rtol=1e-4, atol=1e-4
    )


@every_group
def test_a_group_of_zeros_has_the_gradient_zero(group):
    w = torch.zeros(shape_of(group), requires_grad=True)
    group_lasso(w, group).backward()
    assert torch.equal(gradient_of(w), torch.zeros_like(w))


def test_groups_of_zeros_beside_others_have_the_gradient_zero():
    w = torch.randn(CONV)
    w[1] = 0
    w.requires_grad_()
    group_lasso(w, "Filters").backward()
    assert torch.isfinite(gradient_of(w)).all()
    assert (gradient_of(w)[1] == 0).all()
    assert (gradient_of(w)[0] != 0).all()


@every_group
def test_the_number_of_operations_does_not_grow_with_the_number_of_groups(group):
    def operations(scale: int) -> int:
        weight = torch.randn([size * scale for size in shape_of(group)], requires_grad=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            group_lasso(weight, group)
        return len(profile.events() or ())

    assert operations(1) == operations(3)


@every_group
@pytest.mark.parametrize("criteria", ["Max", "Mean_Abs"])
def test_a_mask_keeps_groups_of_larger_magnitude_than_lambda(group, criteria):
    measure = {"Max": np.max, "Mean_Abs": np.mean}[criteria]
    w = torch.randn(shape_of(group), dtype=torch.float64)
    expected = np.ones(w.shape)
    numbers = np.arange(w.numel()).reshape(w.shape)
    magnitudes = [measure(np.abs(one)) for one in groups_of(w.numpy(), group.split("+")[0])]
    threshold = 1.000001 * float(np.median(magnitudes))  # not at a rounding error from any
    for one in all_groups_of(numbers, group):
        if measure(np.abs(w.numpy().flat[one.ravel()])) <= threshold:
            expected.flat[one.ravel()] = 0
    mask = group_mask(w, group, threshold, criteria)
    np.testing.assert_array_equal(mask.numpy(), expected)
    assert mask.dtype == w.dtype


@pytest.mark.parametrize(("threshold", "kept"), [(0.49, 1.0), (0.5, 0.0)])
def test_a_whole_layer_can_lie_under_the_threshold(threshold, kept):
    """DEFECT of Distiller: groups of 4D could not be thresholded."""
    mask = group_mask(torch.full(CONV, 0.5), "4D", threshold, "Mean_Abs")
    assert torch.equal(mask, torch.full(CONV, kept))


def test_masks_have_the_memory_format_of_the_weights():
    w = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    assert group_mask(w, "Channels+4D", 0.1, "Max").stride() == w.stride()


@every_group
def test_a_mask_refuses_nan(group):
    w = torch.randn(shape_of(group))
    w.view(-1)[0] = float("nan")
    with pytest.raises(DistillerError, match="NaN"):
        group_mask(w, group, 0.1, "Max")


def test_half_precision_is_measured_in_single_precision():
    w = torch.full((64, 64, 3, 3), 60.0, dtype=torch.float16)
    assert float(l1(w)) == 60 * 64 * 64 * 9
    assert float(family_norms(w, "4D")) == pytest.approx(60 * (64 * 64 * 9) ** 0.5)
