"""Distiller's functions: values worked by hand from their description."""

from __future__ import annotations

import pytest
import torch

from distiller.quantization import q_utils


@pytest.mark.parametrize(
    ("bits", "saturation", "restrict", "scale"),
    [
        (8, 4, False, 31.875),
        (8, 4, True, 31.75),
        (8, 0, False, 1.0),
        (4, 2, True, 3.5),
        (8, 10, False, 12.75),
    ],
)
def test_symmetric_parameters(bits, saturation, restrict, scale) -> None:
    assert q_utils.symmetric_linear_quantization_params(bits, saturation, restrict) == (scale, 0.0)


def test_symmetric_parameters_of_a_tensor_are_tensors() -> None:
    scale, zero_point = q_utils.symmetric_linear_quantization_params(8, torch.tensor([4.0, 0.0]))
    assert torch.equal(scale, torch.tensor([31.875, 1.0]))
    assert torch.equal(zero_point, torch.zeros(2))


def test_symmetric_parameters_refuse_a_negative_saturation_value() -> None:
    with pytest.raises(ValueError, match=r"saturation_val: must be >= 0, got -1"):
        q_utils.symmetric_linear_quantization_params(8, -1)


@pytest.mark.parametrize(
    ("lo", "hi", "integral", "signed", "expected"),
    [
        (0, 10, True, False, (25.5, 0.0)),
        (0, 10, True, True, (25.5, 128.0)),
        (2, 10, True, False, (25.5, 0.0)),  # widened to 0
        (-10, -2, True, False, (25.5, -255.0)),
        (-2, 8, True, False, (25.5, -51.0)),
        (-2, 8, True, True, (25.5, 77.0)),
        (-1, 9, False, False, (25.5, -25.5)),
        (-1, 9, True, False, (25.5, -26.0)),  # half to even
        (0, 0, True, False, (1.0, 0.0)),
    ],
)
def test_asymmetric_parameters(lo, hi, integral, signed, expected) -> None:
    assert q_utils.asymmetric_linear_quantization_params(8, lo, hi, integral, signed) == expected


def test_asymmetric_parameters_of_a_tensor_are_tensors() -> None:
    scale, zero_point = q_utils.asymmetric_linear_quantization_params(
        8, torch.tensor([0.0, -2.0]), torch.tensor([10.0, 8.0])
    )
    assert torch.equal(scale, torch.tensor([25.5, 25.5]))
    assert torch.equal(zero_point, torch.tensor([0.0, -51.0]))


def test_asymmetric_parameters_refuse_a_range_upside_down() -> None:
    with pytest.raises(ValueError, match=r"saturation_min: must not be above saturation_max, got 3, 2"):
        q_utils.asymmetric_linear_quantization_params(8, 3, 2)


def test_scale_of_the_golden_value() -> None:
    scale, zero_point = q_utils.asymmetric_linear_quantization_params(8, 0.0, 7.357358932495117)
    assert scale == pytest.approx(34.659176253, abs=1e-8)
    assert zero_point == 0


@pytest.mark.parametrize("inplace", [False, True])
def test_quantize_multiplies_and_subtracts(inplace) -> None:
    x = torch.tensor([-1.0, 0.0, 0.24, 3.0])
    q = q_utils.linear_quantize_clamp(x, 10.0, -2.0, 0, 15, inplace)
    assert q.tolist() == [0, 2, 4, 15]
    assert (q.data_ptr() == x.data_ptr()) is inplace


def test_quantize_alone_does_not_clamp() -> None:
    assert q_utils.linear_quantize(torch.tensor([100.0]), 10.0, 0.0).item() == 1000


@pytest.mark.parametrize("inplace", [False, True])
def test_dequantize_adds_and_divides(inplace) -> None:
    q = torch.tensor([0.0, 2.0, 12.0])
    x = q_utils.linear_dequantize(q, 10.0, -2.0, inplace)
    torch.testing.assert_close(x, torch.tensor([-0.2, 0.0, 1.0]))
    assert (q.data_ptr() == x.data_ptr()) is inplace


@pytest.fixture
def t() -> torch.Tensor:
    return torch.tensor([[[1.0, -5.0], [2.0, 3.0]], [[0.5, 4.0], [-1.0, -2.0]]])


def test_extremes(t) -> None:
    assert [value.item() for value in q_utils.get_tensor_min_max(t)] == [-5, 4]
    assert [value.tolist() for value in q_utils.get_tensor_min_max(t, 0)] == [[-5, -2], [3, 4]]
    lo, _ = q_utils.get_tensor_min_max(t, 1)
    assert lo.tolist() == [[-5, 2], [0.5, -2]]
    with pytest.raises(ValueError, match="per_dim: the tensor has 3 dimensions, got 3"):
        q_utils.get_tensor_min_max(t, 3)


def test_averaged_extremes(t) -> None:
    assert [value.item() for value in q_utils.get_tensor_avg_min_max(t, 0)] == [-3.5, 3.5]
    assert [value.item() for value in q_utils.get_tensor_avg_min_max(t)] == [-5, 4]
    assert q_utils.get_tensor_max_abs(t, 0).tolist() == [5, 4]
    assert q_utils.get_tensor_avg_max_abs(t, 0).item() == 4.5


def test_mean_and_deviations_stay_within_the_extremes(t) -> None:
    lo, hi = q_utils.get_tensor_mean_n_stds_min_max(t, n_stds=1)
    assert lo.item() == pytest.approx(t.mean().item() - t.std().item())
    assert hi.item() == pytest.approx(t.mean().item() + t.std().item())
    assert [value.item() for value in q_utils.get_tensor_mean_n_stds_min_max(t, n_stds=100)] == [-5, 4]
    with pytest.raises(ValueError, match=r"n_stds: must be > 0, got 0"):
        q_utils.get_tensor_mean_n_stds_min_max(t, n_stds=0)


def test_approximated_scale_of_numbers_and_tensors() -> None:
    assert q_utils.approx_scale_as_mult_and_shift(0.3, 8) == 153 / 512
    assert q_utils.approx_scale_as_mult_and_shift(torch.tensor([0.3]), 8).tolist() == [153 / 512]
