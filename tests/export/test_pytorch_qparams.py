"""Distiller's scales and integers in PyTorch's quantized tensors, against PyTorch's own quantization."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distiller.errors import QuantizationError
from distiller.export.pytorch_qparams import (
    distiller_qparams_to_pytorch,
    distiller_quantized_tensor_to_pytorch,
)
from distiller.quantization import affine
from distiller.quantization.affine import LinearQuantMode as Mode

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel")
DTYPES = [torch.qint8, torch.quint8]
ENDS = {torch.qint8: (-128, 127), torch.quint8: (0, 255)}


def distillers(x: torch.Tensor, bits: int, mode: Mode, per_channel: bool):
    """Scale, zero point and integers of Distiller's convention, by its formula q = round(s * x - z)."""
    rows = x.flatten(1) if per_channel else x.flatten()[None]
    lo, hi = rows.amin(1), rows.amax(1)
    scale, zero_point = affine.to_distiller(*affine.scale_and_zero_point(lo, hi, bits, mode))
    if not per_channel:
        scale, zero_point = scale[0], zero_point[0]
        shaped = (scale, zero_point)
    else:
        shaped = tuple(t.reshape(-1, *[1] * (x.dim() - 1)) for t in (scale, zero_point))
    q = torch.round(shaped[0] * x - shaped[1]).clamp(*affine.quantized_range(bits, mode))
    return scale, zero_point, q


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_channel", [False, True])
def test_equals_pytorchs_quantization_bit_for_bit(mode, bits, dtype, per_channel):
    x = torch.randn(4, 3, 2, 2) * 3 + 0.5
    scale, zero_point, q = distillers(x, bits, mode, per_channel)
    got = distiller_quantized_tensor_to_pytorch(q, scale, zero_point, bits, mode, dtype, per_channel)
    torch_scale, torch_zp = distiller_qparams_to_pytorch(scale, zero_point, bits, mode, dtype)
    assert got.dtype == dtype
    real = (q + (zero_point if not per_channel else zero_point.reshape(-1, 1, 1, 1))) / (
        scale if not per_channel else scale.reshape(-1, 1, 1, 1)
    )
    if per_channel:
        expected = torch.quantize_per_channel(real, torch_scale.double(), torch_zp, 0, dtype)
        assert torch.equal(got.q_per_channel_scales(), torch_scale.double())
        assert torch.equal(got.q_per_channel_zero_points(), torch_zp.long())
    else:
        expected = torch.quantize_per_tensor(real, float(torch_scale), int(torch_zp), dtype)
        assert (got.q_scale(), got.q_zero_point()) == (float(torch_scale), int(torch_zp))
    assert torch.equal(got.int_repr(), expected.int_repr())
    torch.testing.assert_close(got.dequantize(), real, rtol=1e-6, atol=0)


@given(
    bits=st.integers(2, 8),
    mode=st.sampled_from(list(Mode)),
    dtype=st.sampled_from(DTYPES),
    lo=st.floats(-10, 0),
    width=st.floats(0.01, 20),
)
def test_every_integer_of_a_mode_has_its_place_in_the_type(bits, mode, dtype, lo, width):
    ends = torch.tensor([lo, lo + width]).clamp(-20, 20)
    scale, zero_point = affine.to_distiller(*affine.scale_and_zero_point(*ends, bits, mode))
    qmin, qmax = affine.quantized_range(bits, mode)
    q = torch.arange(qmin, qmax + 1)
    got = distiller_quantized_tensor_to_pytorch(q, scale, zero_point, bits, mode, dtype).int_repr().int()
    assert ENDS[dtype][0] <= int(got.min()) <= int(got.max()) <= ENDS[dtype][1]
    assert torch.equal(got - got[0], torch.arange(len(q), dtype=torch.int32))
    is_asymmetric_to_unsigned = dtype is torch.quint8 and mode is not Mode.SYMMETRIC_RESTRICTED
    assert not is_asymmetric_to_unsigned or int(got[0]) == 0


@pytest.mark.parametrize(
    "mode,dtype,scale,zp,expected",
    [
        # 8 bits: zero points by hand
        (Mode.SYMMETRIC, torch.qint8, 4.0, 0, (0.25, 0)),
        (Mode.SYMMETRIC, torch.quint8, 4.0, 0, (0.25, 128)),
        (Mode.ASYMMETRIC_UNSIGNED, torch.quint8, 4.0, -37, (0.25, 37)),
        (Mode.ASYMMETRIC_UNSIGNED, torch.qint8, 4.0, -37, (0.25, -91)),
        (Mode.ASYMMETRIC_SIGNED, torch.qint8, 4.0, 37, (0.25, -37)),
        (Mode.ASYMMETRIC_SIGNED, torch.quint8, 4.0, 37, (0.25, 91)),
    ],
)
def test_zero_points_move_by_half_the_range_where_signs_differ(mode, dtype, scale, zp, expected):
    got = distiller_qparams_to_pytorch(torch.tensor(scale), torch.tensor(float(zp)), 8, mode, dtype)
    assert (got[0].item(), got[1].item()) == expected


@pytest.mark.parametrize("dtype,ratio", [(torch.quint8, 127 / 255), (torch.qint8, 63 / 127)])
def test_a_reduced_range_lays_the_same_numbers_onto_one_bit_less(dtype, ratio):
    arguments = (torch.tensor(4.0), torch.tensor(-100.0), 8, Mode.ASYMMETRIC_UNSIGNED, dtype)
    scale, zero_point = distiller_qparams_to_pytorch(*arguments)
    reduced_scale, reduced_zero_point = distiller_qparams_to_pytorch(*arguments, reduce_range=True)
    assert reduced_scale.item() == pytest.approx(0.25 / ratio, rel=1e-6)
    assert reduced_zero_point.item() == np.rint(zero_point.item() * ratio)
    assert scale.item() == 0.25


def test_what_is_no_quantized_type_or_tensor_is_refused():
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    for arguments, message in (
        ((8, Mode.SYMMETRIC, torch.int8), "dest_dtype must be torch.qint8 or torch.quint8, got torch.int8"),
        ((9, Mode.SYMMETRIC, torch.qint8), "num_bits must be 2 to 8, got 9"),
        ((7, Mode.SYMMETRIC, torch.qint8, True), "reduce_range is for 8 bits, got 7"),
    ):
        with pytest.raises(QuantizationError) as caught:
            distiller_qparams_to_pytorch(one, zero, *arguments)
        assert str(caught.value) == f"distiller_qparams_to_pytorch: {message}"
    for values in ([0.5, 1.0], [0.0, 8.0], [-9.0, 0.0]):
        with pytest.raises(QuantizationError) as caught:
            distiller_quantized_tensor_to_pytorch(
                torch.tensor(values), one, zero, 4, Mode.SYMMETRIC, torch.qint8
            )
        assert str(caught.value) == (
            "distiller_quantized_tensor_to_pytorch: the tensor must hold integers from -8 to 7, got values from "
            f"{min(values):g} to {max(values):g}; quantize it first"
        )
