"""Weights and biases of quantized layers set anew."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from distiller.quantization.ptq_layers import filters_first
from distiller.quantization.refinement.quantized_layer import (
    add_to_bias,
    layer_state,
    restore_layer,
    round_to_nearest,
    set_weight,
)
from tests.quantization.refinement.networks import quantized, wrappers

X = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(4))


def net(bias: bool = True) -> Any:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=bias), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, bias=bias)
    ).eval()


def is_on_grid(values: torch.Tensor, scale: torch.Tensor) -> bool:
    levels = values / scale
    return bool((levels - levels.round()).abs().max() < 1e-2)


@pytest.mark.parametrize("per_channel", [False, True])
def test_a_new_grid_rounds_weight_and_bias(per_channel) -> None:
    model = net()
    wrapper = wrappers(quantized(model, X, per_channel_wts=per_channel))["2"]
    scale = wrapper.weight_scale * 0.7
    round_to_nearest(wrapper, model[2].weight, scale, wrapper.weight_zero_point)
    rows = filters_first(wrapper.wrapped_module.weight.detach(), wrapper.wrapped_module).flatten(1)
    assert torch.equal(wrapper.weight_scale, scale)
    assert is_on_grid(rows, scale.reshape(-1, 1))
    expected = filters_first(model[2].weight.detach(), model[2]).flatten(1)
    inside = expected.abs() <= 7 * scale.reshape(-1, 1)
    assert ((rows - expected).abs() <= scale.reshape(-1, 1) / 2 + 1e-6)[inside].all()
    assert is_on_grid(wrapper.wrapped_module.bias.detach(), wrapper.accum_scale().flatten())
    assert isinstance(wrapper.wrapped_module.weight, nn.Parameter)
    assert isinstance(wrapper.wrapped_module.bias, nn.Parameter)


def test_a_correction_is_added_and_rounded_to_the_accumulators_grid() -> None:
    wrapper = wrappers(quantized(net(), X))["0"]
    before = wrapper.wrapped_module.bias.detach().clone()
    correction = torch.tensor([0.1, -0.2, 0.3, 0.0])
    add_to_bias(wrapper, correction.double())
    bias, step = wrapper.wrapped_module.bias.detach(), wrapper.accum_scale().item()
    assert is_on_grid(bias, torch.tensor(step))
    assert (bias - before - correction).abs().max() <= step / 2 + 1e-6
    assert bias.dtype == torch.float32


def test_a_layer_without_bias_gets_one() -> None:
    wrapper = wrappers(quantized(net(bias=False), X, save_fp_weights=True))["0"]
    correction = torch.tensor([0.1, -0.2, 0.3, 0.0])
    add_to_bias(wrapper, correction)
    step = wrapper.accum_scale().item()
    assert (wrapper.wrapped_module.bias - correction).abs().max() <= step / 2 + 1e-6
    assert torch.equal(wrapper.wrapped_module.float_bias, correction)


@pytest.mark.parametrize(
    "settings", [{"dynamic": True}, {"save_fp_weights": True}, {"bits_activations": None}]
)
def test_a_correction_reaches_the_output_however_the_bias_is_kept(settings) -> None:
    model = net()
    q = quantized(model, X, **settings)
    plain, wrapper = copy.deepcopy(q), wrappers(q)["2"]
    add_to_bias(wrapper, torch.tensor([0.5, -0.25]))
    with torch.no_grad():
        change = (q(X) - plain(X)).mean((0, 2, 3))
    torch.testing.assert_close(change, torch.tensor([0.5, -0.25]), atol=0.02, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_a_state_is_restored(bias) -> None:
    q = quantized(net(bias), X, save_fp_weights=True)
    wrapper = wrappers(q)["0"]
    before, state = {key: value.clone() for key, value in q.state_dict().items()}, layer_state(wrapper)
    set_weight(wrapper, torch.zeros(4, 3, 3, 3), torch.tensor(3.0), torch.tensor(0))
    if bias:
        add_to_bias(wrapper, torch.ones(4))
    assert wrapper.weight_scale.item() == 3
    restore_layer(wrapper, state)
    assert all(torch.equal(before[key], value) for key, value in q.state_dict().items())
    assert set(before) == set(q.state_dict())
