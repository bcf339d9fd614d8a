"""The quantizer of one tensor stream against PyTorch's fake-quantize kernel."""

from __future__ import annotations

import copy

import pytest
import torch

from distiller.errors import QuantizationError, StatsError
from distiller.quantization.activation_quant import ActivationQuantizer, QuantSettings
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.clipping import ClipMode

STATS = {"min": -1.0, "max": 3.0, "avg_min": -0.5, "avg_max": 2.0, "mean": 0.2, "std": 0.6}
X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(3)) * 2


def torch_result(quantizer: ActivationQuantizer, x: torch.Tensor) -> torch.Tensor:
    qmin, qmax = quantizer.settings.qrange
    return torch.fake_quantize_per_tensor_affine(x, quantizer.scale, quantizer.zero_point, qmin, qmax)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("stats", [STATS, None])
def test_equals_torch_kernel_bit_for_bit(bits, mode, stats) -> None:
    quantizer = ActivationQuantizer(QuantSettings(bits, mode), stats, "x")
    result = quantizer(X)
    assert torch.equal(result, torch_result(quantizer, X))
    assert result.data_ptr() != X.data_ptr()


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("stats", [STATS, None])
def test_half_range_is_a_relu_as_well(mode, stats) -> None:
    quantizer = ActivationQuantizer(QuantSettings(8, mode, clip_half_range=True), stats, "x")
    result = quantizer(X)
    assert torch.equal(result, torch_result(quantizer, torch.relu(X)))


def test_largest_level_is_the_farthest_integer_from_the_zero_point() -> None:
    # [-1, 3] on 0..255: zero point 64, so 191 above and 64 below
    quantizer = ActivationQuantizer(QuantSettings(8, Mode.ASYMMETRIC_UNSIGNED), STATS, "x")
    assert quantizer.largest_level == 191
    assert ActivationQuantizer(QuantSettings(8, Mode.ASYMMETRIC_UNSIGNED), None, "x").largest_level == 255
    assert ActivationQuantizer(QuantSettings(8, Mode.SYMMETRIC), STATS, "x").largest_level == 128


def test_dynamic_range_follows_the_batch_and_is_not_saved() -> None:
    quantizer = ActivationQuantizer(QuantSettings(8, Mode.ASYMMETRIC_SIGNED), None, "x")
    quantizer(torch.tensor([[0.0, 255.0]]))
    assert quantizer.scale.item() == 1.0
    quantizer(torch.tensor([[0.0, 510.0]]))
    assert quantizer.scale.item() == 2.0
    assert quantizer.state_dict() == {}


def test_loaded_scales_are_used_also_after_a_first_run() -> None:
    quantizer = ActivationQuantizer(QuantSettings(8, Mode.SYMMETRIC), STATS, "x")
    other = ActivationQuantizer(QuantSettings(8, Mode.SYMMETRIC), {**STATS, "max": 30.0}, "x")
    quantizer(X)
    quantizer.load_state_dict(other.state_dict())
    assert torch.equal(quantizer(X), other(X))


def test_a_copy_is_its_own() -> None:
    quantizer = ActivationQuantizer(QuantSettings(8, Mode.SYMMETRIC), STATS, "x")
    before = quantizer(X)
    twin = copy.deepcopy(quantizer)
    twin.load_state_dict(
        ActivationQuantizer(QuantSettings(8, Mode.SYMMETRIC), {**STATS, "max": 9.0}, "x").state_dict()
    )
    assert torch.equal(quantizer(X), before)
    assert not torch.equal(twin(X), before)


def test_values_that_are_no_numbers_are_not_hidden() -> None:
    quantizer = ActivationQuantizer(QuantSettings(8, Mode.SYMMETRIC), STATS, "x")
    assert quantizer(torch.tensor([float("nan")])).isnan().all()


def test_dynamic_range_of_numbers_that_are_not_finite_is_refused() -> None:
    quantizer = ActivationQuantizer(QuantSettings(8, Mode.SYMMETRIC), None, "conv1 output")
    with pytest.raises(QuantizationError) as error:
        quantizer(torch.tensor([[1.0, float("inf")]]))
    assert str(error.value) == (
        "conv1 output: quantization range: must be finite with min <= max, got [1, inf]"
    )


def test_missing_statistic_names_the_stream() -> None:
    with pytest.raises(StatsError, match=r"^fc output: clip mode LAPLACE needs the statistic 'b'"):
        ActivationQuantizer(QuantSettings(8, Mode.SYMMETRIC, ClipMode.LAPLACE), STATS, "fc output")


def test_shows_its_settings() -> None:
    quantizer = ActivationQuantizer(QuantSettings(8, Mode.SYMMETRIC), {**STATS, "max": 127.5}, "x")
    assert repr(quantizer) == "ActivationQuantizer(8 bits, SYMMETRIC, clip NONE, scale=1, zp=0)"
