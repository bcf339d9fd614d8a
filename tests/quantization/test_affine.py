"""Equations against PyTorch's own observers and kernels, numpy, and numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

from distiller.errors import QuantizationError
from distiller.quantization import affine
from distiller.quantization.affine import LinearQuantMode as Mode

BITS = [*range(2, 9), 12, 16]
MODES = list(Mode)
floats = st.floats(-1e4, 1e4, width=32)


def random_values(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 5, 3, 3, generator=generator) * 3 + 0.7


def observer_of(mode: Mode, bits: int, per_channel: bool):
    qmin, qmax = affine.quantized_range(bits, mode)
    symmetric = mode.is_symmetric
    if per_channel:
        scheme = torch.per_channel_symmetric if symmetric else torch.per_channel_affine
        return PerChannelMinMaxObserver(
            ch_axis=0, dtype=torch.qint32, qscheme=scheme, quant_min=qmin, quant_max=qmax
        )
    scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    return MinMaxObserver(dtype=torch.qint32, qscheme=scheme, quant_min=qmin, quant_max=qmax)


@pytest.mark.parametrize(
    ("bits", "mode", "expected"),
    [
        (8, Mode.SYMMETRIC, (-128, 127)),
        (8, Mode.SYMMETRIC_RESTRICTED, (-127, 127)),
        (8, Mode.ASYMMETRIC_UNSIGNED, (0, 255)),
        (8, Mode.ASYMMETRIC_SIGNED, (-128, 127)),
        (2, Mode.SYMMETRIC_RESTRICTED, (-1, 1)),
        (16, Mode.ASYMMETRIC_UNSIGNED, (0, 65535)),
    ],
)
def test_range_of_integers_by_mode(bits, mode, expected) -> None:
    assert affine.quantized_range(bits, mode) == expected


def test_get_quantized_range_has_distillers_defaults() -> None:
    assert affine.get_quantized_range(8) == (-128, 127)
    assert affine.get_quantized_range(8, True, True) == (-127, 127)
    assert affine.get_quantized_range(4, signed=False) == (0, 15)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", BITS)
def test_scale_and_zero_point_equal_those_of_torch_observers(bits, mode, per_channel) -> None:
    for seed in range(5):
        x = random_values(seed)
        observer = observer_of(mode, bits, per_channel)
        observer(x)
        expected_scale, expected_zero_point = observer.calculate_qparams()
        rows = x.flatten(1) if per_channel else x.reshape(1, -1)
        scale, zero_point = affine.scale_and_zero_point(rows.amin(1), rows.amax(1), bits, mode)
        assert torch.equal(scale, expected_scale.reshape(-1))
        assert torch.equal(zero_point, expected_zero_point.reshape(-1).to(torch.int32))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", BITS)
def test_fake_quantize_equals_torch_kernel_bit_for_bit(bits, mode) -> None:
    x = random_values(1)
    scale, zero_point = affine.scale_and_zero_point(x.amin() * 0.7, x.amax() * 0.7, bits, mode)
    qmin, qmax = affine.quantized_range(bits, mode)
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, qmin, qmax)
    assert torch.equal(affine.fake_quantize(x, scale, zero_point, qmin, qmax), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", BITS)
def test_fake_quantize_per_channel_equals_torch_kernel_bit_for_bit(bits, mode) -> None:
    x = random_values(2)
    rows = x.flatten(1)
    scale, zero_point = affine.scale_and_zero_point(rows.amin(1) * 0.9, rows.amax(1) * 0.9, bits, mode)
    qmin, qmax = affine.quantized_range(bits, mode)
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, qmin, qmax)
    assert torch.equal(affine.fake_quantize(x, scale, zero_point, qmin, qmax, axis=0), expected)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", BITS)
def test_quantize_and_dequantize_equal_numpy_bit_for_bit(bits, mode, per_channel) -> None:
    for seed, clip in ((3, 1.0), (4, 0.6)):
        x = random_values(seed)
        rows = x.flatten(1) if per_channel else x.reshape(1, -1)
        lo, hi = rows.amin(1) * clip, rows.amax(1) * clip
        scale, zero_point = affine.scale_and_zero_point(lo, hi, bits, mode)
        expected_scale, expected_zero_point = by_numpy(lo.numpy(), hi.numpy(), bits, mode)
        assert np.array_equal(scale.numpy(), expected_scale)
        assert np.array_equal(zero_point.numpy(), expected_zero_point)
        qmin, qmax = affine.quantized_range(bits, mode)
        shape = (-1, 1, 1, 1) if per_channel else (1,)
        scales, zeros = expected_scale.reshape(shape), expected_zero_point.reshape(shape)
        q = np.clip(np.rint(x.numpy() * (np.float32(1) / scales)) + zeros, qmin, qmax).astype(np.int32)
        real = (q - zeros).astype(np.float32) * scales
        axis = 0 if per_channel else None
        if not per_channel:
            scale, zero_point = scale[0], zero_point[0]
        assert np.array_equal(affine.quantize(x, scale, zero_point, qmin, qmax, axis).numpy(), q)
        assert np.array_equal(affine.dequantize(torch.from_numpy(q), scale, zero_point, axis).numpy(), real)
        assert np.array_equal(affine.fake_quantize(x, scale, zero_point, qmin, qmax, axis).numpy(), real)


def by_numpy(lo: np.ndarray, hi: np.ndarray, bits: int, mode: Mode) -> tuple[np.ndarray, np.ndarray]:
    """The equations as Distiller's documentation has them, in float32, its scales inverted."""
    saturation = np.maximum(np.abs(lo), np.abs(hi))
    if mode is Mode.SYMMETRIC:
        return saturation / np.float32((2**bits - 1) / 2), np.zeros(lo.shape, np.int32)
    if mode is Mode.SYMMETRIC_RESTRICTED:
        return saturation / np.float32(2 ** (bits - 1) - 1), np.zeros(lo.shape, np.int32)
    lo, hi = np.minimum(lo, 0), np.maximum(hi, 0)
    scale = (hi - lo) / np.float32(2**bits - 1)
    smallest = -(2 ** (bits - 1)) if mode is Mode.ASYMMETRIC_SIGNED else 0
    return scale, (smallest - np.rint(lo / scale)).astype(np.int32)


