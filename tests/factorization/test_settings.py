"""Settings of layers by name and pattern."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distiller.errors import DistillerError, UnknownNameError
from distiller.factorization.settings import checked_settings, layers_of
from distiller.models import create_model


def test_exact_names_win_over_patterns_and_these_over_the_star():
    model = create_model(False, "mnist", "lenet5")
    found = layers_of(
        model, {"*": {"energy": 0.9}, "conv*": {"form": "spatial", "rank": 3}, "module.conv2": {"rank": 4}}
    )
    assert list(found) == ["conv1", "conv2", "fc1", "fc2"]
    assert (found["conv1"].form, found["conv1"].rank) == ("spatial", 3)
    assert (found["conv2"].form, found["conv2"].rank) == ("channel", 4)
    assert (found["fc1"].form, found["fc1"].energy) == ("svd", 0.9)


def test_patterns_stand_for_what_can_be_factored():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Linear(8, 3))
    assert list(layers_of(model, {"*": {"rank": 2}})) == ["1", "3"]
    assert list(layers_of(model, {"*": {"rank": 2, "form": "tucker2"}})) == ["1"]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            3,
            "must be a mapping of settings, as {rank: 40}, got 3",
        ),
        ({"ranks": 3}, "'ranks' is unknown; did you mean 'rank'?"),
        ({"form": "cp"}, "'form' must be one of svd, channel, spatial, tucker2, got 'cp'"),
        ({"rank": 0}, "'rank' must be a whole number from 1, or two of them, got 0"),
        ({"rank": True}, "'rank' must be a whole number from 1, or two of them, got True"),
        ({"rank": [1, 2, 3]}, "'rank' must be a whole number from 1, or two of them, got [1, 2, 3]"),
        ({"energy": 0}, "'energy' must be more than 0 and at most 1, got 0"),
        ({"macs": 1.5}, "'macs' must be more than 0 and at most 1, got 1.5"),
        ({"parameters": "half"}, "'parameters' must be more than 0 and at most 1, got 'half'"),
        ({"sparse": 1.0}, "'sparse' must be more than 0 and less than 1, got 1.0"),
        ({"whitened": 1}, "'whitened' must be true or false, got 1"),
        ({"rank": 3, "energy": 0.5}, "both 'rank' and 'energy' given; give one"),
        (
            {"form": "spatial", "sparse": 0.1},
            "'sparse' goes with forms svd and channel, got form spatial",
        ),
        (
            {"form": "tucker2", "whitened": True},
            "'whitened' goes with forms svd and channel, got form tucker2",
        ),
        ({"sparse": 0.1, "whitened": True}, "both 'sparse' and 'whitened' given; give one"),
        (
            {"sparse": 0.1, "energy": 0.5},
            "'energy' is of a product alone; give 'rank' or 'parameters' beside 'sparse'",
        ),
        (
            {"sparse": 0.1, "macs": 0.5},
            "'sparse' saves no MACs, its zeros are multiplied; give 'rank' or 'parameters'",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, text):
    with pytest.raises(DistillerError) as error:
        checked_settings(settings)
    assert str(error.value) == text


def test_a_layer_that_cannot_be_factored_is_refused_by_its_exact_name(tiny_cnn):
    with pytest.raises(DistillerError) as error:
        layers_of(tiny_cnn, {"bn1": {"rank": 1}})
    assert str(error.value) == (
        "factorization: 'bn1' cannot be factored: it is a BatchNorm2d; Linear, Conv1d and Conv2d can be"
    )


def test_names_that_are_not_there_are_told_all_at_once(tiny_cnn):
    with pytest.raises(UnknownNameError) as error:
        layers_of(tiny_cnn, {"conv3": {"rank": 1}, "*.fc": {"rank": 1}})
    assert error.value.faults == {
        "conv3": "no layer 'conv3' in the model; did you mean 'conv2'?",
        "*.fc": "pattern '*.fc' matches no layer that can be factored of the model",
    }


def test_no_layers_at_all_are_refused(tiny_cnn):
    with pytest.raises(DistillerError) as error:
        layers_of(tiny_cnn, {})
    assert str(error.value) == "layers: at least one layer or pattern is wanted, got {}"


def test_layers_and_weights_of_several_names_are_refused():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    with pytest.raises(DistillerError) as error:
        layers_of(model, {"0": {"rank": 1}})
    assert str(error.value) == "factorization: '0' cannot be factored: it is in the model as 0 and 2"
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    tied[1].weight = tied[0].weight
    assert list(layers_of(tied, {"*": {"rank": 1}})) == ["2"]
    with pytest.raises(DistillerError, match="it is in the model as 0.weight and 1.weight"):
        layers_of(tied, {"1": {"rank": 1}})


def test_a_single_layer_as_a_model_has_no_name():
    with pytest.raises(UnknownNameError):
        layers_of(nn.Linear(4, 4), {"*": {"rank": 1}})


def test_parametrized_layers_are_left_out():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert list(layers_of(model, {"*": {"rank": 1}})) == ["1"]
    assert torch.is_grad_enabled()
