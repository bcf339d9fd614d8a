"""The sign of activations and its gradient. The activation scale is tested in `test_binary.py`, in its layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distiller.quantization.training.binary_activations import (
    HandedOn,
    binary_sign,
    gradient_within_one,
    has_scaled_form,
    xnor_activation_scale,
)
from tests.quantization.training.low_bit_networks import gradients


def test_zero_is_plus_one():
    x = torch.tensor([-3.0, -1e-30, -0.0, 0.0, 1e-30, 2.0, float("inf"), float("-inf")])
    assert binary_sign(x).tolist() == [-1, -1, 1, 1, 1, 1, 1, -1]


def test_gradient_is_that_of_hard_tanh_with_its_ends():
    x = torch.tensor([-5.0, -1.0001, -1.0, -0.3, 0.0, 1.0, 1.0001, 9.0])
    found = gradients(binary_sign, x, weights=torch.arange(1.0, 9.0))[0]
    assert found.tolist() == [0, 0, 3, 4, 5, 6, 0, 0]


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float, torch.double])
def test_the_ends_belong_to_it_in_every_type(dtype):
    one = torch.tensor([1.0], dtype=dtype)
    step = torch.finfo(dtype).eps
    x = torch.cat([-one, one, one + 2 * step, -one - 2 * step])
    assert gradient_within_one(torch.ones_like(x), x).tolist() == [1, 1, 0, 0]


def test_no_gradient_passes_the_activation_scale():
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    assert not xnor_activation_scale(x, nn.Conv2d(2, 3, 3)).requires_grad


def test_what_hands_on_its_input_hands_on_that_very_tensor():
    x = torch.randn(3)
    assert HandedOn()(x) is x


def test_only_plain_layers_have_a_scaled_form():
    class Other(nn.Conv2d): ...

    assert has_scaled_form(nn.Conv3d(1, 1, 1))
    assert not has_scaled_form(Other(1, 1, 1))
    assert not has_scaled_form(nn.ConvTranspose1d(1, 1, 1))