def test_rounding_is_half_to_even() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    one, zero = torch.tensor(1.0), torch.tensor(0)
    assert affine.quantize(x, one, zero, -8, 7).tolist() == [-2, -2, 0, 0, 2, 2]


@given(st.lists(floats, min_size=2, max_size=20), st.integers(2, 16), st.sampled_from(MODES))
def test_round_trip_is_within_half_a_step_inside_the_range(values, bits, mode) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    scale, zero_point = affine.scale_and_zero_point(x.min(), x.max(), bits, mode)
    error = (affine.fake_quantize(x, scale, zero_point, *affine.quantized_range(bits, mode)) - x).abs()
    assert bool((error <= scale / 2 * (1 + 1e-9)).all())


@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=6), st.integers(2, 8), st.sampled_from(MODES))
def test_every_channel_is_quantized_as_if_it_were_alone(ranges, bits, mode) -> None:
    lo, hi = torch.tensor(ranges).sort(dim=1).values.unbind(1)
    x = torch.stack([lo, hi, (lo + hi) / 2, torch.zeros_like(lo)], 1)
    scale, zero_point = affine.scale_and_zero_point(lo, hi, bits, mode)
    qrange = affine.quantized_range(bits, mode)
    together = affine.fake_quantize(x, scale, zero_point, *qrange, axis=0)
    for index in range(len(ranges)):
        one_scale, one_zero_point = affine.scale_and_zero_point(lo[index], hi[index], bits, mode)
        alone = affine.fake_quantize(x[index], one_scale, one_zero_point, *qrange)
        assert torch.equal(together[index], alone)


@given(floats, floats, st.integers(2, 16), st.sampled_from(MODES))
def test_zero_is_exact(a, b, bits, mode) -> None:
    lo, hi = torch.tensor(min(a, b)), torch.tensor(max(a, b))
    scale, zero_point = affine.scale_and_zero_point(lo, hi, bits, mode)
    qmin, qmax = affine.quantized_range(bits, mode)
    assert qmin <= int(zero_point) <= qmax
    assert affine.fake_quantize(torch.zeros(1), scale, zero_point, qmin, qmax).item() == 0.0


