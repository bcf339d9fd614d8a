"""PACT against its equations, and what the optimizer gets of it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distiller.errors import QuantizationError
from distiller.quantization.affine import fake_quantize
from distiller.quantization.quantizer import rebuild_quantized
from distiller.quantization.training.dorefa import dorefa_quantize_weight
from distiller.quantization.training.pact import (
    LearnedClippedLinearQuantization,
    PACTQuantizer,
    pact_quantize,
)
from tests.quantization.training.low_bit_networks import ENDS, gradients, low_bit_net, outputs, sgd, train


def values(count: int = 600) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(2)) * 3


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("alpha", [0.3, 2.0, 8.0])
def test_forward_is_equations_1_and_2(bits, alpha):
    x = values().double().numpy()
    y = 0.5 * (np.abs(x) - np.abs(x - alpha) + alpha)
    steps = (2**bits - 1) / alpha
    expected = np.round(y * steps) / steps
    found = pact_quantize(values(), torch.tensor(alpha), bits)
    assert found.numpy() == pytest.approx(expected, abs=1e-6 * alpha)


def test_four_levels_by_hand():
    x = torch.tensor([-1.0, 0.4, 0.6, 1.4, 2.0, 2.6, 3.0, 9.0])
    assert pact_quantize(x, torch.tensor(3.0), 2).tolist() == [0, 0, 1, 1, 2, 3, 3, 3]


@pytest.mark.parametrize("alpha", [0.3, 1.7, 3.0, 7.9])
def test_gradients_are_equation_3(alpha):
    x = torch.cat([values(), torch.tensor([alpha, 0.0, -0.0])])  # alpha itself is clipped, and 0 as by a ReLU
    upstream = torch.linspace(-1, 2, x.numel())
    clip = torch.tensor(alpha)
    grad_x, grad_alpha = gradients(lambda x, a: pact_quantize(x, a, 4), x, clip, weights=upstream)
    is_clipped = x.numpy() >= clip.numpy()
    passes = (x.numpy() > 0) & ~is_clipped
    assert np.array_equal(grad_x.numpy(), np.where(passes, upstream.numpy(), 0))
    assert grad_alpha.item() == pytest.approx(upstream.double().numpy()[is_clipped].sum(), rel=1e-5)


def test_no_gradient_of_a_clipping_value_that_clips_nothing():
    _, grad_alpha = gradients(lambda x, a: pact_quantize(x, a, 4), values(), torch.tensor(100.0))
    assert grad_alpha == 0


@pytest.mark.parametrize("alpha", [0.0, -2.0])
def test_a_clipping_value_that_is_not_positive_can_recover(alpha):
    x = values()
    found = pact_quantize(x, torch.tensor(alpha), 4)
    assert found.isfinite().all()
    assert found.abs().max() < 1e-30
    grad_x, grad_alpha = gradients(lambda x, a: pact_quantize(x, a, 4), x, torch.tensor(alpha))
    assert grad_alpha == (x > 0).sum()
    assert not grad_x.any()


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_types_and_memory_formats_are_kept(dtype):
    module = LearnedClippedLinearQuantization(4, 2.0)
    x = values(576).reshape(4, 4, 6, 6).to(dtype, memory_format=torch.channels_last)
    x.requires_grad_()
    y = module(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert module.clip_val.grad is not None
    assert module.clip_val.grad.item() == (x >= 2).sum()  # summed in single precision


def test_grid_holds_what_the_module_computes():
    module, x = LearnedClippedLinearQuantization(3, 2.5), values()
    grid = module.grid
    assert torch.equal(module(x), fake_quantize(x, grid.scale, grid.zero_point, grid.qmin, grid.qmax))
    assert (grid.qmin, grid.qmax, grid.zero_point.item()) == (0, 7, 0)


def test_its_input_may_be_changed_in_place_afterwards():
    x = values().requires_grad_()
    hidden = x * 1
    y = LearnedClippedLinearQuantization(4)(hidden)
    hidden.add_(1)
    y.sum().backward()


def prepared(**settings):
    model = low_bit_net()
    optimizer = sgd(model)
    quantizer = PACTQuantizer(model, optimizer, 4, 3, overrides={"fc": {"bits_weights": None}}, **settings)
    quantizer.prepare_model()
    return model, optimizer, quantizer


def test_relus_get_clipping_values_and_weights_are_dorefas():
    model, _, _ = prepared(act_clip_init_val=5.0)
    assert isinstance(model.relu1, LearnedClippedLinearQuantization)
    assert (model.relu1.clip_val.item(), model.relu1.num_bits) == (5.0, 4)
    original = model.conv2.parametrizations.weight.original
    assert torch.equal(model.conv2.weight, dorefa_quantize_weight(original, 3))
    assert not hasattr(model.fc, "parametrizations")


def test_a_relu6_begins_at_6_at_most():
    for initial, expected in ((8.0, 6.0), (4.0, 4.0)):
        model = low_bit_net()
        model.relu2 = nn.ReLU6()
        PACTQuantizer(model, bits_activations=4, act_clip_init_val=initial).prepare_model()
        assert model.relu2.clip_val == expected


def test_clipping_values_are_a_group_of_their_own_with_their_weight_decay():
    model, optimizer, _ = prepared(act_clip_decay=0.02)
    weights, clips = optimizer.param_groups
    assert [id(p) for p in clips["params"]] == [id(model.relu1.clip_val), id(model.relu2.clip_val)]
    assert (clips["weight_decay"], weights["weight_decay"]) == (0.02, 1e-4)
    assert {id(p) for p in weights["params"]} == {id(p) for p in model.parameters()} - {
        id(p) for p in clips["params"]
    }


def test_without_a_decay_of_their_own_they_have_the_optimizers():
    _, optimizer, _ = prepared()
    assert optimizer.param_groups[1]["weight_decay"] == 1e-4
    assert optimizer.param_groups[1]["momentum"] == 0.9


def test_they_have_the_learning_rate_of_the_first_group_as_it_is_now():
    model = low_bit_net()
    optimizer = sgd(model)
    optimizer.param_groups[0]["lr"] = 0.003
    PACTQuantizer(model, optimizer, bits_activations=4).prepare_model()
    assert optimizer.param_groups[1]["lr"] == 0.003


def test_training_moves_clipping_values():
    model, optimizer, _ = prepared(act_clip_init_val=1.0, act_clip_decay=0.0)
    train(model, optimizer, 3)
    assert model.relu1.clip_val != 1
    assert model.relu2.clip_val != 1


def test_weight_decay_alone_makes_them_smaller_by_the_closed_form():
    model, optimizer, _ = prepared(act_clip_decay=0.5)
    model.relu1.clip_val.grad = torch.tensor(0.0)
    optimizer.step()
    assert model.relu1.clip_val.item() == pytest.approx(8 - 0.05 * 0.5 * 8)


def test_a_checkpoint_loads_with_its_settings_and_goes_on_in_the_same_groups():
    """Distiller's did not load: its quantizers asked for an optimizer, and the clip settings were not saved."""
    model, optimizer, quantizer = prepared(act_clip_init_val=1.5, act_clip_decay=0.1)
    train(model, optimizer, 2)
    state, optimizer_state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())

    twin = low_bit_net()
    rebuilt = rebuild_quantized(twin, quantizer.quantizer_metadata())
    assert rebuilt.settings() == quantizer.settings()
    twin.load_state_dict(state)
    assert torch.equal(outputs(twin), outputs(model))

    twin_optimizer = sgd(twin)  # has the clipping values in its only group
    PACTQuantizer(twin, twin_optimizer, **quantizer.settings()).prepare_model()
    assert [len(group["params"]) for group in twin_optimizer.param_groups] == [
        len(group["params"]) for group in optimizer.param_groups
    ]
    twin_optimizer.load_state_dict(optimizer_state)
    assert train(twin, twin_optimizer, 3) == train(model, optimizer, 3)
    assert torch.equal(outputs(twin), outputs(model))


