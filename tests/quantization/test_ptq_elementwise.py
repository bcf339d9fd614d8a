"""Additions, products and concatenations against what integer hardware computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distiller.modules import BatchMatmul, Concat, EltwiseAdd, EltwiseMult, EltwiseSub, Matmul, Stack
from distiller.quantization.activation_quant import ActivationQuantizer, QuantSettings
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.ptq_elementwise import (
    RangeLinearQuantConcatWrapper,
    RangeLinearQuantEltwiseAddWrapper,
    RangeLinearQuantEltwiseMultWrapper,
    RangeLinearQuantEltwiseSubWrapper,
    RangeLinearQuantMatmulWrapper,
    RangeLinearQuantStackWrapper,
)
from distiller.quantization.ptq_wrapper import RangeLinearQuantWrapper
from tests.quantization.integer_reference import assert_same_but_for_ties, integers, requantized

MODES = [Mode.SYMMETRIC, Mode.ASYMMETRIC_UNSIGNED, Mode.ASYMMETRIC_SIGNED]
A = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(4))
B = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(5)) * 2 + 1


def quantizer(x: Tensor, mode: Mode, bits: int = 8, half_range: bool = False) -> ActivationQuantizer:
    settings = QuantSettings(bits, mode, clip_half_range=half_range)
    return ActivationQuantizer(settings, {"min": x.min().item(), "max": x.max().item()}, "x")


def wrapped(
    kind: type[RangeLinearQuantWrapper], module: nn.Module, inputs: list[Tensor], mode: Mode, **kwargs
) -> RangeLinearQuantWrapper:
    half_range = kwargs.pop("half_range", False)
    output = quantizer(module(*inputs), mode, half_range=half_range)
    wrapper = kind(module.eval(), "op", output, **kwargs)
    wrapper.connect({i: quantizer(x, mode) for i, x in enumerate(inputs)}, {})
    return wrapper


def real_levels(wrapper: RangeLinearQuantWrapper, inputs: list[Tensor]) -> list[np.ndarray]:
    """Integers of the inputs with their zero points taken off."""
    return [
        integers(wrapper.input_grids[i](x), wrapper.input_grids[i]) - int(wrapper.input_grids[i].zero_point)
        for i, x in enumerate(inputs)
    ]


def scales(wrapper: RangeLinearQuantWrapper) -> list[float]:
    return [grid.scale.double().item() for grid in wrapper.input_grids.values()]


def compare(wrapper: RangeLinearQuantWrapper, inputs: list[Tensor], accumulator, scale) -> None:
    output = wrapper.output_quant
    assert output is not None
    expected, from_tie = requantized(accumulator, scale, output, output.settings.clip_half_range)
    assert_same_but_for_ties(integers(wrapper(*inputs), output), expected, from_tie)


@pytest.mark.parametrize("half_range", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_addition_at_the_outputs_scale(mode, half_range) -> None:
    wrapper = wrapped(RangeLinearQuantEltwiseAddWrapper, EltwiseAdd(), [A, B], mode, half_range=half_range)
    (q_a, q_b), (s_a, s_b) = real_levels(wrapper, [A, B]), scales(wrapper)
    compare(wrapper, [A, B], q_a * s_a + q_b * s_b, 1.0)


@pytest.mark.parametrize("mode", MODES)
def test_subtraction_at_the_outputs_scale(mode) -> None:
    wrapper = wrapped(RangeLinearQuantEltwiseSubWrapper, EltwiseSub(), [A, B], mode)
    (q_a, q_b), (s_a, s_b) = real_levels(wrapper, [A, B]), scales(wrapper)
    compare(wrapper, [A, B], q_a * s_a - q_b * s_b, 1.0)


@pytest.mark.parametrize("mode", MODES)
def test_stacking_at_the_outputs_scale(mode) -> None:
    wrapper = wrapped(RangeLinearQuantStackWrapper, Stack(1), [A, B], mode)
    (q_a, q_b), (s_a, s_b) = real_levels(wrapper, [A, B]), scales(wrapper)
    compare(wrapper, [A, B], np.stack([q_a * s_a, q_b * s_b], 1), 1.0)


@pytest.mark.parametrize("mode", MODES)
def test_concatenation_at_the_outputs_scale(mode) -> None:
    wrapper = wrapped(RangeLinearQuantConcatWrapper, Concat(), [A, B], mode)
    (q_a, q_b), (s_a, s_b) = real_levels(wrapper, [A, B]), scales(wrapper)
    compare(wrapper, [A, B], np.concatenate([q_a * s_a, q_b * s_b], 1), 1.0)


@pytest.mark.parametrize("mode", MODES)
def test_product_has_the_product_of_the_scales(mode) -> None:
    wrapper = wrapped(RangeLinearQuantEltwiseMultWrapper, EltwiseMult(), [A, B], mode)
    (q_a, q_b), (s_a, s_b) = real_levels(wrapper, [A, B]), scales(wrapper)
    compare(wrapper, [A, B], q_a * q_b, s_a * s_b)


@pytest.mark.parametrize("bits_accum", [32, 12])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("module", "a", "b"), [(Matmul(), A, B), (BatchMatmul(), A[0], B[0])])
def test_matrix_product_accumulates_and_saturates(module, a, b, mode, bits_accum) -> None:
    wrapper = wrapped(RangeLinearQuantMatmulWrapper, module, [a, b], mode, bits_accum=bits_accum)
    (q_a, q_b), (s_a, s_b) = real_levels(wrapper, [a, b]), scales(wrapper)
    limit = 2 ** (bits_accum - 1)
    compare(wrapper, [a, b], np.clip(q_a @ q_b, -limit, limit - 1), s_a * s_b)


def approximation_error(factor: float, bits: int) -> float:
    n = np.floor(np.log2((2**bits - 1) / factor))
    return np.floor(factor * 2**n) / 2**n / factor


def test_approximated_rescaling_of_an_addition_is_of_each_input() -> None:
    wrapper = wrapped(
        RangeLinearQuantEltwiseAddWrapper, EltwiseAdd(), [A, B], Mode.SYMMETRIC, scale_approx_mult_bits=5
    )
    (q_a, q_b), (s_a, s_b) = real_levels(wrapper, [A, B]), scales(wrapper)
    s_out = wrapper.output_quant.scale.double().item()  # type: ignore[union-attr]
    error_a, error_b = approximation_error(s_a / s_out, 5), approximation_error(s_b / s_out, 5)
    assert min(error_a, error_b) < 0.99
    compare(wrapper, [A, B], q_a * s_a * error_a + q_b * s_b * error_b, 1.0)


def test_approximated_rescaling_of_a_product_is_of_the_accumulator() -> None:
    wrapper = wrapped(
        RangeLinearQuantEltwiseMultWrapper, EltwiseMult(), [A, B], Mode.SYMMETRIC, scale_approx_mult_bits=5
    )
    (q_a, q_b), (s_a, s_b) = real_levels(wrapper, [A, B]), scales(wrapper)
    s_out = wrapper.output_quant.scale.double().item()  # type: ignore[union-attr]
    compare(wrapper, [A, B], q_a * q_b, s_a * s_b * approximation_error(s_a * s_b / s_out, 5))


@pytest.mark.parametrize(
    ("kind", "module"),
    [(RangeLinearQuantEltwiseAddWrapper, EltwiseAdd()), (RangeLinearQuantMatmulWrapper, Matmul())],
)
def test_a_fake_operation_is_that_of_floating_point_between_quantizers(kind, module) -> None:
    wrapper = wrapped(
        kind, module, [A, B], Mode.SYMMETRIC, bits_accum=4, scale_approx_mult_bits=2, is_fake=True
    )
    a, b = (wrapper.input_grids[i](x) for i, x in enumerate((A, B)))
    assert wrapper.output_quant is not None
    assert torch.equal(wrapper(A, B), wrapper.output_quant(module(a, b)))
    assert wrapper.accumulator_bits(99) is None
