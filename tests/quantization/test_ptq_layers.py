"""Simulated layers against what integer hardware computes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distiller.errors import QuantizationError
from distiller.quantization.activation_quant import QuantSettings
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.ptq_layers import (
    RangeLinearEmbeddingWrapper,
    RangeLinearQuantParamLayerWrapper,
    RangeLinearQuantWrapper,
)
from tests.quantization.wrapped_layers import (
    LAYERS,
    X,
    check_against_integers,
    wrapped,
)


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


def test_layer_that_was_called_by_keyword_is_refused() -> None:
    wrapper = wrapped(LAYERS["conv"](), X)
    with pytest.raises(QuantizationError) as error:
        wrapper.connect({}, {})
    assert str(error.value) == (
        "layer: its input was not seen; call it with a tensor as its positional argument"
    )


def test_a_fake_layer_is_computed_in_floating_point_between_its_quantizers() -> None:
    layer = LAYERS["conv"]()
    wrapper = wrapped(layer, X, (8, 4), bits_accum=8, is_fake=True)
    assert torch.equal(wrapper.wrapped_module.bias, layer.bias)
    assert wrapper.accumulator_bits() is None
    with torch.no_grad():
        x = wrapper.inputs_quant["0"](X)
        accumulator = nn.functional.conv2d(x, wrapper.wrapped_module.weight, layer.bias, padding=1)
        assert torch.equal(wrapper(X), wrapper.output_quant(accumulator))


def test_a_fake_layer_is_computed_in_its_own_type() -> None:
    wrapper = wrapped(LAYERS["conv"](), X, is_fake=True, precision=torch.float64, save_fp_weights=True)
    assert {p.dtype for p in wrapper.wrapped_module.parameters()} == {torch.float64}
    assert wrapper.wrapped_module.float_weight.dtype is torch.float32
    with torch.no_grad():
        output = wrapper(X)
        accumulator = wrapper.wrapped_module(wrapper.inputs_quant["0"](X).double())
    assert output.dtype is torch.float32
    assert torch.equal(output, wrapper.output_quant(accumulator.float()))


INDICES = torch.tensor([[0, 3, 3], [5, 1, 0]])


def embedded(bits: int = 4, mode: Mode = Mode.SYMMETRIC, has_output: bool = True, **kwargs: Any) -> Any:
    layer = nn.Embedding(6, 5, padding_idx=0).eval()
    with torch.no_grad():
        layer.weight[1] += 1.5
    return RangeLinearEmbeddingWrapper(
        layer, "words", QuantSettings(bits, mode, per_channel=True), has_output, **kwargs
    )


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_embedding_returns_rows_of_its_rounded_weight(bits, mode) -> None:
    wrapper = embedded(bits, mode, save_fp_weights=True)
    full, grid = wrapper.wrapped_module.float_weight, (wrapper.weight_scale, wrapper.weight_zero_point)
    qrange = wrapper.wts_quant_settings.qrange
    expected = torch.fake_quantize_per_tensor_affine(full, *grid, *qrange)
    assert wrapper.weight_scale.shape == ()
    with torch.no_grad():
        assert torch.equal(wrapper(INDICES), expected[INDICES])
    assert torch.equal(wrapper(INDICES)[0, 0], torch.zeros(5))


@pytest.mark.parametrize("mode", list(Mode))
def test_what_an_embedding_returns_is_on_its_weights_grid(mode) -> None:
    wrapper = embedded(mode=mode)
    grid = wrapper.output_quant
    assert (grid.scale, grid.zero_point) == (wrapper.weight_scale, wrapper.weight_zero_point)
    assert grid.settings.qrange == wrapper.wts_quant_settings.qrange
    with torch.no_grad():
        plain = wrapper.wrapped_module(INDICES)
        assert torch.equal(grid(plain), plain)


def test_an_embedding_of_which_only_the_weight_is_quantized_says_nothing_of_its_output() -> None:
    wrapper = embedded(has_output=False)
    assert wrapper.output_quant is None
    assert list(dict(wrapper.named_linear_quant_params())) == ["w_scale", "w_zero_point"]


def test_the_grid_of_an_embeddings_output_follows_that_of_its_weight() -> None:
    wrapper = embedded(mode=Mode.ASYMMETRIC_UNSIGNED, save_fp_weights=True)
    assert list(dict(wrapper.named_linear_quant_params())) == ["w_scale", "w_zero_point"]
    wrapper.set_linear_quant_params({"w_clip_min": -0.25, "w_clip_max": 0.5})
    assert wrapper.output_quant.scale.item() == wrapper.weight_scale.item() == pytest.approx(0.05)
    assert wrapper.output_quant.zero_point.item() == 5
    with torch.no_grad():
        assert wrapper(INDICES).max().item() == pytest.approx(0.5)
    wrapper.quantize_weight()
    assert torch.equal(wrapper.output_quant.scale, wrapper.weight_scale)


def test_state_of_an_embedding_survives_a_round_trip() -> None:
    wrapper, other = embedded(), embedded()
    other.load_state_dict(wrapper.state_dict())
    with torch.no_grad():
        assert torch.equal(other(INDICES), wrapper(INDICES))
    assert torch.equal(other.output_quant.scale, wrapper.weight_scale)
