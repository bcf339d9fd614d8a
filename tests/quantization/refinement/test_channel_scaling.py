"""Channels multiplied by factors, against layers fed with multiplied channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distiller.quantization.refinement.channel_scaling import ChannelMagnitudes, response_to, scaled_weight

# make, channels read, channels put out, shape of the input, features of a channel
LAYERS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3), 4, 6, (2, 4, 9), 1),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), 4, 6, (2, 4, 7, 6), 1),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), 4, 8, (2, 4, 7, 6), 1),
    "3d": (lambda: nn.Conv3d(2, 3, 2), 2, 3, (2, 2, 5, 4, 3), 1),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), 4, 6, (2, 4, 5, 4), 1),
    "linear": (lambda: nn.Linear(4, 7), 4, 7, (3, 4), 1),
    "linear behind flattening": (lambda: nn.Linear(12, 7), 4, 7, (3, 12), 3),
}


def along_channels(values: Tensor, x: Tensor, block: int) -> Tensor:
    return values.repeat_interleave(block).reshape(1, -1, *[1] * (x.dim() - 2))


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_a_scaled_weight_does_what_scaled_channels_do(kind) -> None:
    make, inputs, outputs, shape, block = LAYERS[kind]
    layer, x = make().double(), torch.randn(shape).double()
    nn.init.zeros_(layer.bias)
    into, out = torch.rand(inputs).double() + 0.5, torch.rand(outputs).double() + 0.5
    expected = layer(x * along_channels(into, x, block))
    expected = expected * along_channels(out, expected, 1)
    layer.weight.copy_(scaled_weight(layer.weight, layer, out, into, block))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_ranges_are_those_of_the_scaled_weight(kind) -> None:
    make, inputs, outputs, _, block = LAYERS[kind]
    layer = make()
    magnitudes = ChannelMagnitudes(layer.weight, layer, block)
    magnitudes.input_factors = torch.rand(inputs).double() + 0.5
    magnitudes.output_factors = torch.rand(outputs).double() + 0.5
    layer.weight.copy_(
        scaled_weight(layer.weight, layer, magnitudes.output_factors, magnitudes.input_factors, block)
    )
    now = ChannelMagnitudes(layer.weight, layer, block)
    torch.testing.assert_close(magnitudes.output_ranges(), now.output_ranges(), rtol=1e-5, atol=0)
    torch.testing.assert_close(magnitudes.input_ranges(), now.input_ranges(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_a_channel_without_weights_has_range_zero(kind) -> None:
    """The range of one channel is the largest response to anything in it alone."""
    make, inputs, outputs, _, block = LAYERS[kind]
    layer = make()
    silent = torch.ones(outputs).double()
    silent[1] = 0
    deaf = torch.ones(inputs).double()
    deaf[0] = 0
    layer.weight.copy_(scaled_weight(layer.weight, layer, silent, deaf, block))
    magnitudes = ChannelMagnitudes(layer.weight, layer, block)
    assert (magnitudes.output_ranges() == 0).nonzero().flatten().tolist()[-1] == 1
    assert (magnitudes.input_ranges() == 0).nonzero().flatten().tolist() == [0]
    assert magnitudes.output_ranges().max() == layer.weight.abs().max()


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if "transposed" not in kind])
@torch.no_grad()
def test_the_response_is_that_to_constant_channels(kind) -> None:
    make, inputs, outputs, shape, block = LAYERS[kind]
    layer, shift = make(), torch.randn(inputs)
    nn.init.zeros_(layer.bias)
    x = along_channels(shift, torch.zeros(shape), block).expand(shape)
    expected = layer(x).transpose(0, 1).reshape(outputs, -1)[:, 0]
    torch.testing.assert_close(response_to(shift, layer.weight, layer, block).float(), expected)
