"""Settings of single layers, and what is wrong with them."""

from __future__ import annotations

import pytest

from distiller.errors import QuantizationError
from distiller.quantization.activation_quant import QuantSettings
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.clipping import ClipMode
from distiller.quantization.ptq_settings import (
    LayerSettings,
    ModePair,
    check_keys,
    parse_accumulator_bits,
    parse_clip,
    parse_mode,
    parse_multiplier_bits,
    with_overrides,
)
from distiller.quantization.quantizer import QBits

DEFAULT = LayerSettings(QBits(8, 8, 32), ModePair(Mode.ASYMMETRIC_UNSIGNED, Mode.SYMMETRIC), ClipMode.AVG)


def overridden(overrides: dict, kind: str = "param", bits: QBits = DEFAULT.bits) -> LayerSettings:
    return with_overrides(DEFAULT, bits, overrides, kind, "conv1")


def test_without_overrides_the_defaults_hold() -> None:
    assert overridden({}) == DEFAULT
    assert DEFAULT.output() == QuantSettings(8, Mode.ASYMMETRIC_UNSIGNED, ClipMode.AVG)
    assert DEFAULT.weight() == QuantSettings(8, Mode.SYMMETRIC)


def test_overrides_change_what_they_name() -> None:
    settings = overridden(
        {
            "mode": {"activations": "SYMMETRIC", "weights": "asymmetric_signed"},
            "clip_acts": "N_STD",
            "clip_n_stds": 2,
            "per_channel_wts": True,
            "clip_half_range": True,
            "scale_approx_mult_bits": 8,
        },
        bits=QBits(6, 4, 16),
    )
    assert settings.output() == QuantSettings(6, Mode.SYMMETRIC, ClipMode.N_STD, 2, clip_half_range=True)
    assert settings.input() == QuantSettings(6, Mode.SYMMETRIC, ClipMode.N_STD, 2)
    assert settings.weight() == QuantSettings(4, Mode.ASYMMETRIC_SIGNED, per_channel=True)
    assert settings.scale_approx_mult_bits == 8


def test_weights_are_clipped_like_activations_when_asked() -> None:
    settings = LayerSettings(
        QBits(8, 4), DEFAULT.mode, ClipMode.N_STD, 2.0, clip_half_range=True, also_clip_weights=True
    )
    assert settings.weight() == QuantSettings(4, Mode.SYMMETRIC, ClipMode.N_STD, 2.0)


def test_keys_for_other_kinds_of_layers_are_passed_over() -> None:
    assert overridden({"per_channel_wts": True}, "elementwise") == DEFAULT


def test_input_overrides_start_from_the_layers_own_settings() -> None:
    settings = overridden(
        {
            "clip_half_range": True,
            "input_overrides": {0: {"bits_activations": 4, "clip_acts": "NONE"}, 1: {"from_output": True}},
        }
    )
    assert settings.input_overrides == {0: QuantSettings(4, Mode.ASYMMETRIC_UNSIGNED, ClipMode.NONE), 1: None}


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            {"mode": "SYMETRIC"},
            "conv1: mode: must be one of SYMMETRIC, SYMMETRIC_RESTRICTED, ASYMMETRIC_UNSIGNED, "
            "ASYMMETRIC_SIGNED, got 'SYMETRIC'; did you mean 'SYMMETRIC'?",
        ),
        (
            {"mode": {"activations": "SYMMETRIC"}},
            "conv1: mode: needs the keys activations and weights, got ['activations']",
        ),
        ({"clip_acts": None}, "conv1: clip_acts: must be one of NONE, AVG, N_STD, GAUSS, LAPLACE, got None"),
        ({"clip_n_stds": "two"}, "conv1: clip_n_stds: must be a number, got 'two'"),
        (
            {"clip_acts": "N_STD"},
            "conv1: clip mode N_STD needs clip_n_stds, a number of standard deviations > 0, got None",
        ),
        ({"per_channel_wts": 1}, "conv1: per_channel_wts: must be true or false, got 1"),
        (
            {"scale_approx_mult_bits": 0},
            "conv1: scale_approx_mult_bits: must be 1 to 31 bits, or null, got 0",
        ),
        (
            {"input_overrides": [1]},
            "conv1: input_overrides: must map indices of inputs, from 0, to settings, got [1]",
        ),
        (
            {"input_overrides": {0: {"bits": 4}}},
            "conv1: input_overrides[0]: unknown key 'bits'; give from_output: true or some of "
            "bits_activations, mode, clip_acts, clip_n_stds",
        ),
        (
            {"input_overrides": {1: {"bits_activations": None}}},
            "conv1: input_overrides[1]: bits_activations: the input of a quantized layer must be quantized",
        ),
        (
            {"input_overrides": {1: {"bits_activations": 1}}},
            "conv1: input_overrides[1]: bits_activations: must be 2 to 16 bits, or 0 or null for none, got 1",
        ),
    ],
)
def test_wrong_values_are_refused(overrides, text) -> None:
    with pytest.raises(QuantizationError) as error:
        overridden(overrides)
    assert str(error.value) == text


def test_unknown_keys_are_refused_with_what_the_layers_take() -> None:
    with pytest.raises(QuantizationError) as error:
        check_keys({"conv.*": {"per_chanel_wts": True}}, {"conv.*": {"param"}})
    assert str(error.value) == (
        "overrides['conv.*']: unknown key 'per_chanel_wts'; did you mean 'per_channel_wts'?"
    )
    with pytest.raises(QuantizationError) as error:
        check_keys({"relu": {"fp16": True}}, {"relu": {"other"}})
    assert str(error.value) == (
        "overrides['relu']: unknown key 'fp16'; the layers it matches take bits_activations, bits_weights, "
        "bits_bias, mode, clip_acts, clip_n_stds, clip_half_range, make_identity, quantize_inputs"
    )


def test_a_key_that_some_of_the_layers_take_is_fine() -> None:
    check_keys({".*": {"per_channel_wts": True, "bits_bias": 8}}, {".*": {"param", "other"}})


def test_modes_by_name_member_or_pair() -> None:
    both = ModePair(Mode.SYMMETRIC, Mode.SYMMETRIC)
    assert parse_mode("symmetric", "mode") == parse_mode(Mode.SYMMETRIC, "mode") == both
    assert parse_mode({"weights": "SYMMETRIC", "activations": Mode.ASYMMETRIC_SIGNED}, "mode") == ModePair(
        Mode.ASYMMETRIC_SIGNED, Mode.SYMMETRIC
    )
    assert parse_clip("n_std", "clip") is ClipMode.N_STD


@pytest.mark.parametrize("bits", [1, 65, None, 8.0, True])
def test_accumulators_have_2_to_64_bits(bits) -> None:
    assert parse_accumulator_bits(64, "bits_accum") == 64
    with pytest.raises(QuantizationError) as error:
        parse_accumulator_bits(bits, "bits_accum")
    assert str(error.value) == f"bits_accum: must be 2 to 64 bits, got {bits!r}"


def test_multipliers_have_1_to_31_bits() -> None:
    assert parse_multiplier_bits(None, "x") is None
    assert parse_multiplier_bits(31, "x") == 31
    with pytest.raises(QuantizationError, match="^x: must be 1 to 31 bits, or null, got 32$"):
        parse_multiplier_bits(32, "x")
