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


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("stats", [STATS, None])
def test_equals_torch_kernel_bit_for_bit(bits, mode, stats) -> None:
    quantizer = ActivationQuantizer(QuantSettings(bits, mode), stats, "x")
    result = quantizer(X)
    assert torch.equal(result, torch_result(quantizer, X))
    assert result.data_ptr() != X.data_ptr()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("stats", [STATS, None])
def test_half_range_is_a_relu_as_well(mode, stats, bits) -> None:
    quantizer = ActivationQuantizer(QuantSettings(bits, mode, clip_half_range=True), stats, "x")
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


@pytest.mark.parametrize("half_range", [False, True])
@pytest.mark.parametrize("mode", list(Mode))
def test_a_grid_laid_over_the_ends_of_another_is_that_other(mode, half_range) -> None:
    settings = QuantSettings(8, mode, clip_half_range=half_range)
    quantizer, other = (
        ActivationQuantizer(settings, {**STATS, "max": largest}, "x") for largest in (3.0, 9.0)
    )
    before = quantizer(X)
    scale, zero_point, ends = quantizer.scale, quantizer.zero_point, quantizer.ends
    quantizer.set_range(*other.ends)
    assert torch.equal(quantizer(X), other(X))
    quantizer.set_range(*ends)
    torch.testing.assert_close((quantizer.scale, quantizer.zero_point), (scale, zero_point))
    quantizer.set_grid(scale, zero_point)
    assert torch.equal(quantizer(X), before)


def test_ends_of_a_range_worked_by_hand() -> None:
    # 8 bits over [-1, 3]: scale 4 / 255, zero point round(63.75) = 64, so [-64, 191] steps
    lo, hi = ActivationQuantizer(QuantSettings(8, Mode.ASYMMETRIC_UNSIGNED), STATS, "x").ends
    assert (lo.item(), hi.item()) == pytest.approx((-64 * 4 / 255, 191 * 4 / 255))
    lo, hi = ActivationQuantizer(QuantSettings(8, Mode.SYMMETRIC), STATS, "x").ends
    assert (lo.item(), hi.item()) == pytest.approx((-3.0, 3.0))


@pytest.mark.parametrize(
    ("scale", "zero_point", "text"),
    [
        (0.0, 0, "x: scale: must be a finite number > 0, got 0.0"),
        (float("inf"), 0, "x: scale: must be a finite number > 0, got inf"),
        (
            1.0,
            256,
            "x: zero point: must be an integer from 0 to 255 (8 bits, ASYMMETRIC_UNSIGNED), got 256.0",
        ),
        (1.0, 0.5, "x: zero point: must be an integer from 0 to 255 (8 bits, ASYMMETRIC_UNSIGNED), got 0.5"),
    ],
)
def test_impossible_grids_are_refused(scale, zero_point, text) -> None:
    quantizer = ActivationQuantizer(QuantSettings(8, Mode.ASYMMETRIC_UNSIGNED), STATS, "x")
    before = quantizer(X)
    with pytest.raises(QuantizationError) as error:
        quantizer.set_grid(torch.tensor(scale), torch.tensor(float(zero_point)))
    assert str(error.value) == text
    assert torch.equal(quantizer(X), before)


def test_a_dynamic_grid_cannot_be_set() -> None:
    quantizer = ActivationQuantizer(QuantSettings(8, Mode.SYMMETRIC), None, "x")
    with pytest.raises(QuantizationError, match="^x: its range is that of each batch, and cannot be set$"):
        quantizer.set_grid(torch.tensor(1.0))
