"""The scale of least error against a search in numpy."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from distiller.errors import QuantizationError, UsageError
from distiller.quantization import affine
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.refinement.weight_scales import mse_scale


def numpy_error(row: np.ndarray, scale: float, zero_point: int, qmin: int, qmax: int) -> float:
    q = np.clip(np.rint(row / scale) + zero_point, qmin, qmax)
    return float(np.mean(((q - zero_point) * scale - row) ** 2))


def test_an_outlier_is_clipped_where_finer_steps_are_worth_more() -> None:
    # 2 bits, integers -1 to 1: at scale 1 the 999 weights of 0.4 become 0, at 0.4 they are exact and 1 becomes 0.4.
    weight = torch.tensor([[0.4] * 999 + [1.0]])
    scale, zero_point = mse_scale(weight, 2, Mode.SYMMETRIC_RESTRICTED, per_channel=False)
    assert scale.item() == pytest.approx(0.4)
    assert zero_point.item() == 0


def test_nothing_is_clipped_where_all_weights_are_alike() -> None:
    weight = torch.tensor([[0.7, -0.7, 0.7], [-0.2, 0.2, 0.0]])
    scale, _ = mse_scale(weight, 4, Mode.SYMMETRIC_RESTRICTED, per_channel=True)
    torch.testing.assert_close(scale, torch.tensor([0.1, 0.2 / 7]))


def test_the_largest_weight_of_a_symmetric_grid_is_not_half_a_step_off() -> None:
    # SYMMETRIC lays 1.0 on 7.5 steps, of which there are 7: a scale of 1 / 7 holds it exactly.
    weight = torch.tensor([[1.0, 0.0, 0.0]])
    scale, _ = mse_scale(weight, 4, Mode.SYMMETRIC, per_channel=False)
    assert scale.item() == pytest.approx(1 / 7)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_ratio_of_the_range_is_better(mode, bits) -> None:
    weight = torch.randn(3, 4, 3, 3, dtype=torch.float64) ** 3
    scale, zero_point = mse_scale(weight, bits, mode, per_channel=True)
    assert scale.shape == zero_point.shape == (3,)
    qmin, qmax = affine.quantized_range(bits, mode)
    for row, best, offset in zip(weight.flatten(1).numpy(), scale.tolist(), zero_point.tolist(), strict=True):
        least = numpy_error(row, best, offset, qmin, qmax)
        for ratio in np.arange(1, 101) / 100:
            lo, hi = min(row.min() * ratio, 0), max(row.max() * ratio, 0)
            if mode.is_symmetric:
                other, shift = max(-lo, hi) / affine.steps(bits, mode), 0
            else:
                other = (hi - lo) / (2**bits - 1)
                shift = int(qmin - np.rint(lo / other))
            assert least <= numpy_error(row, other, shift, qmin, qmax) * (1 + 1e-9)


@hypothesis.given(st.integers(2, 8), st.sampled_from(list(Mode)), st.integers(0, 10_000), st.booleans())
@hypothesis.settings(max_examples=25, deadline=None)
def test_the_error_is_never_above_that_of_the_full_range(bits, mode, seed, per_channel) -> None:
    weight = torch.randn(4, 9, generator=torch.Generator().manual_seed(seed))
    rows = weight if per_channel else weight.reshape(1, -1)
    plain = affine.scale_and_zero_point(rows.amin(1), rows.amax(1), bits, mode)
    scale, zero_point = (value.reshape(-1) for value in mse_scale(weight, bits, mode, per_channel))
    qrange = affine.quantized_range(bits, mode)
    new = (affine.fake_quantize(rows, scale, zero_point, *qrange, axis=0) - rows).square().mean(1)
    old = (affine.fake_quantize(rows, *plain, *qrange, axis=0) - rows).square().mean(1)
    assert bool((new <= old).all())


def test_a_weight_of_zeros_has_scale_one() -> None:
    scale, zero_point = mse_scale(torch.zeros(2, 3), 4, Mode.ASYMMETRIC_UNSIGNED, per_channel=False)
    assert scale.shape == ()
    assert (scale.item(), zero_point.item()) == (1.0, 0)


def test_bits_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^mse_scale: bits must be 2 to 16, got 1$"):
        mse_scale(torch.ones(2, 2), 1, Mode.SYMMETRIC, per_channel=False)


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(QuantizationError, match="must be finite"):
        mse_scale(torch.tensor([[1.0, float("inf")]]), 4, Mode.SYMMETRIC, per_channel=False)