def test_without_an_optimizer_it_prepares_for_evaluation():
    model = low_bit_net()
    quantizer = PACTQuantizer(model, bits_activations=4, bits_weights=4, overrides=ENDS, act_clip_decay=0.1)
    quantizer.prepare_model()
    assert outputs(model).isfinite().all()
    (group,) = quantizer.optimizer_groups()
    assert (len(group["params"]), group["weight_decay"]) == (1, 0.1)


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "8"])
def test_initial_clipping_values_that_are_none_are_refused(value):
    with pytest.raises(QuantizationError, match=r"^act_clip_init_val: must be a number above 0, got "):
        PACTQuantizer(low_bit_net(), act_clip_init_val=value)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), False, "0"])
def test_weight_decays_that_are_none_are_refused(value):
    with pytest.raises(
        QuantizationError, match=r"^act_clip_decay: must be a number from 0, or null for that"
    ):
        PACTQuantizer(low_bit_net(), act_clip_decay=value)


def test_a_weight_decay_that_the_optimizer_does_not_have_is_refused():
    model = low_bit_net()
    with pytest.raises(QuantizationError) as refused:
        PACTQuantizer(model, torch.optim.LBFGS(model.parameters()), act_clip_decay=0.1)
    assert str(refused.value) == "act_clip_decay: LBFGS has no weight decay; leave it out"
