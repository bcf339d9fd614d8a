"""DoReFa-Net against its formulas in numpy, in double precision, and gradients against those of the formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distiller.quantization.affine import fake_quantize
from distiller.quantization.training.dorefa import (
    ClippedLinearQuantization,
    DorefaQuantizer,
    DorefaWeightQuantizer,
    clipped_linear_quantize,
    dorefa_quantize_weight,
)
from tests.quantization.training.low_bit_networks import gradients, low_bit_net

BITS = [2, 3, 4, 5, 6, 7, 8]


def weights(*shape: int, spread: float = 0.7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * spread


def numpy_quantize(x: np.ndarray, bits: int) -> np.ndarray:
    """quantize_k of the paper."""
    return np.round((2**bits - 1) * x) / (2**bits - 1)


def numpy_dorefa(w: np.ndarray, bits: int) -> np.ndarray:
    squashed = np.tanh(w)
    return 2 * numpy_quantize(squashed / (2 * np.abs(squashed).max()) + 0.5, bits) - 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (7, 4)])
def test_weights_are_those_of_the_paper(bits, shape):
    weight = weights(*shape)
    quantized = dorefa_quantize_weight(weight, bits)
    assert quantized.numpy() == pytest.approx(numpy_dorefa(weight.double().numpy(), bits), abs=1e-6)


def test_two_bits_by_hand():
    # tanh: 0.9, -0.9, 0.3, -0.5, 0;  / 1.8 + 0.5: 1, 0, 2/3, 2/9, 1/2;  * 3, rounded: 3, 0, 2, 1
    weight = torch.atanh(torch.tensor([0.9, -0.9, 0.3, -0.5, 0.0]))
    assert dorefa_quantize_weight(weight, 2).tolist() == pytest.approx([1, -1, 1 / 3, -1 / 3, 0])


def test_one_bit_is_the_sign_times_the_mean_magnitude():
    weight = torch.tensor([[0.5, -1.5], [0.25, -0.75]])
    assert dorefa_quantize_weight(weight, 1).tolist() == [[0.75, -0.75], [0.75, -0.75]]


@pytest.mark.parametrize("bits", [1, *BITS])
def test_pruned_weights_stay_exactly_zero(bits):
    """Distiller made 1 / (2^b - 1) of them, and with 1 bit +mean |w|."""
    weight = weights(8, 9)
    weight[:, ::3] = 0
    quantized = dorefa_quantize_weight(weight, bits)
    assert torch.equal(quantized == 0, weight == 0)
    assert torch.equal(quantized.sign(), weight.sign())


def test_one_bit_means_over_the_weights_that_are_not_pruned():
    assert dorefa_quantize_weight(torch.tensor([0.0, 2.0, -4.0, 0.0]), 1).tolist() == [0, 3, -3, 0]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_all_zeros_stay_zeros_with_finite_gradients(bits):
    weight = torch.zeros(3, 4)
    assert torch.equal(dorefa_quantize_weight(weight, bits), weight)
    assert gradients(lambda w: dorefa_quantize_weight(w, bits), weight)[0].isfinite().all()


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 8), st.integers(0, 10**6), st.floats(1e-3, 50))
def test_values_are_odd_numbers_over_the_largest(bits, seed, spread):
    weight = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * spread
    quantized = dorefa_quantize_weight(weight, bits)
    odd = quantized * (2**bits - 1)
    assert (odd - odd.round()).abs().max() < 1e-3
    assert bool((odd.round().abs() % 2 == 1).all())
    assert quantized.abs().max() == 1
    assert quantized.unique().numel() <= 2**bits


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_gradient_is_that_of_the_formula_without_rounding(bits):
    weight, upstream = weights(5, 6).double(), weights(6, 5).T.double()

    def smooth(w: Tensor) -> Tensor:
        squashed = torch.tanh(w)
        return 2 * (squashed / (2 * squashed.abs().max()) + 0.5) - 1

    expected = gradients(smooth, weight, weights=upstream)[0]
    found = gradients(lambda w: dorefa_quantize_weight(w, bits), weight, weights=upstream)[0]
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_weight_gradient_shares_the_maximum_among_equal_weights():
    weight = torch.tensor([0.5, -0.5, 0.1], dtype=torch.double)
    upstream = torch.tensor([1.0, 2.0, 5.0], dtype=torch.double)
    expected = gradients(lambda w: w.tanh() / w.tanh().abs().max(), weight, weights=upstream)[0]
    found = gradients(lambda w: dorefa_quantize_weight(w, 4), weight, weights=upstream)[0]
    assert torch.allclose(found, expected)


def test_one_bit_gradient_passes_unchanged():
    upstream = weights(4, 3, spread=2)
    found = gradients(lambda w: dorefa_quantize_weight(w, 1), weights(4, 3), weights=upstream)[0]
    assert torch.equal(found, upstream)


def test_gradients_reach_pruned_weights():
    weight = torch.tensor([0.0, 0.5, -0.2])
    for bits in (1, 4):
        found = gradients(lambda w, bits=bits: dorefa_quantize_weight(w, bits), weight)[0]
        assert found[0] != 0


@pytest.mark.parametrize("bits", [1, *BITS])
@pytest.mark.parametrize("clip", [1.0, 0.5, 6.0])
def test_activations_are_clipped_and_on_even_steps(bits, clip):
    x = weights(500, spread=clip)
    expected = numpy_quantize(np.clip(x.double().numpy(), 0, clip) / clip, bits) * clip
    assert clipped_linear_quantize(x, bits, clip).numpy() == pytest.approx(expected, abs=1e-6)


def test_activation_gradient_passes_between_the_ends():
    x = torch.tensor([-3.0, -1e-6, 0.0, 1e-6, 0.5, 0.999, 1.001, 7.0])
    found = gradients(lambda x: clipped_linear_quantize(x, 4), x, weights=torch.arange(1.0, 9.0))[0]
    assert found.tolist() == [0, 0, 0, 4, 5, 6, 0, 0]


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_grids_hold_what_the_modules_compute(bits):
    x = weights(200)
    activations = ClippedLinearQuantization(bits, 0.5)
    grid = activations.grid
    assert (grid.qmin, grid.qmax) == (0, 2**bits - 1)
    assert torch.equal(activations(x), fake_quantize(x, grid.scale, grid.zero_point, grid.qmin, grid.qmax))
    weight = weights(20, 10)
    weight[::2, 0] = 0
    quantizer = DorefaWeightQuantizer(bits)
    grid = quantizer.weight_grid(weight)
    integers = quantizer(weight) / grid.scale
    assert torch.allclose(integers, integers.round(), atol=1e-3)
    assert integers.abs().max().round() == grid.qmax == -grid.qmin
    assert grid.zero_point == 0


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
@pytest.mark.parametrize("bits", [1, 4])
def test_types_and_memory_formats_are_kept(dtype, bits):
    weight = weights(4, 6, 3, 3).to(dtype, memory_format=torch.channels_last)
    for function in (dorefa_quantize_weight, clipped_linear_quantize):
        y = function(weight, bits)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        single = function(weight.float(), bits)
        assert (y.float() - single).abs().max() <= (1 if bits == 1 else 2 / 15 + 0.02)
        assert (y.float() - single).abs().mean() < 0.01


def test_quantizer_puts_the_clipping_where_relus_were():
    model = low_bit_net()
    model.relu2 = nn.ReLU6()
    DorefaQuantizer(model, bits_activations=4, bits_weights=3).prepare_model()
    assert isinstance(model.relu1, ClippedLinearQuantization)
    assert isinstance(model.relu2, ClippedLinearQuantization)
    assert (model.relu1.num_bits, model.relu1.clip_val) == (4, 1.0)
    original = model.conv2.parametrizations.weight.original  # type: ignore[union-attr]
    assert torch.equal(model.conv2.weight, dorefa_quantize_weight(original, 3))


def test_a_bias_is_linear_over_its_own_range():
    """Distiller put it through the formula of the weights, which made its largest value 1."""
    model = low_bit_net()
    before = model.fc.bias.detach().clone()
    DorefaQuantizer(model, bits_weights=3, bits_bias=8).prepare_model()
    assert (model.fc.bias - before).abs().max() < before.abs().max() / 250


def test_one_bit_is_a_width_and_so_is_what_means_full_precision():
    """32 bits, Distiller's default, quantized to 32 bits there."""
    model = low_bit_net()
    quantizer = DorefaQuantizer(
        model, bits_activations=32, bits_weights=1, overrides={"fc": {"bits_weights": 32}}
    )
    quantizer.prepare_model()
    assert isinstance(model.relu1, nn.ReLU)
    assert not hasattr(model.fc, "parametrizations")
    assert model.conv2.weight.abs().unique().numel() == 1
