"""How wide accumulators have to be, and what happens in those that are not: the widths of post-training quantization."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

from distiller.modules import EltwiseMult, Matmul
from distiller.quantization.activation_quant import ActivationQuantizer, QuantSettings
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.ptq_elementwise import (
    RangeLinearQuantEltwiseMultWrapper,
    RangeLinearQuantMatmulWrapper,
)
from distiller.quantization.ptq_layers import RangeLinearQuantParamLayerWrapper, bits_to_hold
from tests.quantization.networks import ASYMMETRIC, quantized, signal_to_noise

X = torch.randn(3, 4, 7, 7, generator=torch.Generator().manual_seed(2)) + 0.4


def grid(x: Any, bits: int, mode: Mode, dynamic: bool = False) -> ActivationQuantizer:
    stats = None if dynamic else {"min": x.min().item(), "max": x.max().item()}
    return ActivationQuantizer(QuantSettings(bits, mode), stats, "x")


def convolution(bits: int = 16, dynamic: bool = False, bias: bool = True, bits_accum: int = 32) -> Any:
    layer = nn.Conv2d(4, 6, 3, padding=1, bias=bias).eval()
    mode = Mode.ASYMMETRIC_UNSIGNED
    output = grid(layer(X).detach(), bits, mode, dynamic)
    weight = QuantSettings(bits, Mode.SYMMETRIC)
    wrapper = RangeLinearQuantParamLayerWrapper(layer, "layer", weight, output, bits_accum, bits_accum)
    wrapper.connect({0: grid(X, bits, mode, dynamic)}, {})
    return wrapper


@pytest.mark.parametrize("bits_accum", [2, 8, 24, 25, 31, 32, 33, 48, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accumulators_end_where_their_integers_do(bits_accum, dtype) -> None:
    wrapper = convolution(bits_accum=bits_accum)
    scale = Fraction(wrapper.accum_scale().item())
    ends = wrapper.saturated(torch.tensor([-math.inf, math.inf], dtype=dtype), math.inf).tolist()
    ulp = torch.finfo(dtype).eps
    exact = -(2 ** (bits_accum - 1)) * scale, (2 ** (bits_accum - 1) - 1) * scale
    assert ends == pytest.approx([float(end) for end in exact], rel=ulp, abs=0)


def test_the_bits_an_accumulator_needs_hold_its_largest_sum_and_no_fewer_do() -> None:
    assert [bits_to_hold(largest) for largest in (0.0, 1.0, 2.0, 127.0, 128.0, 2**31 - 1.0, 2.0**31)] == [
        1, 2, 3, 8, 9, 32, 33,
    ]  # fmt: skip
    wrapper = convolution(bits_accum=64)
    needed = wrapper.accumulator_bits()
    assert needed is not None
    assert 2 ** (needed - 2) <= wrapper._largest_sum() < 2 ** (needed - 1)
    assert needed <= 16 + 16 + math.ceil(math.log2(4 * 9))  # bits of both factors, and of the number of terms


def test_dynamic_accumulators_need_what_their_products_do() -> None:
    bias_free = convolution(dynamic=True, bias=False)
    assert bias_free.accumulator_bits() == bits_to_hold(bias_free._largest_sum())
    assert convolution(dynamic=True).accumulator_bits() in range(33, 38)


@pytest.mark.parametrize(
    ("kind", "module", "products"),
    [
        (RangeLinearQuantEltwiseMultWrapper, EltwiseMult(), 1),
        (RangeLinearQuantMatmulWrapper, Matmul(), 99),
    ],
)
def test_products_need_the_bits_of_their_largest_sum(kind, module, products) -> None:
    wrapper = kind(module.eval(), "op", grid(X, 8, Mode.SYMMETRIC))
    wrapper.connect({i: grid(X, 8, Mode.SYMMETRIC) for i in range(2)}, {})
    assert wrapper.accumulator_bits(99) == int(products * 128 * 128).bit_length() + 1


def test_accumulators_that_can_overflow_are_warned_of_with_the_bits_they_need(
    residual, residual_stats, images
) -> None:
    """Products of 16 by 16 bits in 32 saturate: worse than 6 bits, and nothing was said."""
    kwargs: dict[str, Any] = {"bits_activations": 16, "bits_parameters": 16, "mode": ASYMMETRIC}
    with pytest.warns(UserWarning, match="can overflow") as caught:
        narrow = quantized(residual, residual_stats, overrides={"right": {"bits_weights": 8}}, **kwargs)
    assert [str(warning.message) for warning in caught] == [
        "accumulators of 32 bits can overflow, and saturate then, in 'conv1' (35 bits), 'conv2' (37 bits), "
        "'left' (35 bits), 'fc' (36 bits): set bits_accum to 37, or quantize these layers to fewer bits"
    ]
    wide = quantized(residual, residual_stats, bits_accum=38, **kwargs)
    six = quantized(residual, residual_stats, bits_activations=6, bits_parameters=6, mode=ASYMMETRIC)
    noise = [signal_to_noise(residual, model, images) for model in (narrow, six, wide)]
    assert noise[0] < noise[1] < noise[2] - 40
