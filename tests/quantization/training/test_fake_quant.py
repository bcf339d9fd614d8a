"""Values against `affine` and torch's own kernels, gradients against closed forms and the paper's pseudo-code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.quantization import affine
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.training.fake_quant import (
    fake_quantize_ste,
    linear_grid,
    lsq_quantize,
    round_ste,
)

MODES = list(Mode)


def some(*shape: int, seed: int = 0, factor: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * factor


def test_rounding_goes_to_even_and_hands_gradients_on():
    x = torch.tensor([-1.5, -0.5, 0.4, 0.5, 1.5, 2.5], requires_grad=True)
    y = round_ste(x)
    assert y.tolist() == [-2, 0, 0, 0, 2, 2]
    y.backward(torch.arange(6.0))
    assert x.grad.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("differentiates", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_values_are_those_of_affine_bit_for_bit(mode, bits, differentiates):
    x = some(3, 50, seed=bits, factor=2)
    lo, hi = x.min() * 0.7, x.max() * 0.7
    scale, zero_point = affine.scale_and_zero_point(lo, hi, bits, mode)
    qmin, qmax = affine.quantized_range(bits, mode)
    expected = affine.fake_quantize(x, scale, zero_point, qmin, qmax)
    own_scale, own_zero = linear_grid(lo, hi, bits, mode)
    own = fake_quantize_ste(x.requires_grad_(differentiates), own_scale, own_zero, qmin, qmax)
    assert torch.equal(own, expected)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_is_that_of_torchs_own_kernel(mode):
    x, upstream = some(200, factor=3).requires_grad_(), some(200, seed=1)
    scale, zero_point = affine.scale_and_zero_point(torch.tensor(-2.0), torch.tensor(3.0), 4, mode)
    qmin, qmax = affine.quantized_range(4, mode)
    reference = torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), qmin, qmax)
    (expected,) = torch.autograd.grad(reference, x, upstream)
    (own,) = torch.autograd.grad(fake_quantize_ste(x, scale, zero_point, qmin, qmax), x, upstream)
    assert torch.equal(own, expected)
    assert 0 < (expected == 0).sum() < 200


def test_gradient_passes_where_it_is_told_to():
    x = torch.tensor([-5.0, -0.1, 0.1, 0.9, 5.0], requires_grad=True)
    one = torch.tensor(1.0)
    fake_quantize_ste(x, one, None, -1, 1, passes=(0.0, 1.5)).sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 0]
    x.grad = None
    fake_quantize_ste(x, one, None, -1, 1, passes=(float("-inf"), float("inf"))).sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 1, 1]


def test_scales_per_channel_broadcast():
    x = some(4, 6)
    scale = torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = affine.fake_quantize(x, scale, torch.zeros(4), -8, 7, axis=0)
    assert torch.equal(fake_quantize_ste(x, scale[:, None], None, -8, 7), expected)


def test_the_input_is_not_written_to():
    x = some(10)
    before = x.clone()
    fake_quantize_ste(x, torch.tensor(0.1), torch.tensor(1.0), 0, 7)
    lsq_quantize(x, torch.tensor(0.1), 0, 7, 1.0)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_channels_last_stay_what_they_are(dtype):
    x = some(2, 3, 4, 4).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    for y in (
        fake_quantize_ste(x, torch.tensor(0.1), torch.tensor(3.0), 0, 15),
        lsq_quantize(x, torch.tensor(0.1, requires_grad=True), -8, 7, 0.1),
    ):
        assert y.dtype is dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        assert gradient.dtype is dtype


@given(
    st.floats(-1e4, 1e4, width=32),
    st.floats(0, 1e4, width=32),
    st.sampled_from(MODES),
    st.integers(2, 16),
)
@settings(max_examples=60, deadline=None)
def test_grids_are_those_of_affine_and_hold_zero(lo, width, mode, bits):
    lo, hi = torch.tensor(lo), torch.tensor(lo + width)
    scale, zero_point = linear_grid(lo, hi, bits, mode)
    expected_scale, expected_zero = affine.scale_and_zero_point(lo, hi, bits, mode)
    assert torch.equal(scale, expected_scale)
    assert int(0 if zero_point is None else zero_point) == int(expected_zero)
    qmin, qmax = affine.quantized_range(bits, mode)
    assert float(fake_quantize_ste(torch.tensor([0.0]), scale, zero_point, qmin, qmax)) == 0


# --- LSQ: the paper's pseudo-code (appendix), written down again with plain autograd ---


def grad_scale(x, scale):
    return (x - x * scale).detach() + x * scale


def round_pass(x):
    return (x.round() - x).detach() + x


def paper(v, s, q_n, q_p, factor):
    s = grad_scale(s, factor)
    v = torch.clamp(v / s, -q_n, q_p)
    return round_pass(v) * s


@pytest.mark.parametrize("q_n, q_p", [(8, 7), (0, 15), (2, 1), (128, 127)])
@pytest.mark.parametrize("sharing", ["tensor", "channel"])
def test_lsq_is_the_papers_pseudo_code(q_n, q_p, sharing):
    v = some(5, 40, seed=q_p).double().requires_grad_()
    step = torch.rand(5, 1, dtype=torch.float64) * 0.3 + 0.05 if sharing == "channel" else torch.tensor(0.13)
    step = step.double().requires_grad_()
    upstream = some(5, 40, seed=9).double()
    reference = paper(v, step, q_n, q_p, 0.07)
    own = lsq_quantize(v, step, -q_n, q_p, 0.07)
    assert torch.allclose(own, reference, atol=1e-12)
    for mine, theirs in zip(
        torch.autograd.grad(own, (v, step), upstream),
        torch.autograd.grad(reference, (v, step), upstream),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def test_lsq_gradients_in_float32_and_channels_last_agree_with_float64():
    x = some(4, 3, 6, 6, factor=2)
    upstream = some(4, 3, 6, 6, seed=2)
    gradients = []
    for dtype, layout in ((torch.float32, torch.contiguous_format), (torch.float32, torch.channels_last),
                          (torch.float64, torch.contiguous_format)):  # fmt: skip
        v = x.to(dtype).to(memory_format=layout).requires_grad_()
        step = torch.tensor(0.25, dtype=dtype, requires_grad=True)  # exact: no tie falls on another side
        y = lsq_quantize(v, step, 0, 15, 1.0)
        gradients.append(torch.autograd.grad(y, step, upstream.to(dtype))[0].double())
    assert torch.allclose(gradients[0], gradients[2], rtol=1e-5)
    assert torch.allclose(gradients[1], gradients[2], rtol=1e-5)


def test_lsq_gradient_of_the_step_by_region():
    # closed form (equation 3): qmin below, qmax above, round(v/s) - v/s between
    v = torch.tensor([-3.0, 0.3, 9.0])
    step = torch.tensor(1.0, requires_grad=True)
    for index, expected in ((0, -2.0), (1, -0.3), (2, 1.0)):
        y = lsq_quantize(v[index : index + 1], step, -2, 1, 1.0)
        (gradient,) = torch.autograd.grad(y.sum(), step)
        assert float(gradient) == pytest.approx(expected)


def test_a_step_that_crossed_zero_counts_by_its_absolute_value():
    v = some(30)
    positive, negative = torch.tensor(0.2, requires_grad=True), torch.tensor(-0.2, requires_grad=True)
    results = [lsq_quantize(v, step, -8, 7, 1.0) for step in (positive, negative)]
    assert torch.equal(*results)
    a, b = (
        torch.autograd.grad(y.square().sum(), s)[0]
        for y, s in zip(results, (positive, negative), strict=True)
    )
    assert torch.equal(a, -b)
    assert torch.isfinite(lsq_quantize(v, torch.tensor(0.0, requires_grad=True), -8, 7, 1.0)).all()


def test_lsq_only_the_step_or_only_the_input_may_need_gradients():
    v, step = some(30), torch.tensor(0.2, requires_grad=True)
    lsq_quantize(v, step, -8, 7, 1.0).sum().backward()
    assert step.grad is not None
    w = v.clone().requires_grad_()
    lsq_quantize(w, step.detach(), -8, 7, 1.0).sum().backward()
    assert w.grad is not None
    with torch.no_grad():
        assert torch.equal(lsq_quantize(v, step, -8, 7, 1.0), lsq_quantize(w, step, -8, 7, 1.0))
