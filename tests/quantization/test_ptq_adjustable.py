"""Scales and clipping values of a whole model, as searches set them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from distiller.errors import QuantizationError, UnknownNameError
from tests.quantization.networks import ASYMMETRIC, quantized


@pytest.fixture
def model(residual, residual_stats) -> Any:
    return quantized(residual, residual_stats, mode=ASYMMETRIC, save_fp_weights=True, per_channel_wts=True)


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def test_names_are_those_of_the_layers(model) -> None:
    names = dict(model.quantizer.named_linear_quant_params())
    assert list(names)[:4] == [
        "conv1.output_scale",
        "conv1.output_zero_point",
        "conv1.w_scale",
        "conv1.w_zero_point",
    ]
    assert names["conv1.w_scale"].shape == (8,)
    assert list(names) == list(model.quantizer.linear_quant_params)
    assert "add.w_scale" not in names
    filtered = dict(model.quantizer.named_linear_quant_params(filter=True))
    assert not [name for name in filtered if "zero_point" in name]
    clipping = dict(model.quantizer.named_linear_quant_params(yield_clipping_params=True))
    assert list(clipping) == list(dict(model.quantizer.named_clipping()))
    assert list(clipping)[:3] == ["conv1.output_clip_min", "conv1.output_clip_max", "conv1.w_clipping"]
    free = dict(model.quantizer.named_clipping(filter=True))
    assert list(free)[:2] == ["conv1.output_clip_max", "conv1.w_clipping"]  # its ReLU is fused


def test_an_output_scale_takes_effect_at_once_and_reaches_the_readers(model, images) -> None:
    before, quantizer = outputs(model, images), model.quantizer
    bias = model.conv2.wrapped_module.bias.detach().clone()
    quantizer.set_linear_quant_param("conv1.output_scale", 5.0)
    assert model.conv1.output_scale.item() == pytest.approx(5.0)
    assert quantizer.linear_quant_params["conv1.output_scale"].item() == pytest.approx(5.0)
    assert not torch.equal(outputs(model, images), before)
    # the reader's bias is on the new accumulator's grid
    units = model.conv2.wrapped_module.bias.detach() / model.conv2.accum_scale().flatten()
    torch.testing.assert_close(units, units.round(), atol=1e-2, rtol=0)
    assert not torch.equal(model.conv2.wrapped_module.bias, bias)


def test_a_weights_scale_rounds_it_from_full_precision(model, residual, images) -> None:
    quantizer = model.quantizer
    quantizer.set_linear_quant_param("fc.w_scale", 40.0)
    expected = (residual.fc.weight.detach() * 40).round().clamp(-128, 127) / 40
    torch.testing.assert_close(model.fc.wrapped_module.weight.detach(), expected)
    torch.testing.assert_close(quantizer.linear_quant_params["fc.w_scale"], torch.full((5,), 40.0))
    quantizer.set_linear_quant_param("fc.w_scale", torch.arange(30.0, 35.0))
    torch.testing.assert_close(model.fc.w_scale, torch.arange(30.0, 35.0))


def test_all_values_written_back_give_the_same_model_bit_for_bit(model, images) -> None:
    before, state = outputs(model, images), copy.deepcopy(model.state_dict())
    quantizer = model.quantizer
    params = {name: value.clone() for name, value in quantizer.named_linear_quant_params()}
    for name in ("conv1.output_scale", "left.w_scale", "fc.output_scale", "pool.output_scale"):
        quantizer.set_linear_quant_param(name, params[name] * 1.7)
    assert not torch.equal(outputs(model, images), before)
    quantizer.update_linear_quant_params(params)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        outputs(model, images), before, rtol=0, atol=model.fc.output_quant.scale.item() * 1.01
    )


def test_clipping_values_are_ends_of_ranges(model) -> None:
    quantizer = model.quantizer
    quantizer.update_clipping_parameters({"module.conv1.output_clip_max": 2.55, "right.w_clipping": 0.3})
    assert model.conv1.output_scale.item() == pytest.approx(100.0)
    torch.testing.assert_close(model.right.w_scale, torch.full((4,), 127.5 / 0.3))
    quantizer.set_clipping("tanh.output_clip_min", -0.5)
    assert dict(quantizer.named_clipping())["tanh.output_clip_min"].item() == pytest.approx(-0.5, abs=0.01)


def test_a_quantized_input_is_no_value_of_the_layer(model) -> None:
    assert list(model.conv1.inputs_quant) == ["0"]
    assert not [name for name in dict(model.quantizer.named_linear_quant_params()) if "input" in name]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("conv1.output_skale", "'conv1.output_skale': no such value of a quantized layer; did you mean "),
        ("conv9.output_scale", "'conv9.output_scale': no such value of a quantized layer; did you mean "),
        ("xyz", "'xyz': no such value of a quantized layer; see named_linear_quant_params()"),
    ],
)
def test_unknown_names_change_nothing(model, images, name, text) -> None:
    before = outputs(model, images)
    with pytest.raises(UnknownNameError) as error:
        model.quantizer.update_linear_quant_params({"conv1.output_scale": 5.0, name: 1.0})
    assert str(error.value).startswith(text)
    assert torch.equal(outputs(model, images), before)


def test_an_impossible_value_is_refused_and_told_whose(model) -> None:
    with pytest.raises(QuantizationError, match="^conv2 weight: scale: must be a number > 0, got -1.0$"):
        model.quantizer.set_linear_quant_param("conv2.w_scale", -1.0)


def test_without_full_precision_copies_outputs_can_be_set_and_weights_not(
    residual, residual_stats, images
) -> None:
    model = quantized(residual, residual_stats, mode=ASYMMETRIC)
    before = outputs(model, images)
    model.quantizer.set_linear_quant_param("conv2.output_scale", 9.0)
    assert not torch.equal(outputs(model, images), before)
    with pytest.raises(QuantizationError, match="the full-precision one was not kept; set save_fp_weights$"):
        model.quantizer.set_linear_quant_param("conv2.w_scale", 9.0)


def test_weights_changed_from_outside_are_rounded_again_at_their_scales(model, images) -> None:
    before, quantizer = outputs(model, images), model.quantizer
    quantizer.set_linear_quant_param("fc.w_scale", 40.0)
    set_once = outputs(model, images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    quantizer.force_readjust_wrappers()
    assert torch.equal(outputs(model, images), set_once)
    quantizer.quantize_params()
    assert torch.equal(outputs(model, images), before)
    assert quantizer.linear_quant_params["fc.w_scale"][0].item() != 40.0


def test_values_that_were_set_are_saved_and_loaded(model, residual, residual_stats, images) -> None:
    model.quantizer.update_linear_quant_params({"conv1.output_scale": 7.0, "left.w_scale": 33.0})
    other = quantized(residual, residual_stats, mode=ASYMMETRIC, save_fp_weights=True, per_channel_wts=True)
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other, images), outputs(model, images))
    assert dict(other.quantizer.named_linear_quant_params())["conv1.output_scale"].item() == pytest.approx(
        7.0
    )


def test_before_preparing_there_are_none(residual) -> None:
    from distiller.quantization.post_train import PostTrainLinearQuantizer

    quantizer = PostTrainLinearQuantizer(residual, bits_activations=None)
    assert quantizer.linear_quant_params == {}
    assert list(quantizer.named_linear_quant_params()) == []
