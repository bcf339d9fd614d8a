"""Ternary weights against the formulas of TWN and TTQ in numpy, written as loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distiller.errors import QuantizationError, UsageError
from distiller.quantization.training.ternary import (
    LearnedTernaryWeights,
    TernaryQuantizer,
    TernaryWeightQuantizer,
    initial_ternary_scales,
    ttq_weight,
    twn_weight,
)
from distiller.quantization.training.weight_quantizers import OutputChannels
from tests.quantization.training.low_bit_networks import ENDS, gradients, low_bit_net, sgd, train

CHANNELS = [None, OutputChannels()]


def weights(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6)) * 0.3


def parts(w: np.ndarray, channels) -> list[np.ndarray]:
    """What shares its values, as views."""
    return [w] if channels is None else list(w)


def numpy_twn(w: np.ndarray, channels, threshold: float = 0.7) -> np.ndarray:
    ternary = np.zeros_like(w)
    for part, values in zip(parts(w, channels), parts(ternary, channels), strict=True):
        size = np.abs(part)
        is_large = size > threshold * size[size > 0].mean()
        values[is_large] = np.sign(part[is_large]) * size[is_large].mean()
    return ternary


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.5])
def test_twn_is_the_papers(channels, threshold):
    weight = weights(5, 4, 3, 3)
    found = twn_weight(weight, threshold, channels)
    assert found.numpy() == pytest.approx(
        numpy_twn(weight.double().numpy(), channels, threshold), rel=1e-6, abs=0
    )


def test_twn_by_hand():
    # mean |w| = 0.5, D = 0.35, those above: 0.9, 0.4, 0.8, of mean 0.7
    found = twn_weight(torch.tensor([0.9, -0.4, 0.1, -0.8, 0.3]))
    assert found.tolist() == pytest.approx([0.7, -0.7, 0, -0.7, 0])


@pytest.mark.parametrize("channels", CHANNELS)
def test_pruned_weights_stay_zero_and_do_not_lower_the_threshold(channels):
    weight = weights(6, 40)
    dense = twn_weight(weight, 0.7, channels)
    padded = torch.cat([weight, torch.zeros(6, 200)], dim=1)
    found = twn_weight(padded, 0.7, channels)
    assert torch.allclose(found[:, :40], dense)
    assert not found[:, 40:].any()


@pytest.mark.parametrize("channels", CHANNELS)
def test_all_zeros_stay_zeros(channels):
    weight = weights(4, 6)
    weight[1] = 0
    for zeros in (weight, torch.zeros(4, 6)):
        scales = initial_ternary_scales(zeros, 0.05, channels)
        for found in (twn_weight(zeros, 0.7, channels), ttq_weight(zeros, *scales, 0.05, channels)):
            assert found.isfinite().all()
            assert not found[1].any()


def test_twn_gradient_passes_unchanged():
    upstream = weights(5, 6) * 3
    assert torch.equal(gradients(twn_weight, weights(5, 6), weights=upstream)[0], upstream)


def test_twn_grid_holds_the_weight():
    for channels in CHANNELS:
        weight = weights(5, 8)
        weight[0] = 0
        grid = TernaryWeightQuantizer(0.7, channels).weight_grid(weight)
        scale = grid.scale if channels is None else grid.scale[:, None]
        integers = TernaryWeightQuantizer(0.7, channels)(weight) / scale
        assert set(integers.unique().tolist()) == {-1, 0, 1}


def ttq_arguments(channels) -> tuple[Tensor, Tensor, Tensor]:
    weight = weights(5, 4, 3)
    shape = () if channels is None else (5,)
    generator = torch.Generator().manual_seed(8)
    return weight, torch.rand(shape, generator=generator) + 0.1, torch.rand(shape, generator=generator) + 0.1


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.4])
def test_ttq_and_its_gradients_are_the_papers(channels, threshold):
    weight, positive, negative = ttq_arguments(channels)
    upstream = weights(3, 4, 5).permute(2, 1, 0).contiguous() + 0.1
    w, g = weight.double().numpy(), upstream.double().numpy()
    expected, grad_w = np.zeros_like(w), g.copy()
    grad_p, grad_n = np.zeros(positive.numel()), np.zeros(positive.numel())
    rows = [(w, g, expected, grad_w)] if channels is None else zip(w, g, expected, grad_w, strict=True)
    for index, (part, grad, values, latent) in enumerate(rows):
        p, n = positive.flatten()[index].item(), negative.flatten()[index].item()
        bound = threshold * np.abs(part).max()
        above, below = part > bound, part < -bound
        values[above], values[below] = p, -n
        latent[above] *= p
        latent[below] *= n
        grad_p[index], grad_n[index] = grad[above].sum(), -grad[below].sum()

    found = ttq_weight(weight, positive, negative, threshold, channels)
    assert found.numpy() == pytest.approx(expected, rel=1e-6, abs=0)
    grads = gradients(
        lambda *args: ttq_weight(*args, threshold, channels), weight, positive, negative, weights=upstream
    )
    assert grads[0].numpy() == pytest.approx(grad_w, rel=1e-5)
    assert grads[1].flatten().numpy() == pytest.approx(grad_p, rel=1e-4, abs=1e-5)
    assert grads[2].flatten().numpy() == pytest.approx(grad_n, rel=1e-4, abs=1e-5)


def test_ttq_gradients_of_its_scales_are_finite_differences():
    weight, positive, negative = (value.double() for value in ttq_arguments(None))
    grads = gradients(ttq_weight, weight, positive, negative)
    for index, other in ((1, (positive + 1e-4, negative)), (2, (positive, negative + 1e-4))):
        difference = ttq_weight(weight, *other).sum() - ttq_weight(weight, positive, negative).sum()
        assert grads[index].item() == pytest.approx(difference.item() / 1e-4, rel=1e-6)


def test_ttq_scales_count_by_their_absolute_value():
    """An optimizer that carries one across zero must not turn the sign of weights."""
    weight, positive, negative = ttq_arguments(None)
    plain = ttq_weight(weight, positive, negative)
    assert torch.equal(ttq_weight(weight, positive, -negative), plain)
    forward = gradients(ttq_weight, weight, positive, negative)
    turned = gradients(ttq_weight, weight, positive, -negative)
    assert torch.equal(turned[0], forward[0])
    assert turned[2] == -forward[2]


@pytest.mark.parametrize("channels", CHANNELS)
def test_ttq_begins_with_the_scales_of_least_error(channels):
    weight = weights(5, 12)
    found = initial_ternary_scales(weight, 0.05, channels)
    for index, part in enumerate(parts(weight.numpy(), channels)):
        bound = 0.05 * np.abs(part).max()
        expected = part[part > bound].mean(), -part[part < -bound].mean()
        assert [scale.flatten()[index].item() for scale in found] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
@pytest.mark.parametrize("channels", CHANNELS)
def test_types_and_memory_formats_are_kept(dtype, channels):
    weight = weights(4, 4, 3, 3).to(dtype, memory_format=torch.channels_last).requires_grad_()
    for quantizer in (TernaryWeightQuantizer(0.7, channels), LearnedTernaryWeights(weight, 0.05, channels)):
        found = quantizer(weight)
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=torch.channels_last)
        found.sum().backward()


def test_quantizer_makes_weights_ternary_and_leaves_activations():
    model = low_bit_net()
    quantizer = TernaryQuantizer(model, overrides={"fc": {"bits_weights": None, "bits_activations": None}})
    quantizer.prepare_model()
    original = model.conv2.parametrizations.weight.original.detach().double().numpy()
    assert model.conv2.weight.detach().numpy() == pytest.approx(numpy_twn(original, None), rel=1e-6, abs=0)
    assert model.conv2.weight.unique().numel() == 3
    assert isinstance(model.relu1, nn.ReLU)
    assert not hasattr(model.fc, "parametrizations")
    assert quantizer.optimizer_groups() == []


def test_settings_by_layer():
    model = low_bit_net()
    overrides = {"conv2": {"threshold": 2.0}, "conv3": {"per_channel_wts": True}}
    TernaryQuantizer(model, overrides=overrides, threshold=0.1).prepare_model()
    assert [
        model.get_submodule(name).parametrizations.weight[0].threshold for name in ("first", "conv2")
    ] == [
        0.1,
        2.0,
    ]
    assert model.conv3.weight.abs().unique().numel() == 9
    assert model.fc.weight.abs().unique().numel() == 2


def test_learned_scales_are_a_group_of_their_own():
    model = low_bit_net()
    optimizer = sgd(model)
    quantizer = TernaryQuantizer(model, optimizer, overrides=ENDS, learned_scales=True, scale_lr_factor=0.2)
    quantizer.prepare_model()
    _, scales = optimizer.param_groups
    assert len(scales["params"]) == 4
    assert (scales["lr"], scales["weight_decay"]) == (pytest.approx(0.01), 0)
    before = [scale.detach().clone() for scale in scales["params"]]
    train(model, optimizer, 3)
    assert all(old != new for old, new in zip(before, scales["params"], strict=True))
    assert model.conv2.weight.unique().numel() == 3


def test_learned_scales_of_each_channel():
    model = low_bit_net()
    quantizer = TernaryQuantizer(model, learned_scales=True, per_channel_wts=True)
    quantizer.prepare_model()
    learned = quantizer.learned_parameters()
    assert [tuple(p.shape) for name, p in learned.items() if name.startswith("fc")] == [(4,), (4,)]


@pytest.mark.parametrize(
    "given, text",
    [
        (
            {"bits_weights": 3},
            "bits_weights: must be 2, or 0, 32 or null for full precision with TernaryQuantizer, got 3",
        ),
        (
            {"overrides": {"relu1": {"bits_activations": 4}}},
            "relu1: bits_activations: must be 0, 32 or null for full precision with TernaryQuantizer, got 4",
        ),
        ({"threshold": -0.1}, "threshold: must be a number from 0, in units of mean |W|, got -0.1"),
        (
            {"threshold": 1.0, "learned_scales": True},
            "threshold: must be a number from 0, in units of max |W|, below 1, got 1.0",
        ),
        (
            {"overrides": {"fc": {"threshold": "low"}}},
            "overrides['fc'].threshold: must be a number from 0, in units of mean |W|, got 'low'",
        ),
        ({"scale_lr_factor": float("nan")}, "scale_lr_factor: must be a number from 0, got nan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given, text):
    with pytest.raises(QuantizationError) as refused:
        TernaryQuantizer(low_bit_net(), **given)
    assert str(refused.value) == text


def test_flags_that_are_none_are_refused():
    with pytest.raises(
        UsageError, match=r"^TernaryQuantizer: learned_scales: must be true or false, got int"
    ):
        TernaryQuantizer(low_bit_net(), learned_scales=1)  # type: ignore[arg-type]
    with pytest.raises(
        UsageError, match=r"overrides\['fc'\]\.per_channel_wts: must be true or false, got int"
    ):
        TernaryQuantizer(low_bit_net(), overrides={"fc": {"per_channel_wts": 1}})
