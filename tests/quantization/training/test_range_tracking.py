"""Tracked ranges against a loop in numpy, in double precision."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from distiller.errors import QuantizationError
from distiller.quantization import affine
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.training.range_tracking import FakeLinearQuantization, RangeTracker, check_decay


def batches(count: int, shape=(4, 5)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) * (1 + i) for i in range(count)]


def numpy_ema(values: list[float], decay: float) -> float:
    biased = np.float64(0)
    for step, value in enumerate(values, start=1):
        biased = decay * biased + (1 - decay) * value
        unbiased = biased / (1 - decay**step)
    return float(unbiased)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999, 0.99999])
def test_the_range_is_the_bias_corrected_average_of_numpy(decay):
    quantizer = FakeLinearQuantization(8, Mode.ASYMMETRIC_UNSIGNED, decay)
    data = batches(20)
    for count, x in enumerate(data, start=1):
        quantizer(x)
        expected = [numpy_ema([f(b).item() for b in data[:count]], decay) for f in (torch.min, torch.max)]
        assert quantizer.tracked_range.tolist() == pytest.approx(expected, rel=1e-5)
    assert quantizer.batches_tracked.item() == 20


def test_the_first_batch_counts_fully():
    quantizer = FakeLinearQuantization(8, Mode.SYMMETRIC, 0.999)
    x = batches(1)[0]
    quantizer(x)
    assert quantizer.tracked_range.tolist() == pytest.approx([x.min().item(), x.max().item()], rel=1e-6)


@pytest.mark.parametrize("mode", list(Mode))
def test_evaluation_rounds_to_the_grid_over_the_tracked_range_and_tracks_nothing(mode):
    quantizer = FakeLinearQuantization(4, mode, 0.9)
    for x in batches(3):
        quantizer(x)
    quantizer.eval()
    before = copy.deepcopy(quantizer.state_dict())
    x = batches(5)[4] * 3
    scale, zero_point = affine.scale_and_zero_point(*quantizer.tracked_range, 4, mode)
    expected = affine.fake_quantize(x, scale, zero_point, *affine.quantized_range(4, mode))
    assert torch.equal(quantizer(x), expected)
    assert all(torch.equal(before[key], value) for key, value in quantizer.state_dict().items())
    assert torch.equal(quantizer.grid.scale, scale)
    assert torch.equal(quantizer.grid.zero_point, zero_point)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("ceiling", [None, 2.0])
def test_in_the_place_of_a_relu_it_is_one(mode, ceiling):
    fused = FakeLinearQuantization(5, mode, 0.5, is_relu=True, ceiling=ceiling)
    plain = FakeLinearQuantization(5, mode, 0.5)
    for x in batches(3):
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        mine, reference = fused(a), plain(b.clamp(0, ceiling))
        assert torch.allclose(mine, reference, atol=1e-6)
        assert mine.min() == 0
        (own,) = torch.autograd.grad(mine, a, upstream)
        (theirs,) = torch.autograd.grad(reference, b, upstream)
        far = (x - fused.tracked_range[1]).abs() > fused.grid.scale  # at the very end half a step is let pass
        assert torch.equal(own[far], theirs[far])
    assert fused.grid.qmin == int(fused.grid.zero_point)


def test_the_grid_of_a_relu_is_what_it_rounds_to():
    for mode in Mode:
        fused = FakeLinearQuantization(4, mode, is_relu=True)
        x = batches(1)[0]
        fused(x)
        grid = fused.eval().grid
        expected = affine.fake_quantize(x, grid.scale, grid.zero_point, grid.qmin, grid.qmax)
        assert torch.equal(fused(x), expected)


def test_no_gradient_beyond_the_range():
    quantizer = FakeLinearQuantization(8, Mode.ASYMMETRIC_UNSIGNED)
    quantizer(torch.tensor([-1.0, 1.0]))
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5], requires_grad=True)
    quantizer.eval()(x).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_what_was_never_tracked_is_refused_in_evaluation():
    quantizer = FakeLinearQuantization(8, Mode.SYMMETRIC, where="relu1").eval()
    with pytest.raises(QuantizationError) as error:
        quantizer(torch.zeros(3))
    assert str(error.value) == (
        "relu1: has seen no training batch, the range of its values is not known; "
        "train first, or load a trained checkpoint"
    )
    with pytest.raises(QuantizationError, match="RangeTracker: has seen no training batch"):
        RangeTracker().check_tracked()


def test_state_dict_and_deepcopy_go_on_bit_for_bit():
    quantizer = FakeLinearQuantization(8, Mode.ASYMMETRIC_SIGNED)
    data = batches(4)
    quantizer(data[0])
    loaded = FakeLinearQuantization(8, Mode.ASYMMETRIC_SIGNED)
    loaded.load_state_dict(quantizer.state_dict())
    copied = copy.deepcopy(quantizer)
    loaded.eval()(data[1])  # known to be tracked
    loaded.train()
    for x in data[1:]:
        expected = quantizer(x)
        assert torch.equal(loaded(x), expected)
        assert torch.equal(copied(x), expected)


def test_a_model_in_half_precision_keeps_its_ranges_in_single():
    quantizer = FakeLinearQuantization(8, Mode.SYMMETRIC, decay := 0.999)
    data = batches(50)
    for x in data[:2]:
        quantizer(x)
    quantizer.bfloat16()
    assert quantizer.tracked_range.dtype is torch.float32
    for x in data[2:]:
        assert quantizer(x.bfloat16()).dtype is torch.bfloat16
    highest = [x.max().item() for x in data[:2]] + [x.bfloat16().max().item() for x in data[2:]]
    assert quantizer.tracked_range[1].item() == pytest.approx(numpy_ema(highest, decay), rel=1e-4)


@pytest.mark.parametrize("decay", [-0.1, 1, 1.5, "0.9", True, None])
def test_a_wrong_decay_is_refused(decay):
    with pytest.raises(QuantizationError) as error:
        check_decay(decay)
    assert str(error.value) == f"ema_decay: must be at least 0 and less than 1, got {decay!r}"


def test_it_shows_its_settings():
    shown = FakeLinearQuantization(8, Mode.SYMMETRIC, is_relu=True, ceiling=6.0).extra_repr()
    assert shown == "8 bits, SYMMETRIC, decay 0.999, of ReLU to 6"
