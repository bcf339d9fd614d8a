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
    check_conflicts,
    check_keys,
    parse_accumulator_bits,
    parse_clip,
    parse_mode,
    parse_multiplier_bits,
    parse_precision,
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
        check_keys({"relu": {"input_overrides": {}}}, {"relu": {"other"}})
    assert str(error.value) == (
        "overrides['relu']: unknown key 'input_overrides'; the layers it matches take bits_activations, "
        "bits_weights, bits_bias, mode, clip_acts, clip_n_stds, clip_half_range, fpq_module, fp16, fake, "
        "make_identity, quantize_inputs"
    )


def test_a_floating_point_type_takes_the_place_of_quantization_unless_it_is_faked() -> None:
    assert overridden({"fpq_module": 16}).is_float
    assert (
        overridden({"fp16": True})
        == overridden({"fp16": True, "fpq_module": 16})
        == overridden({"fpq_module": 16})
    )
    assert not overridden({"fpq_module": 16, "fake": True}).is_float
    assert overridden({"fpq_module": "bf16", "fake": True}, bits=QBits()).is_float
    whole = LayerSettings(QBits(8, 8, 32), DEFAULT.mode, fpq_module=32)
    assert with_overrides(whole, QBits(8), {}, "other", "relu").is_float
    assert not with_overrides(whole, QBits(8), {"fpq_module": None}, "other", "relu").is_float


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"fpq_module": 16, "bits_weights": 4},
            "overrides['fc']: bits_weights: with fpq_module 16 nothing of the layer is quantized; "
            "leave one of them out, or set fake: true",
        ),
        (
            {"fp16": True, "input_overrides": {0: {"from_output": True}}},
            "overrides['fc']: input_overrides: with fpq_module 16 nothing of the layer is quantized; "
            "leave one of them out, or set fake: true",
        ),
        (
            {"fake": True, "scale_approx_mult_bits": 8},
            "overrides['fc']: scale_approx_mult_bits: with fake the layer is computed in floating point, "
            "between its quantizers; leave one of them out",
        ),
        (
            {"fake": True, "bits_bias": 16},
            "overrides['fc']: bits_bias: with fake the layer is computed in floating point, "
            "between its quantizers; leave one of them out",
        ),
    ],
)
def test_settings_that_make_one_another_meaningless_are_refused(given, text) -> None:
    with pytest.raises(QuantizationError) as error:
        check_conflicts({"conv": {}, "fc": given})
    assert str(error.value) == text


def test_settings_that_go_together_are_not() -> None:
    check_conflicts(
        {
            "a": {"fpq_module": 16, "bits_weights": None, "bits_activations": 0},
            "b": {"fpq_module": 64, "fake": True, "bits_weights": 4, "per_channel_wts": True},
            "c": {"fpq_module": None, "bits_weights": 4, "scale_approx_mult_bits": 8},
        }
    )


@pytest.mark.parametrize("value", [8, "16", "fp16", 16.0, True, [16]])
def test_other_floating_point_types_are_refused(value) -> None:
    assert [parse_precision(known, "x") for known in (None, 16, 32, 64, "bf16")] == [None, 16, 32, 64, "bf16"]
    with pytest.raises(QuantizationError) as error:
        parse_precision(value, "fpq_module")
    assert str(error.value) == f"fpq_module: must be 16, 32, 64, 'bf16' or null, got {value!r}"


def test_fp16_and_another_type_contradict_each_other() -> None:
    with pytest.raises(QuantizationError) as error:
        overridden({"fp16": True, "fpq_module": 32})
    assert str(error.value) == "conv1: fp16 and fpq_module 32 contradict each other; leave fp16 out"


def test_an_embedding_takes_no_settings_of_channels() -> None:
    assert overridden({"per_channel_wts": True, "input_overrides": {0: {}}}, "embedding") == DEFAULT
    assert overridden({"clip_acts": "NONE", "mode": "SYMMETRIC"}, "embedding").weight() == QuantSettings(
        8, Mode.SYMMETRIC
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
