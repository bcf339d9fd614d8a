"""Simulated layers against what integer hardware computes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distiller.errors import QuantizationError
from distiller.quantization.activation_quant import ActivationQuantizer, QuantSettings
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.clipping import ClipMode
from distiller.quantization.ptq_layers import (
    RangeLinearFakeQuantWrapper,
    RangeLinearQuantParamLayerWrapper,
    RangeLinearQuantWrapper,
    filters_back,
    filters_first,
)
from tests.quantization.integer_reference import assert_same_but_for_ties, convolution, integers, requantized


def limits(x: Tensor) -> dict[str, float]:
    return {"min": x.min().item(), "max": x.max().item()}


def wrapped(
    layer: Any,
    x: Tensor,
    bits: tuple[int, int] = (8, 8),
    act_mode: Mode = Mode.ASYMMETRIC_UNSIGNED,
    wts_mode: Mode = Mode.SYMMETRIC,
    per_channel: bool = False,
    half_range: bool = False,
    dynamic: bool = False,
    **kwargs,
) -> Any:
    layer = copy.deepcopy(layer).eval()
    with torch.no_grad():
        y = layer(x)
    settings = QuantSettings(bits[0], act_mode)
    source = ActivationQuantizer(settings, None if dynamic else limits(x), "input")
    output = ActivationQuantizer(
        QuantSettings(bits[0], act_mode, clip_half_range=half_range), None if dynamic else limits(y), "output"
    )
    weight = QuantSettings(bits[1], wts_mode, per_channel=per_channel)
    wrapper = RangeLinearQuantParamLayerWrapper(layer, "layer", weight, output, **{"bits_bias": 32, **kwargs})
    wrapper.connect({0: source}, {})
    return wrapper


def integer_weight(wrapper: Any) -> np.ndarray:
    """Integers of the weight with the zero point taken off, output channels first."""
    rows = filters_first(wrapper.wrapped_module.weight.detach(), wrapper.wrapped_module).double().numpy()
    scale = wrapper.weight_scale.double().numpy().reshape(-1, *[1] * (rows.ndim - 1))
    levels = rows / scale
    assert np.abs(levels - np.rint(levels)).max() < 1e-2
    zero_point = wrapper.weight_zero_point.numpy().reshape(-1, *[1] * (rows.ndim - 1))
    qmin, qmax = wrapper.wts_quant_settings.qrange
    q = np.rint(levels).astype(np.int64) + zero_point
    assert qmin <= q.min()
    assert q.max() <= qmax
    return q - zero_point


def check_against_integers(wrapper: Any, layer: Any, x: Tensor) -> None:
    """`layer` holds the bias in full precision, and says how the accumulators are computed."""
    with torch.no_grad():
        y = wrapper(x)
        x = wrapper.inputs_quant["0"](x)
    source, output = wrapper.input_grids[0], wrapper.output_quant
    assert output is not None
    q_x = integers(x, source) - int(source.zero_point)
    q_w = integer_weight(wrapper)
    scale = source.scale.double().numpy() * wrapper.weight_scale.double().numpy().reshape(
        -1
    )  # (1,) or (out,)
    is_linear = isinstance(layer, nn.Linear)
    accumulator = q_x @ q_w.T if is_linear else convolution(q_x, q_w, layer)
    scale = scale if is_linear else scale.reshape(-1, 1, 1)
    if layer.bias is not None:
        bias = layer.bias.detach().double().numpy().reshape(-1, *[1] * (0 if is_linear else 2))
        limit = 2**31
        accumulator = accumulator + np.clip(np.rint(bias / scale), -limit, limit - 1).astype(np.int64)
    limit = 2 ** (wrapper.bits_accum - 1)
    accumulator = np.clip(accumulator, -limit, limit - 1)
    expected, from_tie = requantized(accumulator, scale, output, output.settings.clip_half_range)
    assert_same_but_for_ties(integers(y, output), expected, from_tie)


LAYERS: dict[str, Callable[[], Any]] = {
    "conv": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "strided, dilated, no bias": lambda: nn.Conv2d(
        4, 6, (3, 2), stride=2, padding=(2, 1), dilation=2, bias=False
    ),
    "grouped": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "pointwise": lambda: nn.Conv2d(4, 6, 1),
}
X = torch.randn(3, 4, 7, 7, generator=torch.Generator().manual_seed(2)) + 0.4


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("wts_mode", list(Mode))
@pytest.mark.parametrize("act_mode", list(Mode))
@pytest.mark.parametrize("kind", LAYERS)
def test_convolution_computes_what_integers_do(kind, act_mode, wts_mode, per_channel) -> None:
    layer = LAYERS[kind]()
    wrapper = wrapped(layer, X, act_mode=act_mode, wts_mode=wts_mode, per_channel=per_channel)
    check_against_integers(wrapper, layer, X)


@pytest.mark.parametrize("bits", [(8, 2), (4, 4), (3, 8), (2, 2), (8, 16)])
@pytest.mark.parametrize("half_range", [False, True])
@pytest.mark.parametrize("act_mode", [Mode.SYMMETRIC, Mode.ASYMMETRIC_UNSIGNED, Mode.ASYMMETRIC_SIGNED])
def test_other_widths_and_a_fused_relu_do_too(bits, half_range, act_mode) -> None:
    layer = LAYERS["conv"]()
    check_against_integers(wrapped(layer, X, bits, act_mode, half_range=half_range), layer, X)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_linear_computes_what_integers_do(per_channel, dynamic) -> None:
    layer, x = nn.Linear(20, 7), torch.randn(5, 20)
    wrapper = wrapped(layer, x, per_channel=per_channel, dynamic=dynamic)
    check_against_integers(wrapper, layer, x)


@pytest.mark.parametrize("act_mode", list(Mode))
def test_dynamic_convolution_computes_what_integers_do(act_mode) -> None:
    layer = LAYERS["conv"]()
    wrapper = wrapped(layer, X, act_mode=act_mode, per_channel=True, dynamic=True)
    for batch in (X, 3 * X[:2]):
        check_against_integers(wrapper, layer, batch)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bits_accum", [8, 10, 12])
def test_a_narrow_accumulator_saturates(bits_accum, dynamic) -> None:
    layer = LAYERS["conv"]()
    wrapper = wrapped(layer, X, per_channel=True, dynamic=dynamic, bits_accum=bits_accum)
    check_against_integers(wrapper, layer, X)
    wide = wrapped(layer, X, per_channel=True, dynamic=dynamic)
    with torch.no_grad():
        assert not torch.equal(wrapper(X), wide(X))


def test_a_wide_accumulator_costs_no_clamping() -> None:
    wrapper = wrapped(LAYERS["conv"](), X)
    values = torch.randn(3)
    assert wrapper.saturated(values, 2.0**31 - 1) is values
    assert wrapper._largest_sum() < 2**31


def test_bound_of_the_accumulator_holds() -> None:
    layer = LAYERS["grouped"]()
    wrapper = wrapped(layer, X, per_channel=True)
    largest_input = (wrapper.input_grids[0].largest_level * wrapper.input_grids[0].scale) * torch.sign(
        wrapper.wrapped_module.weight.detach()
    )
    weight = wrapper.wrapped_module.weight.detach()
    worst = (weight * largest_input).flatten(1).sum(1) + wrapper.wrapped_module.bias.detach().abs()
    assert wrapper._largest_sum() == pytest.approx(
        (worst / wrapper.accum_scale().flatten()).max().item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv1d(3, 4, 3), torch.randn(2, 3, 9)),
        (nn.Conv3d(2, 3, 2), torch.randn(2, 2, 4, 4, 4)),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), torch.randn(2, 4, 5)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), torch.randn(2, 4, 5, 5)),
        (nn.ConvTranspose3d(2, 3, 2), torch.randn(1, 2, 3, 3, 3)),
        (nn.Conv2d(3, 4, 3), torch.randn(3, 6, 6)),  # unbatched
        (nn.Linear(4, 3), torch.randn(2, 5, 4)),  # (batch, tokens, features)
    ],
)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_kind_of_layer_at_many_bits_stays_close_to_floating_point(
    layer, x, per_channel, dynamic
) -> None:
    wrapper = wrapped(layer, x, (14, 14), per_channel=per_channel, dynamic=dynamic, bits_accum=32)
    with torch.no_grad():
        torch.testing.assert_close(wrapper(x), layer(x), atol=2e-3, rtol=0)


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


def test_weight_is_rounded_once_and_bias_to_the_accumulators_grid() -> None:
    layer = LAYERS["conv"]()
    wrapper = wrapped(layer, X, bits=(8, 4))
    scale = wrapper.weight_scale
    assert scale.item() == pytest.approx(layer.weight.abs().max().item() / 7.5)
    expected = torch.fake_quantize_per_tensor_affine(layer.weight.detach(), scale, torch.tensor(0), -8, 7)
    assert torch.equal(wrapper.wrapped_module.weight, expected)
    units = (wrapper.wrapped_module.bias.detach() / (wrapper.input_grids[0].scale * scale)).double()
    torch.testing.assert_close(units, units.round(), atol=1e-2, rtol=0)
    assert wrapper.has_fixed_bias


def test_narrow_bias_saturates_at_the_accumulators_scale() -> None:
    layer = LAYERS["conv"]()
    nn.init.constant_(layer.bias, 100.0)
    wrapper = wrapped(layer, X, bits_bias=8)
    expected = 127 * (wrapper.input_grids[0].scale * wrapper.weight_scale)
    torch.testing.assert_close(wrapper.wrapped_module.bias.detach(), expected.expand(6))


def test_bias_without_bits_stays() -> None:
    layer = LAYERS["conv"]()
    wrapper = wrapped(layer, X, bits_bias=None)
    assert torch.equal(wrapper.wrapped_module.bias, layer.bias)
    assert not wrapper.has_fixed_bias


def test_weights_only_leaves_activations_and_bias() -> None:
    layer = LAYERS["conv"]()
    weight = QuantSettings(4, Mode.SYMMETRIC, per_channel=True)
    twin: Any = copy.deepcopy(layer).eval()
    wrapper: RangeLinearQuantWrapper = RangeLinearQuantParamLayerWrapper(twin, "layer", weight, None, 32)
    assert torch.equal(twin.bias, layer.bias)
    with torch.no_grad():
        expected = nn.functional.conv2d(X, twin.weight, layer.bias, padding=1)
        assert torch.equal(wrapper(X), expected)
    assert wrapper.output_scale is None
    assert [name for name, _ in wrapper.named_linear_quant_params()] == ["w_scale", "w_zero_point"]


def test_approximated_rescaling_changes_the_result_by_the_factors_error() -> None:
    layer = LAYERS["conv"]()
    exact, approximated = wrapped(layer, X), wrapped(layer, X, scale_approx_mult_bits=3)
    factor = (exact.accum_scale() / exact.output_quant.scale).item()
    n = np.floor(np.log2(7 / factor))
    error = np.floor(factor * 2**n) / 2**n / factor
    assert 0.75 < error < 1
    with torch.no_grad():
        x = approximated.inputs_quant["0"](X)
        expected = exact.output_quant(exact.compute(x) * error)
        torch.testing.assert_close(approximated(X), expected)
        assert not torch.equal(approximated(X), exact(X))


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


def test_scales_are_read_in_distillers_convention() -> None:
    wrapper = wrapped(LAYERS["conv"](), X, wts_mode=Mode.ASYMMETRIC_SIGNED, per_channel=True)
    params = dict(wrapper.named_linear_quant_params())
    assert list(params) == ["output_scale", "output_zero_point", "w_scale", "w_zero_point"]
    torch.testing.assert_close(params["output_scale"], 1 / wrapper.output_quant.scale)
    assert params["output_zero_point"].item() == -wrapper.output_quant.zero_point.item()
    torch.testing.assert_close(params["w_scale"], 1 / wrapper.weight_scale)
    assert torch.equal(params["w_zero_point"], -wrapper.weight_zero_point.float())
    assert params["w_scale"].shape == (6,)
    assert wrapper.output_quant_settings == QuantSettings(8, Mode.ASYMMETRIC_UNSIGNED)


def test_state_survives_a_round_trip_into_a_wrapper_of_another_weight() -> None:
    wrapper = wrapped(LAYERS["conv"](), X, per_channel=True, bits_accum=12)
    other = wrapped(LAYERS["conv"](), 5 * X, per_channel=True, bits_accum=12)
    with torch.no_grad():
        other(X)
        other.load_state_dict(wrapper.state_dict())
        assert torch.equal(other(X), wrapper(X))


def test_evaluation_only() -> None:
    wrapper = wrapped(LAYERS["conv"](), X).train()
    with pytest.raises(QuantizationError) as error:
        wrapper(X)
    assert str(error.value) == "layer: a quantized model works in evaluation mode only; call model.eval()"


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


def test_layer_that_was_called_by_keyword_is_refused() -> None:
    wrapper = wrapped(LAYERS["conv"](), X)
    with pytest.raises(QuantizationError) as error:
        wrapper.connect({}, {})
    assert str(error.value) == (
        "layer: its input was not seen; call it with a tensor as its positional argument"
    )


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
