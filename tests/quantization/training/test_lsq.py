"""LSQ against the paper: its initial steps, which tensors are quantized, and its pseudo-code over a whole layer."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distiller.errors import QuantizationError
from distiller.quantization.training.lsq import (
    LearnedStepActivations,
    LearnedStepWeights,
    LSQQuantizer,
    initial_step,
)
from distiller.quantization.training.weight_quantizers import OutputChannels
from distiller.registry import QUANTIZERS
from tests.quantization.training.qat_networks import net, outputs, sgd, train


def prepared(model=None, optimizer=None, **settings):
    model = net() if model is None else model
    quantizer = LSQQuantizer(model, optimizer, **settings)
    quantizer.prepare_model()
    return model, quantizer


def test_the_first_step_is_that_of_the_paper():
    x = torch.randn(3, 50)
    for row, step in zip(x, initial_step(x, 7), strict=True):
        assert step.item() == pytest.approx(2 * row.abs().mean().item() / math.sqrt(7))
    assert initial_step(torch.zeros(4), 7) == 1


def test_steps_of_weights_begin_from_the_weights_and_masked_ones_do_not_count():
    weight = torch.randn(4, 3, 3, 3)
    per_tensor, per_channel = LearnedStepWeights(4), LearnedStepWeights(4, OutputChannels(), 4)
    per_tensor(weight)
    per_channel(weight)
    assert per_tensor.step_size.item() == pytest.approx(2 * weight.abs().mean().item() / math.sqrt(7))
    expected = [2 * w.abs().mean().item() / math.sqrt(7) for w in weight]
    assert per_channel.step_size.tolist() == pytest.approx(expected)
    masked = weight.clone()
    masked[:, 1:] = 0
    masked[3] = 0
    per_channel = LearnedStepWeights(4, OutputChannels(), 4)
    quantized = per_channel(masked)
    expected = [2 * w[0].abs().mean().item() / math.sqrt(7) for w in weight[:3]]
    assert per_channel.step_size.tolist() == pytest.approx([*expected, 1.0])
    assert (quantized[masked == 0] == 0).all()


def test_the_first_training_batch_sets_the_step_of_activations_once():
    quantizer = LearnedStepActivations(4, is_signed=False)
    x = torch.rand(8, 30)
    quantizer(x)
    assert quantizer.step_size.item() == pytest.approx(2 * x.mean().item() / math.sqrt(15), rel=1e-5)
    before = quantizer.step_size.item()
    quantizer(x * 10)
    assert quantizer.step_size.item() == before


def test_activations_that_saw_no_batch_are_refused_in_evaluation():
    quantizer = LearnedStepActivations(4, is_signed=True, where="conv1").eval()
    for use in (lambda: quantizer(torch.zeros(3)), lambda: quantizer.grid):
        with pytest.raises(QuantizationError) as error:
            use()
        assert str(error.value) == (
            "conv1: has seen no training batch, its step size is not known; train first, or load a trained checkpoint"
        )
    loaded = LearnedStepActivations(4, is_signed=True)
    loaded(torch.ones(3, 3))
    quantizer.load_state_dict(loaded.state_dict())
    assert quantizer.grid.scale == loaded.step_size


def test_which_tensors_are_quantized_and_how():
    model, _ = prepared(bits_activations=4, bits_weights=3)
    quantizers = {
        name: m.input_quantizer for name, m in model.named_modules() if hasattr(m, "input_quantizer")
    }
    assert set(quantizers) == {"conv1", "left", "right", "fc", "fc2"}
    assert quantizers["left"] is quantizers["right"]  # one tensor, one step
    assert {name: q.is_signed for name, q in quantizers.items()} == {
        "conv1": True,  # the model's input
        "left": False,
        "right": False,
        "fc": False,
        "fc2": True,
    }
    grid = (quantizers["fc2"].train()(torch.randn(4, 4)), quantizers["fc2"].grid)[1]
    assert (grid.qmin, grid.qmax) == (-8, 7)
    assert isinstance(model.relu1, nn.ReLU)


def test_layers_of_other_widths_do_not_share():
    model, _ = prepared(
        bits_activations=4, overrides={"left": {"bits_activations": 8}, "fc": {"bits_activations": None}}
    )
    assert model.left.input_quantizer is not model.right.input_quantizer
    assert not hasattr(model.fc, "input_quantizer")


def test_a_layer_is_the_papers_pseudo_code():
    torch.manual_seed(0)
    bits = 3
    layer = nn.Conv2d(2, 4, 3)
    model = nn.Sequential(nn.ReLU(), layer)
    w, b = layer.weight.detach().clone().requires_grad_(), layer.bias
    quantizer = LSQQuantizer(model, bits_activations=bits, bits_weights=bits)
    x = torch.randn(5, 2, 6, 6)
    quantizer.prepare_model(x)
    y = model.train()(x)
    upstream = torch.randn(y.shape)
    y.backward(upstream)

    def paper(v, s, p, is_activation):
        q_n, q_p = (0, 2**p - 1) if is_activation else (2 ** (p - 1), 2 ** (p - 1) - 1)
        count = v[0].numel() if is_activation else v.numel()
        factor = 1 / math.sqrt(count * q_p)
        s = (s - s * factor).detach() + s * factor
        v = torch.clamp(v / s, -q_n, q_p)
        return ((v.round() - v).detach() + v) * s

    a = F.relu(x)
    s_w = (2 * w.detach().abs().mean() / math.sqrt(3)).requires_grad_()
    s_a = (2 * a.mean() / math.sqrt(7)).requires_grad_()
    reference = F.conv2d(paper(a, s_a, bits, True), paper(w, s_w, bits, False), b)
    assert torch.allclose(y, reference, atol=1e-5)
    expected = torch.autograd.grad(reference, (w, s_w, s_a), upstream)
    own = (
        layer.parametrizations.weight.original.grad,
        layer.parametrizations.weight[0].step_size.grad,
        layer.input_quantizer.step_size.grad,
    )
    for mine, theirs in zip(own, expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-5)


def test_step_sizes_have_a_rate_and_weight_decay_of_their_own():
    model = net()
    optimizer = sgd(model)
    _, quantizer = prepared(
        model,
        optimizer,
        bits_activations=4,
        bits_weights=4,
        step_size_lr_factor=0.1,
        step_size_weight_decay=1e-5,
    )
    group = optimizer.param_groups[1]
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (pytest.approx(0.005), 1e-5, 0.9)
    assert len(group["params"]) == len(quantizer.learned_parameters()) == 5 + 4
    before = {name: p.item() for name, p in quantizer.learned_parameters().items()}
    train(model, optimizer)
    assert all(p.item() != before[name] for name, p in quantizer.learned_parameters().items())


def test_an_optimizer_without_weight_decay_is_fine():
    class Plain(torch.optim.Optimizer):
        def __init__(self, params) -> None:
            super().__init__(params, {"lr": 0.1})

    model = net()
    optimizer = Plain(model.parameters())
    prepared(model, optimizer, bits_weights=4)
    assert set(optimizer.param_groups[1]) == {"params", "lr"}


def test_weights_per_channel_of_single_layers():
    model, _ = prepared(bits_weights=4, per_channel_wts=True, overrides={"fc2": {"per_channel_wts": False}})
    assert model.conv1.parametrizations.weight[0].step_size.shape == (6,)
    assert model.fc2.parametrizations.weight[0].step_size.shape == ()
    grouped = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ReLU())
    quantizer = LSQQuantizer(grouped, bits_weights=2, per_channel_wts=True)
    quantizer.prepare_model()
    assert grouped[0].parametrizations.weight[0].step_size.shape == (6,)
    grouped(torch.randn(1, 4, 3, 3)).sum().backward()


def test_folded_weights_set_the_first_step():
    model, _ = prepared(bits_weights=4, simulate_bn_folding=True)
    folded = model.conv1.folding.folded_weight(model.conv1.full_precision_weight).detach()
    expected = 2 * folded.abs().mean().item() / math.sqrt(7)
    assert model.conv1.folding.quantizer.step_size.item() == pytest.approx(expected, rel=1e-5)


def test_a_rebuilt_model_keeps_the_learned_steps():
    model, _ = prepared(optimizer=None, bits_activations=4, bits_weights=4)
    train(model, sgd(model), 2)
    steps = {name: p.detach().clone() for name, p in model.named_parameters() if "step_size" in name}
    outputs(model)
    again, _ = prepared(bits_activations=4, bits_weights=4)
    again.load_state_dict(model.state_dict())
    train(again, torch.optim.SGD(again.parameters(), lr=0.0), 1)
    assert all(torch.equal(dict(again.named_parameters())[name], step) for name, step in steps.items())


def test_wrong_settings_are_refused():
    with pytest.raises(QuantizationError) as error:
        LSQQuantizer(net(), step_size_lr_factor=-1)
    assert str(error.value) == "step_size_lr_factor: must be a number from 0, got -1"
    with pytest.raises(ValueError, match=r"overrides\['fc'\].per_channel_wts: must be true or false"):
        LSQQuantizer(net(), overrides={"fc": {"per_channel_wts": 1}})
    assert QUANTIZERS["LSQQuantizer"] is LSQQuantizer
