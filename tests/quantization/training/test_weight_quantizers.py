"""Weights against numpy, channel by channel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from distiller.errors import QuantizationError
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.training.weight_quantizers import LinearWeightQuantizer, OutputChannels


def numpy_quantized(w: np.ndarray, bits: int, mode: Mode) -> np.ndarray:
    """From the definitions of D 3.1, scale as a multiplier, in float32."""
    w = w.astype(np.float32)
    if mode.is_symmetric:
        largest = np.abs(w).max()
        n = np.float32(2 ** (bits - 1) - 1 if mode is Mode.SYMMETRIC_RESTRICTED else (2**bits - 1) / 2)
        step = largest / n
        lowest = -(2 ** (bits - 1)) + (mode is Mode.SYMMETRIC_RESTRICTED)
        return np.clip(np.round(w * (np.float32(1) / step)), lowest, 2 ** (bits - 1) - 1) * step
    lo, hi = min(w.min(), np.float32(0)), max(w.max(), np.float32(0))
    step = (hi - lo) / np.float32(2**bits - 1)
    offset = -np.round(lo / step)
    return (np.clip(np.round(w * (np.float32(1) / step)) + offset, 0, 2**bits - 1) - offset) * step


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("mode", list(Mode))
def test_weights_are_those_of_numpy_bit_for_bit(mode, bits):
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(bits)) + 0.3
    per_tensor = LinearWeightQuantizer(bits, mode)(weight)
    assert np.array_equal(per_tensor.numpy(), numpy_quantized(weight.numpy(), bits, mode))
    per_channel = LinearWeightQuantizer(bits, mode, OutputChannels())(weight)
    for own, channel in zip(per_channel, weight, strict=True):
        assert np.array_equal(own.numpy(), numpy_quantized(channel.numpy(), bits, mode))


LAYERS = [
    nn.Linear(4, 6),
    nn.Conv1d(4, 6, 3),
    nn.Conv2d(4, 6, 3, groups=2),
    nn.Conv3d(2, 4, 2),
    nn.ConvTranspose1d(4, 6, 3),
    nn.ConvTranspose2d(4, 6, 3, groups=2),
    nn.ConvTranspose3d(3, 6, 2, groups=3),
    nn.Embedding(5, 3),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_each_output_channel_has_a_grid_of_its_own(layer):
    channels = OutputChannels.of(layer)
    weight = layer.weight.detach()
    rows = channels.rows(weight)
    outputs = getattr(layer, "out_channels", getattr(layer, "out_features", weight.shape[0]))
    assert rows.shape == (outputs, weight.numel() // outputs)
    quantized = LinearWeightQuantizer(3, Mode.SYMMETRIC, channels)(weight)
    for own, row in zip(channels.rows(quantized), rows, strict=True):
        assert np.array_equal(own.numpy(), numpy_quantized(row.numpy(), 3, Mode.SYMMETRIC))
    marks = channels.spread(torch.arange(float(outputs)), weight).expand_as(weight)
    assert torch.equal(channels.rows(marks), torch.arange(float(outputs))[:, None].expand_as(rows))


def test_channels_of_a_grouped_transposed_convolution_are_those_of_its_output():
    layer = nn.ConvTranspose2d(4, 6, 1, groups=2, bias=False)
    channels = OutputChannels.of(layer)
    x = torch.randn(1, 4, 3, 3)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(channels.spread(torch.arange(6.0), layer.weight))
    assert torch.allclose(layer(x), before * torch.arange(6.0).reshape(1, 6, 1, 1), atol=1e-6)


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20),
    st.sampled_from(list(Mode)),
    st.integers(2, 8),
)
@settings(max_examples=60, deadline=None)
def test_zero_stays_zero_and_nothing_moves_further_than_a_step(values, mode, bits):
    weight = torch.tensor([0.0, *values])
    quantizer = LinearWeightQuantizer(bits, mode)
    quantized, grid = quantizer(weight), quantizer.weight_grid(weight)
    assert quantized[0] == 0
    assert bool(((quantized - weight).abs() <= grid.scale * 1.01).all())
    # what is on the grid stays where it is, up to rounding
    steps = quantized / grid.scale
    assert torch.allclose(steps, steps.round(), atol=1e-3)


def test_gradients_pass_everywhere():
    weight = torch.randn(3, 4, requires_grad=True)
    upstream = torch.randn(3, 4)
    for channels in (None, OutputChannels()):
        (gradient,) = torch.autograd.grad(
            LinearWeightQuantizer(4, Mode.SYMMETRIC, channels)(weight), weight, upstream
        )
        assert torch.equal(gradient, upstream)


def test_the_parameter_stays_the_one_of_the_optimizer():
    layer = nn.Linear(3, 2)
    weight = layer.weight
    parametrize.register_parametrization(layer, "weight", LinearWeightQuantizer(4, Mode.SYMMETRIC))
    assert layer.parametrizations.weight.original is weight
    layer.weight = torch.ones(2, 3)
    assert torch.equal(weight, torch.ones(2, 3))


def test_a_weight_that_is_not_finite_has_no_grid():
    with pytest.raises(QuantizationError, match="must be finite with min <= max"):
        LinearWeightQuantizer(4, Mode.SYMMETRIC).weight_grid(torch.tensor([float("nan"), 1.0]))


def test_it_shows_its_settings():
    assert (
        LinearWeightQuantizer(4, Mode.SYMMETRIC, OutputChannels()).extra_repr()
        == "4 bits, SYMMETRIC, per channel"
    )