@given(st.lists(floats, min_size=1, max_size=8), st.integers(2, 16), st.sampled_from(MODES))
def test_quantizing_twice_changes_nothing(values, bits, mode) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    scale, zero_point = affine.scale_and_zero_point(x.min(), x.max(), bits, mode)
    qrange = affine.quantized_range(bits, mode)
    once = affine.fake_quantize(x, scale, zero_point, *qrange)
    assert torch.equal(affine.fake_quantize(once, scale, zero_point, *qrange), once)


@pytest.mark.parametrize("width", [0.0, 1e-45])
def test_empty_range_gets_scale_one(width) -> None:
    scale, zero_point = affine.scale_and_zero_point(
        torch.tensor(0.0), torch.tensor(width), 8, Mode.ASYMMETRIC_UNSIGNED
    )
    assert (scale.item(), zero_point.item()) == (1.0, 0)


def test_nan_stays_nan() -> None:
    x = torch.tensor([float("nan"), 1.0])
    assert affine.fake_quantize(x, torch.tensor(0.1), torch.tensor(0), -8, 7).isnan().tolist() == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("lo", "hi", "shown"),
    [(1.0, -1.0, "[1, -1]"), (0.0, float("inf"), "[0, inf]"), (float("nan"), 0.0, "[nan, 0]")],
)
def test_impossible_range_is_refused(lo, hi, shown) -> None:
    with pytest.raises(QuantizationError) as error:
        affine.scale_and_zero_point(torch.tensor(lo), torch.tensor(hi), 8, Mode.SYMMETRIC)
    assert str(error.value) == f"quantization range: must be finite with min <= max, got {shown}"


def test_approximated_scale_worked_by_hand() -> None:
    # m = 8, 0.3: n = floor(log2(255 / 0.3)) = floor(9.73) = 9, A = floor(0.3 * 512) = 153
    assert affine.approximate_scale(torch.tensor(0.3), 8).item() == 153 / 512


@given(st.floats(1e-6, 1e4), st.integers(2, 24))
def test_approximated_scale_is_an_integer_of_m_bits_over_a_power_of_two(scale, bits) -> None:
    approximated = affine.approximate_scale(torch.tensor(scale, dtype=torch.float64), bits).item()
    mantissa = int(np.frexp(approximated)[0] * 2**53)
    trailing_zeros = (mantissa & -mantissa).bit_length() - 1
    assert mantissa.bit_length() - trailing_zeros <= bits
    assert 0 <= scale - approximated < scale * 2.0 ** (1 - bits)


def test_distillers_convention_is_the_inverse_one() -> None:
    # 8 bits unsigned over [-2, 6]: 255 / 8 = 31.875 per unit; Distiller's zero point is round(31.875 * -2) = -64
    scale, zero_point = affine.scale_and_zero_point(
        torch.tensor(-2.0), torch.tensor(6.0), 8, Mode.ASYMMETRIC_UNSIGNED
    )
    distiller_scale, distiller_zero_point = affine.to_distiller(scale, zero_point)
    assert distiller_scale.item() == pytest.approx(31.875, rel=1e-6)
    assert distiller_zero_point.item() == -64
    back_scale, back_zero_point = affine.from_distiller(distiller_scale, distiller_zero_point)
    assert torch.equal(back_zero_point, zero_point)
    torch.testing.assert_close(back_scale, scale)


@pytest.mark.parametrize("bits", [None, 0])
def test_no_bits_mean_not_quantized(bits) -> None:
    assert affine.check_bits(bits, "bits") is None


@pytest.mark.parametrize("bits", [1, 17, -8, 8.0, "8", True])
def test_other_widths_are_refused(bits) -> None:
    with pytest.raises(QuantizationError) as error:
        affine.check_bits(bits, "conv1: bits_weights")
    assert (
        str(error.value) == f"conv1: bits_weights: must be 2 to 16 bits, or 0 or null for none, got {bits!r}"
    )
