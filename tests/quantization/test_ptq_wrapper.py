"""Any layer between quantizers: what all have in common."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distiller.errors import QuantizationError, UnknownNameError
from distiller.quantization.activation_quant import ActivationQuantizer, QuantSettings
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.ptq_layers import (
    RangeLinearFakeQuantWrapper,
    RangeLinearQuantParamLayerWrapper,
)
from tests.quantization.wrapped_layers import (
    LAYERS,
    X,
    limits,
    wrapped,
)


def test_evaluation_only() -> None:
    wrapper = wrapped(LAYERS["conv"](), X).train()
    with pytest.raises(QuantizationError) as error:
        wrapper(X)
    assert str(error.value) == "layer: a quantized model works in evaluation mode only; call model.eval()"


@pytest.mark.parametrize("quantize_inputs", [False, True])
def test_any_other_module_is_computed_in_floating_point_between_quantizers(quantize_inputs) -> None:
    output = ActivationQuantizer(QuantSettings(4, Mode.SYMMETRIC), {"min": -1.0, "max": 1.0}, "output")
    wrapper = RangeLinearFakeQuantWrapper(nn.Tanh().eval(), "tanh", output, quantize_inputs)
    assert wrapper.quantizes_inputs is quantize_inputs
    source = ActivationQuantizer(QuantSettings(4, Mode.SYMMETRIC), limits(X), "input")
    if quantize_inputs:
        wrapper.connect({0: source}, {})
    x = source(X) if quantize_inputs else X
    expected = torch.fake_quantize_per_tensor_affine(torch.tanh(x), output.scale, output.zero_point, -8, 7)
    assert torch.equal(wrapper(X), expected)


def test_inputs_quantized_elsewhere_are_taken_as_they_are() -> None:
    layer = LAYERS["conv"]()
    alone = wrapped(layer, X)
    grid = alone.inputs_quant["0"]
    following = RangeLinearQuantParamLayerWrapper(
        copy.deepcopy(layer).eval(),
        "b",
        QuantSettings(8, Mode.SYMMETRIC),
        copy.deepcopy(alone.output_quant),
        32,
    )
    following.connect({}, {0: grid})
    with torch.no_grad():
        assert torch.equal(following(grid(X)), alone(X))
    assert not any("inputs_quant" in name for name in following.state_dict())


def grid(half_range: bool = False, dynamic: bool = False, bits: int = 8) -> ActivationQuantizer:
    settings = QuantSettings(bits, Mode.ASYMMETRIC_UNSIGNED, clip_half_range=half_range)
    return ActivationQuantizer(settings, None if dynamic else limits(X), "source")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("module", [nn.MaxPool2d(3), nn.Flatten(), nn.ZeroPad2d(1)])
def test_a_module_that_selects_values_stays_on_the_grid_of_its_input(module, dynamic) -> None:
    wrapper, source = RangeLinearFakeQuantWrapper(module.eval(), "pool", None), grid(dynamic=dynamic)
    wrapper.keep_grid(source)
    x = source(X)
    scale = source.scale.clone()
    assert torch.equal(wrapper(x), module(x))
    assert torch.equal(source.scale, scale)
    assert wrapper.output_quant is source


def test_a_kept_grid_is_read_under_both_names_and_is_free_under_one() -> None:
    wrapper, source = RangeLinearFakeQuantWrapper(nn.MaxPool2d(2).eval(), "pool", None), grid()
    wrapper.keep_grid(source)
    assert torch.equal(dict(wrapper.named_linear_quant_params())["output_scale"], 1 / source.scale)
    assert list(wrapper.named_linear_quant_params(filter=True)) == []
    assert list(wrapper.named_clipping(filter=True)) == []


def test_a_kept_grid_is_in_the_state_of_both() -> None:
    wrapper = RangeLinearFakeQuantWrapper(nn.MaxPool2d(2).eval(), "pool", None)
    wrapper.keep_grid(grid())
    assert list(wrapper.state_dict()) == ["output_quant.scale", "output_quant.zero_point"]


def test_names_and_values_of_the_ends_of_ranges() -> None:
    wrapper = wrapped(LAYERS["conv"](), X, per_channel=True, half_range=True, save_fp_weights=True)
    clipping = dict(wrapper.named_clipping())
    assert list(clipping) == ["output_clip_min", "output_clip_max", "w_clipping"]
    assert clipping["output_clip_min"].item() == 0
    assert list(dict(wrapper.named_clipping(filter=True))) == ["output_clip_max", "w_clipping"]
    torch.testing.assert_close(
        clipping["w_clipping"], wrapper.wrapped_module.float_weight.abs().flatten(1).amax(1)
    )
    assert list(dict(wrapper.named_linear_quant_params(filter=True))) == ["output_scale", "w_scale"]


def test_values_that_are_set_are_read_again() -> None:
    wrapper = wrapped(LAYERS["conv"](), X, save_fp_weights=True)
    changed = wrapper.set_linear_quant_params(
        {"output_scale": 20.0, "output_zero_point": -7, "w_clipping": 0.125}
    )
    assert [each.where for each in changed] == ["output", "layer weight"]
    values = {**dict(wrapper.named_linear_quant_params()), **dict(wrapper.named_clipping())}
    assert values["output_scale"].item() == pytest.approx(20.0)
    assert values["output_zero_point"].item() == -7
    assert values["w_clipping"].item() == pytest.approx(0.125)
    assert wrapper.wrapped_module.weight.abs().max().item() <= 0.125 * 128 / 127.5 + 1e-6


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("output_skale", "output: no value 'skale' that could be set; did you mean 'scale'?"),
        (
            "input_scale",
            "layer: no value 'input_scale' that could be set; did you mean 'output_scale'?",
        ),
        (
            "output_clipping",
            "output: no value 'clipping' that could be set; did you mean 'clip_min'?",
        ),
    ],
)
def test_values_that_there_are_not_cannot_be_set(name, text) -> None:
    wrapper = wrapped(LAYERS["conv"](), X, act_mode=Mode.ASYMMETRIC_SIGNED)
    with pytest.raises(UnknownNameError) as error:
        wrapper.set_linear_quant_params({name: 1.0})
    assert str(error.value) == text


def test_dynamic_ranges_have_no_values_to_set() -> None:
    wrapper = wrapped(LAYERS["conv"](), X, dynamic=True)
    assert list(wrapper.adjustable_grids()) == ["w"]
    with pytest.raises(UnknownNameError, match="^layer: no value 'output_scale' that could be set"):
        wrapper.set_linear_quant_params({"output_scale": 1.0})


def test_another_floating_point_type_between_quantizers() -> None:
    output = ActivationQuantizer(QuantSettings(8, Mode.SYMMETRIC), {"min": -1.0, "max": 1.0}, "output")
    wrapper = RangeLinearFakeQuantWrapper(nn.Tanh().eval(), "tanh", output, precision=torch.float16)
    assert torch.equal(wrapper(X), output(torch.tanh(X.half()).float()))
