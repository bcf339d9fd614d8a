from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from distiller.errors import UnknownNameError
from distiller.names import (
    canonical_state_dict,
    find_module,
    find_parameter,
    hidden_prefix,
    named_modules,
    named_parameters,
    owner,
    resolve,
    resolve_all,
    strip_wrappers,
    unwrap,
)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def parameter_names(model):
    return [name for name, _ in named_parameters(model)]


def test_names_of_a_plain_model_are_its_own(tiny_cnn):
    assert parameter_names(tiny_cnn) == [name for name, _ in tiny_cnn.named_parameters()]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compile"])
def test_a_wrapped_model_has_the_names_of_the_plain_one(tiny_cnn, wrap):
    wrapped = wrap(tiny_cnn)
    assert parameter_names(wrapped) == parameter_names(tiny_cnn)
    assert list(canonical_state_dict(wrapped)) == list(tiny_cnn.state_dict())
    assert [name for name, _ in named_modules(wrapped)] == [name for name, _ in tiny_cnn.named_modules()]
    assert unwrap(wrapped) is tiny_cnn


def test_a_wrapped_submodule_leaves_no_trace_in_names():
    model = nn.Sequential()
    model.add_module("features", nn.DataParallel(nn.Sequential(nn.Conv2d(1, 2, 3))))
    assert parameter_names(model) == ["features.0.weight", "features.0.bias"]


def test_an_attribute_that_is_called_module_but_is_no_wrapper_keeps_its_name():
    model = nn.Sequential()
    model.add_module("module", nn.Linear(2, 2))
    assert parameter_names(model) == ["module.weight", "module.bias"]
    assert resolve("module.weight", parameter_names(model)) == ("module.weight",)


def test_a_parametrized_weight_keeps_its_name(tiny_cnn):
    before = sorted(parameter_names(tiny_cnn))
    parametrize.register_parametrization(tiny_cnn.conv2, "weight", Doubled())
    assert sorted(parameter_names(tiny_cnn)) == before
    assert "conv2" in dict(named_modules(tiny_cnn))
    assert not any("parametrizations" in name for name, _ in named_modules(tiny_cnn))


@pytest.mark.parametrize(
    "asked",
    ["conv1.weight", "module.conv1.weight", "_orig_mod.conv1.weight", "module._orig_mod.conv1.weight"],
)
def test_names_are_accepted_with_and_without_wrapper_parts(tiny_cnn, asked):
    assert resolve(asked, parameter_names(tiny_cnn)) == ("conv1.weight",)


def test_a_pattern_stands_for_all_it_matches_in_the_models_order(tiny_cnn):
    assert resolve("module.conv?.weight", parameter_names(tiny_cnn)) == ("conv1.weight", "conv2.weight")


def test_a_pattern_stands_for_no_parameter_of_a_parametrization():
    names = ["conv.parametrizations.weight.0.step_size", "conv.weight"]
    assert resolve("*", names) == resolve("*weight*", names) == ("conv.weight",)
    assert resolve(names[0], names) == (names[0],)


def test_an_unknown_name_is_refused_with_the_nearest_one(tiny_cnn):
    with pytest.raises(UnknownNameError) as caught:
        resolve("module.conv1.weigth", parameter_names(tiny_cnn))
    assert (
        str(caught.value) == "no parameter 'module.conv1.weigth' in the model; did you mean 'conv1.weight'?"
    )


def test_of_a_layer_that_became_several_the_hint_names_the_first_part():
    """The hint was another layer, whose name is more alike."""
    names = ["fc1.first.weight", "fc1.second.weight", "fc1.second.bias", "fc3.weight"]
    with pytest.raises(UnknownNameError) as caught:
        resolve("fc1.weight", names)
    assert str(caught.value) == "no parameter 'fc1.weight' in the model; did you mean 'fc1.first.weight'?"
    with pytest.raises(UnknownNameError, match="did you mean 'fc1.second.bias'"):
        resolve("module.fc1.bias", names)


def test_a_pattern_that_matches_nothing_is_refused(tiny_cnn):
    with pytest.raises(UnknownNameError, match=r"pattern 'layer\*' matches no parameter of the model"):
        resolve("layer*", parameter_names(tiny_cnn))


def test_all_unknown_names_are_told_at_once(tiny_cnn):
    with pytest.raises(UnknownNameError) as caught:
        resolve_all(["conv1.weight", "a.b", "c.d"], parameter_names(tiny_cnn))
    assert list(caught.value.faults) == ["a.b", "c.d"]


def test_a_name_asked_for_twice_counts_once(tiny_cnn):
    assert resolve_all(["fc.bias", "fc.*"], parameter_names(tiny_cnn)) == ("fc.bias", "fc.weight")


def test_parameters_and_modules_are_found_by_name(tiny_cnn):
    assert find_parameter(tiny_cnn, "module.fc.bias") is tiny_cnn.fc.bias
    assert find_module(tiny_cnn, "conv1") is tiny_cnn.conv1
    with pytest.raises(UnknownNameError, match="matches 2 modules where one is wanted"):
        find_module(tiny_cnn, "relu?")


def test_owner_and_strip():
    assert owner("layer1.0.conv.weight") == "layer1.0.conv"
    assert strip_wrappers("features.module.0.weight") == "features.0.weight"


def test_hidden_prefix_is_that_of_a_parametrizations_own_tensors() -> None:
    layer = nn.Sequential(nn.Linear(2, 2))
    parametrize.register_parametrization(layer[0], "weight", nn.PReLU())
    own = set(canonical_state_dict(layer)) - {"0.weight", "0.bias"}
    assert own
    assert all(name.startswith(hidden_prefix("0.weight")) for name in own)
    assert hidden_prefix("weight") == "parametrizations.weight."
