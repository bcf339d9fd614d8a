import pytest
import torch
from torch import nn

from distiller.replay import Variant, applied
from tests.sensitivity.conftest import TinyCnn


@pytest.fixture
def model():
    torch.manual_seed(7)
    return TinyCnn()


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_tensors_and_inputs_are_those_of_the_variant_while_it_is_applied(model):
    before = state(model)
    variant = Variant(
        {"fc.weight": torch.ones(3, 5), "bn.running_mean": torch.full((4,), 2.0)}, {"conv2": torch.neg}
    )
    seen = []
    model.conv2.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x = torch.randn(2, 1, 8, 8)
    with applied(model, variant):
        assert model.fc.weight.eq(1).all()
        assert model.bn.running_mean.eq(2).all()
        model.eval()(x)
    model(x)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    model.bn.running_mean.fill_(2)
    with torch.no_grad():
        model(x)
    assert torch.equal(seen[0], -seen[2])


def test_the_model_comes_back_after_an_error_and_with_gradients_asked_for(model):
    before = state(model)
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        applied(model, Variant({"fc.weight": torch.ones(3, 5)})),
    ):
        raise RuntimeError("out of memory")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.fc.weight.requires_grad
    assert torch.is_grad_enabled()


def test_a_wrapped_model_goes_by_the_same_names(model):
    with applied(nn.DataParallel(model), Variant({"fc.bias": torch.ones(3)})):
        assert model.fc.bias.eq(1).all()
    assert not model.fc.bias.eq(1).all()
