"""WRPN against what Distiller's code computed, in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from distiller.errors import QuantizationError
from distiller.quantization import affine
from distiller.quantization.affine import LinearQuantMode
from distiller.quantization.training.dorefa import ClippedLinearQuantization
from distiller.quantization.training.wrpn import WRPNQuantizer, WrpnWeightQuantizer, wrpn_quantize_weight
from tests.quantization.training.low_bit_networks import gradients, low_bit_net

BITS = [2, 3, 4, 5, 6, 7, 8]


def weights(count: int = 900) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(4)) * 0.6


@pytest.mark.parametrize("bits", BITS)
def test_weights_within_the_clip_are_on_distillers_steps(bits):
    weight = weights()
    weight = weight[weight.abs() < 1]
    n = (2**bits - 1) / 2
    expected = np.round(n * weight.double().numpy()) / n
    assert wrpn_quantize_weight(weight, bits).numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_weights_beyond_the_clip_have_the_ends_of_b_bits(bits):
    """Distiller made 2^(b-1) of 1 and more, which b bits do not have."""
    n = (2**bits - 1) / 2
    top, bottom = (wrpn_quantize_weight(torch.tensor([1.0, 3.0, -1.001, -3.0]), bits) * n).unflatten(
        0, (2, 2)
    )
    assert top.tolist() == pytest.approx([2 ** (bits - 1) - 1] * 2)
    assert bottom.tolist() == pytest.approx([-(2 ** (bits - 1))] * 2)
    assert wrpn_quantize_weight(weights() * 5, bits).unique().numel() <= 2**bits


def test_two_bits_by_hand():
    weight = torch.tensor([-2.0, -1.0, -0.9, -0.4, -0.3, 0.0, 0.3, 0.4, 0.9, 1.0])
    expected = [-2, -2, -1, -1, 0, 0, 0, 1, 1, 1]  # n = 3/2: -1.35 is nearer to -1 than to -2
    assert (wrpn_quantize_weight(weight, 2) * 1.5).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("bits", BITS)
def test_grid_is_the_symmetric_one_of_minus_one_to_one(bits):
    weight = weights()
    grid = WrpnWeightQuantizer(bits).weight_grid(weight)
    scale, zero_point = affine.scale_and_zero_point(
        torch.tensor(-1.0), torch.tensor(1.0), bits, LinearQuantMode.SYMMETRIC
    )
    assert (grid.scale, grid.zero_point) == (scale, zero_point)
    expected = affine.fake_quantize(weight, scale, zero_point, grid.qmin, grid.qmax)
    assert torch.equal(WrpnWeightQuantizer(bits)(weight), expected)


def test_gradient_passes_within_the_clip():
    weight = torch.tensor([-1.5, -1.001, -0.999, -0.1, 0.0, 0.4, 0.999, 1.001, 4.0])
    found = gradients(lambda w: wrpn_quantize_weight(w, 4), weight, weights=torch.arange(1.0, 10.0))[0]
    assert found.tolist() == [0, 0, 3, 4, 5, 6, 7, 0, 0]


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_types_and_memory_formats_are_kept(dtype):
    weight = weights(144).reshape(4, 4, 3, 3).to(dtype, memory_format=torch.channels_last)
    quantized = wrpn_quantize_weight(weight, 4)
    assert quantized.dtype == dtype
    assert quantized.is_contiguous(memory_format=torch.channels_last)


def test_activations_are_clipped_at_one():
    model = low_bit_net()
    WRPNQuantizer(model, bits_activations=1, bits_weights=4).prepare_model()
    assert isinstance(model.relu1, ClippedLinearQuantization)
    assert model.relu1(torch.tensor([-1.0, 0.4, 0.6, 3.0])).tolist() == [0, 0, 1, 1]
    original = model.conv2.parametrizations.weight.original
    assert torch.equal(model.conv2.weight, wrpn_quantize_weight(original, 4))


def test_one_bit_for_weights_is_refused():
    """Distiller made all of them 0."""
    with pytest.raises(QuantizationError) as refused:
        WRPNQuantizer(low_bit_net(), bits_weights=1)
    assert str(refused.value) == (
        "bits_weights: must be 2 to 16 bits, or 0, 32 or null for full precision, got 1"
    )


@pytest.mark.parametrize("bits", BITS)
def test_small_weights_become_zero(bits):
    bound = 1 / (2**bits - 1)
    weight = torch.tensor([bound * 0.999, -bound * 0.999, bound * 1.001, -bound * 1.001])
    assert (wrpn_quantize_weight(weight, bits) != 0).tolist() == [False, False, True, True]
