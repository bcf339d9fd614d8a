"""Values of grids in Distiller's convention, read and set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distiller.errors import QuantizationError, UnknownNameError
from distiller.quantization.activation_quant import ActivationQuantizer, QuantSettings
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.ptq_parameters import clipping_params, scale_params, set_params
from distiller.quantization.q_utils import (
    asymmetric_linear_quantization_params,
    symmetric_linear_quantization_params,
)


def grid(
    mode: Mode = Mode.ASYMMETRIC_UNSIGNED,
    bits: int = 8,
    lo: float = -1.0,
    hi: float = 3.0,
    half: bool = False,
) -> ActivationQuantizer:
    settings = QuantSettings(bits, mode, clip_half_range=half)
    return ActivationQuantizer(settings, {"min": lo, "max": hi}, "conv1 output")


def numbers(values: dict[str, torch.Tensor]) -> dict[str, float]:
    return {key: value.item() for key, value in values.items()}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("mode", list(Mode))
def test_scale_and_zero_point_are_those_of_distillers_functions(mode, bits) -> None:
    found = numbers(scale_params(grid(mode, bits)))
    if mode.is_symmetric:
        restricted = mode is Mode.SYMMETRIC_RESTRICTED
        scale, zero_point = symmetric_linear_quantization_params(bits, 3.0, restricted)
    else:
        signed = mode is Mode.ASYMMETRIC_SIGNED
        scale, zero_point = asymmetric_linear_quantization_params(bits, -1.0, 3.0, signed=signed)
    assert found == {"scale": pytest.approx(scale, rel=1e-6), "zero_point": zero_point}


def test_distillers_published_values() -> None:
    # symmetric, 8 bits, saturation 4: 31.875; restricted 31.75
    assert numbers(scale_params(grid(Mode.SYMMETRIC, hi=4.0)))["scale"] == pytest.approx(31.875, rel=1e-7)
    assert numbers(scale_params(grid(Mode.SYMMETRIC_RESTRICTED, hi=4.0)))["scale"] == pytest.approx(
        31.75, rel=1e-7
    )
    # conv1 of its ResNet-18: 255 / 7.357358932495117
    golden = grid(lo=0.0, hi=7.357358932495117)
    assert numbers(scale_params(golden)) == {"scale": pytest.approx(34.659176, abs=1e-5), "zero_point": 0}


def test_clipping_values_are_the_ends_of_the_range() -> None:
    assert numbers(clipping_params(grid(Mode.SYMMETRIC))) == {"clipping": 3.0}
    assert numbers(clipping_params(grid(lo=0.0, hi=2.0))) == {"clip_min": 0.0, "clip_max": 2.0}
    assert numbers(clipping_params(grid(half=True))) == {"clip_min": 0.0, "clip_max": 3.0}


def test_filtered_values_are_those_a_search_may_choose() -> None:
    assert list(scale_params(grid(), is_filtered=True)) == ["scale"]
    assert list(clipping_params(grid(half=True), is_filtered=True)) == ["clip_max"]
    assert list(clipping_params(grid(), is_filtered=True)) == ["clip_min", "clip_max"]
    assert list(clipping_params(grid(Mode.SYMMETRIC, half=True), is_filtered=True)) == ["clipping"]


@given(
    st.sampled_from(list(Mode)), st.integers(2, 8), st.floats(-100, 0), st.floats(0.01, 100), st.booleans()
)
def test_values_that_are_read_and_set_change_nothing(mode, bits, lo, hi, half) -> None:
    for values in (scale_params, clipping_params):
        one = grid(mode, bits, lo, hi, half)
        scale, zero_point = one.scale.clone(), one.zero_point.clone()
        set_params(one, values(one))
        torch.testing.assert_close(one.scale, scale, rtol=1e-5, atol=0)
        assert abs(int(one.zero_point) - int(zero_point)) <= 0


def test_what_is_not_named_stays() -> None:
    one = grid()
    set_params(one, {"scale": 10.0})
    assert numbers(scale_params(one)) == {"scale": pytest.approx(10.0), "zero_point": -64}
    set_params(one, {"zero_point": -100})
    assert numbers(scale_params(one)) == {"scale": pytest.approx(10.0), "zero_point": -100}
    set_params(one, {"clip_max": 5.1, "clip_min": 0.0})
    assert numbers(scale_params(one)) == {"scale": pytest.approx(50.0), "zero_point": 0}
    set_params(one, {"clip_min": -5.1})
    assert numbers(scale_params(one)) == {"scale": pytest.approx(25.0), "zero_point": -128}


def test_a_symmetric_range_is_set_by_one_value() -> None:
    one = grid(Mode.SYMMETRIC)
    set_params(one, {"clipping": 4})
    assert numbers(scale_params(one))["scale"] == pytest.approx(31.875, rel=1e-7)


@pytest.mark.parametrize(
    ("mode", "half", "changes", "text"),
    [
        (Mode.SYMMETRIC, False, {"scale": 0.0}, "conv1 output: scale: must be a number > 0, got 0.0"),
        (Mode.SYMMETRIC, False, {"scale": float("nan")}, "conv1 output: scale: must be finite, got nan"),
        (Mode.SYMMETRIC, False, {"clipping": -1}, "conv1 output: clipping: must be a number > 0, got -1"),
        (
            Mode.SYMMETRIC,
            False,
            {"zero_point": 3},
            "conv1 output: zero point: must be an integer from 0 to 0 (8 bits, SYMMETRIC), got -3.0",
        ),
        (
            Mode.ASYMMETRIC_UNSIGNED,
            False,
            {"clip_min": 1.0},
            "conv1 output: clip_min, clip_max: must be a range that contains 0, got 1.0 and 2.996078",
        ),
        (
            Mode.ASYMMETRIC_UNSIGNED,
            True,
            {"clip_min": -1.0},
            "conv1 output: clip_min: is 0 behind a ReLU, got -1.0",
        ),
        (
            Mode.ASYMMETRIC_UNSIGNED,
            False,
            {"scale": 1.0, "clip_max": 2.0},
            "conv1 output: scale, clip_max: give scales or clipping values, not both",
        ),
        (
            Mode.SYMMETRIC,
            False,
            {"scale": torch.ones(3)},
            "conv1 output: scale: must be a number or of shape (), got shape (3,)",
        ),
    ],
)
def test_impossible_values_are_refused(mode, half, changes, text) -> None:
    with pytest.raises(QuantizationError) as error:
        set_params(grid(mode, half=half), changes)
    assert str(error.value).startswith(text)


def test_a_value_that_there_is_not_is_named() -> None:
    with pytest.raises(UnknownNameError) as error:
        set_params(grid(), {"clip_mix": 1.0})
    assert str(error.value) == "conv1 output: no value 'clip_mix' that could be set; did you mean 'clip_min'?"
