"""Weights that are rounded once, and again when asked."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from distiller.errors import QuantizationError
from distiller.quantization.activation_quant import QuantSettings
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.clipping import ClipMode
from distiller.quantization.ptq_layers import (
    RangeLinearQuantParamLayerWrapper,
)
from distiller.quantization.ptq_weights import filters_back, filters_first
from tests.quantization.wrapped_layers import (
    LAYERS,
    X,
    check_against_integers,
    wrapped,
)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_scales_per_channel_of_a_transposed_convolution_are_those_of_its_outputs(groups) -> None:
    layer = nn.ConvTranspose2d(4, 8, 2, groups=groups, bias=False)
    weight = layer.weight.detach()
    rows = filters_first(weight, layer)
    assert rows.shape == (8, 4 // groups, 2, 2)
    assert torch.equal(filters_back(rows, layer), weight)
    # an output channel that is scaled scales its row and no other
    with torch.no_grad():
        out = layer(torch.ones(1, 4, 1, 1))
    torch.testing.assert_close(rows.sum(1), out[0])


@pytest.mark.parametrize("clip", [ClipMode.AVG, ClipMode.N_STD, ClipMode.GAUSS, ClipMode.LAPLACE])
def test_weights_can_be_clipped(clip) -> None:
    layer = LAYERS["conv"]().eval()
    weight = layer.weight.detach().clone()
    settings = QuantSettings(3, Mode.SYMMETRIC, clip, clip_n_stds=1.0)
    wrapper = RangeLinearQuantParamLayerWrapper(layer, "layer", settings, None)
    largest = {
        ClipMode.AVG: max(-weight.flatten(1).amin(1).mean(), weight.flatten(1).amax(1).mean()),
        ClipMode.N_STD: weight.mean().abs() + weight.std(correction=0),
        ClipMode.GAUSS: weight.mean().abs() + 2.15 * weight.std(correction=0),
        ClipMode.LAPLACE: weight.mean().abs() + 3.89 * (weight - weight.mean()).abs().mean(),
    }[clip]
    assert wrapper.weight_scale.item() == pytest.approx(largest.item() / 3.5, rel=1e-5)


def test_kept_weights_can_be_quantized_again() -> None:
    layer = LAYERS["conv"]()
    wrapper = wrapped(layer, X, bits=(8, 2), save_fp_weights=True)
    assert torch.equal(wrapper.wrapped_module.float_weight, layer.weight)
    before = wrapper.wrapped_module.weight.detach().clone()
    wrapper.quantize_weight()
    assert torch.equal(wrapper.wrapped_module.weight, before)
    wrapper.wrapped_module.float_weight.mul_(2)
    wrapper.quantize_weight()
    torch.testing.assert_close(wrapper.wrapped_module.weight.detach(), 2 * before)
    check_against_integers(wrapper, layer, X)


def test_parameters_are_new_ones_for_the_sake_of_others_that_share_them() -> None:
    layer = LAYERS["conv"]().eval()
    shared = layer.weight
    before = shared.detach().clone()
    RangeLinearQuantParamLayerWrapper(layer, "layer", QuantSettings(2, Mode.SYMMETRIC), None)
    assert torch.equal(shared, before)
    assert layer.weight is not shared


def test_weight_that_is_not_finite_is_refused() -> None:
    layer = LAYERS["conv"]()
    nn.init.constant_(layer.weight, float("inf"))
    with pytest.raises(QuantizationError) as error:
        RangeLinearQuantParamLayerWrapper(layer, "conv1", QuantSettings(8, Mode.SYMMETRIC), None)
    assert str(error.value) == (
        "conv1 weight: quantization range: must be finite with min <= max, got [inf, inf]"
    )


def test_parametrized_weight_is_refused() -> None:
    layer = nn.utils.parametrizations.weight_norm(LAYERS["conv"]())
    with pytest.raises(QuantizationError) as error:
        RangeLinearQuantParamLayerWrapper(layer, "conv1", QuantSettings(8, Mode.SYMMETRIC), None)
    assert str(error.value) == (
        "conv1: its parameters are parametrized and cannot be replaced; "
        "call torch.nn.utils.parametrize.remove_parametrizations first"
    )


def kept(per_channel: bool = False, **kwargs: Any) -> Any:
    return wrapped(LAYERS["conv"](), X, bits=(8, 4), save_fp_weights=True, per_channel=per_channel, **kwargs)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_are_rounded_as_torchs_kernels_round(mode, bits, per_channel) -> None:
    layer: Any = nn.Conv2d(3, 5, 3)
    full = layer.weight.detach().clone()
    settings = QuantSettings(bits, mode, per_channel=per_channel)
    wrapper = RangeLinearQuantParamLayerWrapper(layer, "layer", settings, None)
    grid = (wrapper.weight_scale, wrapper.weight_zero_point)
    if per_channel:
        expected = torch.fake_quantize_per_channel_affine(full, *grid, 0, *settings.qrange)
    else:
        expected = torch.fake_quantize_per_tensor_affine(full, *grid, *settings.qrange)
    assert torch.equal(layer.weight, expected)


@pytest.mark.parametrize("per_channel", [False, True])
def test_another_grid_rounds_the_full_precision_weight_and_the_bias_anew(per_channel) -> None:
    wrapper = kept(per_channel)
    full = wrapper.wrapped_module.float_weight.clone()
    scale = wrapper.weight_scale * 0.7
    wrapper.set_weight_grid(scale, wrapper.weight_zero_point)
    steps = scale.reshape(-1, 1, 1, 1) if per_channel else scale
    expected = (full / steps).round().clamp(-8, 7) * steps
    torch.testing.assert_close(wrapper.wrapped_module.weight.detach(), expected)
    units = wrapper.wrapped_module.bias.detach() / (wrapper.input_grids[0].scale * scale)
    torch.testing.assert_close(units, units.round(), atol=1e-2, rtol=0)
    assert torch.equal(wrapper.wrapped_module.float_weight, full)
    torch.testing.assert_close(wrapper.w_scale, 1 / scale)


def test_a_grid_set_to_and_fro_leaves_no_trace() -> None:
    wrapper = kept(True)
    before = copy.deepcopy(wrapper.state_dict())
    scale, zero_point = wrapper.weight_scale, wrapper.weight_zero_point
    wrapper.set_weight_grid(scale * 3, zero_point)
    wrapper.set_weight_grid(scale, zero_point)
    assert all(torch.equal(value, before[key]) for key, value in wrapper.state_dict().items())


def test_a_weight_without_a_full_precision_copy_cannot_be_rounded_to_another_grid() -> None:
    wrapper = wrapped(LAYERS["conv"](), X)
    assert not wrapper.has_float_weight
    with pytest.raises(QuantizationError) as error:
        wrapper.set_weight_grid(wrapper.weight_scale, wrapper.weight_zero_point)
    assert str(error.value) == (
        "layer: its weight cannot be rounded to another grid, the full-precision one was not kept; "
        "set save_fp_weights"
    )


@pytest.mark.parametrize(
    ("scale", "zero_point", "text"),
    [
        (0.0, 0, "layer weight: scale: must be a finite number > 0, got 0.0"),
        (float("nan"), 0, "layer weight: scale: must be a finite number > 0, got nan"),
        (
            1.0,
            1,
            "layer weight: zero point: must be an integer from 0 to 0 (4 bits, SYMMETRIC), got 1.0",
        ),
    ],
)
def test_impossible_grids_are_refused(scale, zero_point, text) -> None:
    with pytest.raises(QuantizationError) as error:
        kept().set_weight_grid(torch.tensor(scale), torch.tensor(float(zero_point)))
    assert str(error.value) == text
