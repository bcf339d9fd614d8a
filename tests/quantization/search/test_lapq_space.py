from __future__ import annotations

import numpy as np
import pytest
import torch

from distiller.errors import QuantizationError
from distiller.quantization.search.copies import prepared_copy
from distiller.quantization.search.lapq_space import ScaleSpace, nearest_point, plain_params, put_ranges

ASYMMETRIC = {"mode": "ASYMMETRIC_UNSIGNED", "per_channel_wts": True, "save_fp_weights": True}


def outputs(quantizer, digits):
    with torch.no_grad():
        return quantizer.model(digits[0])


def test_the_components_are_the_free_scales(prepared):
    assert ScaleSpace(prepared, False).names == (
        "conv1.output_scale", "conv1.w_scale", "conv2.output_scale", "conv2.w_scale", "fc.output_scale", "fc.w_scale",
    )  # fmt: skip


def test_ends_that_are_zero_are_no_components(make_quantizer, dummy):
    space = ScaleSpace(prepared_copy(make_quantizer(), dummy, **ASYMMETRIC), True)
    assert "conv1.output_clip_max" in space.names
    assert "conv1.output_clip_min" not in space.names  # behind a ReLU
    assert "fc.output_clip_min" in space.names


def test_a_unit_is_an_octave_and_the_start_is_zero(prepared):
    before = plain_params(prepared)
    space = ScaleSpace(prepared, False)
    x = np.zeros(len(space.names))
    x[space.names.index("conv2.w_scale")] = 1
    x[space.names.index("fc.output_scale")] = -2
    space.put(x)
    expected = {
        **before,
        "conv2.w_scale": 2 * before["conv2.w_scale"],
        "fc.output_scale": before["fc.output_scale"] / 4,
    }
    assert plain_params(prepared) == pytest.approx(expected)
    space.put(np.zeros_like(x))
    assert plain_params(prepared) == pytest.approx(before)


@pytest.mark.parametrize("search_clipping", [False, True])
def test_a_point_is_the_same_whatever_the_way_to_it(make_quantizer, digits, dummy, search_clipping):
    """Both ends of a range are set at once: a rounded zero point moves the end that is not set."""
    one, other = (prepared_copy(make_quantizer(), dummy, **ASYMMETRIC, bits_activations=4) for _ in range(2))
    spaces = [ScaleSpace(quantizer, search_clipping) for quantizer in (one, other)]
    rng = np.random.default_rng(0)
    for _ in range(5):
        x = rng.uniform(-1, 1, len(spaces[0].names))
        spaces[0].put(x)
    spaces[1].put(x)
    assert plain_params(one) == plain_params(other)
    assert torch.equal(outputs(one, digits), outputs(other, digits))


def test_channels_are_varied_together(make_quantizer, dummy):
    quantizer = prepared_copy(make_quantizer(), dummy, **ASYMMETRIC)
    before = plain_params(quantizer)
    space = ScaleSpace(quantizer, False)
    space.put(np.ones(len(space.names)))
    after = plain_params(quantizer)
    assert len(after["conv1.w_scale"]) == 6
    np.testing.assert_allclose(after["conv1.w_scale"], 2 * np.array(before["conv1.w_scale"]), rtol=1e-6)
    assert after["conv1.w_zero_point"] == before["conv1.w_zero_point"]


def test_points_are_taken_at_steps_of_a_256th_octave():
    x = nearest_point(np.array([0.1, -0.0001, 3 / 256]))
    assert x.tolist() == [26 / 256, 0.0, 3 / 256]
    assert np.copysign(1, x[1]) == 1


def test_ranges_are_laid_by_the_name_of_the_grid(make_quantizer, dummy):
    quantizer = prepared_copy(make_quantizer(), dummy, **ASYMMETRIC)
    lo, hi = torch.full((6,), -2.0), torch.full((6,), 1.0)
    put_ranges(quantizer, {"conv1.w": (lo, hi), "conv1.output": (torch.tensor(0.0), torch.tensor(4.0))})
    params = plain_params(quantizer)
    np.testing.assert_allclose(params["conv1.w_scale"], 255 / 3, rtol=1e-6)
    assert params["conv1.w_zero_point"] == [-170.0] * 6
    assert params["conv1.output_scale"] == pytest.approx(255 / 4)


def test_where_nothing_is_fixed_there_is_nothing_to_search(make_quantizer, dummy):
    dynamic = prepared_copy(make_quantizer(model_activation_stats=None), dummy, bits_parameters=None)
    with pytest.raises(QuantizationError) as caught:
        ScaleSpace(dynamic, False)
    assert str(caught.value) == (
        "nothing of the model has a fixed scale that could be searched: quantize weights, or "
        "activations with statistics"
    )
