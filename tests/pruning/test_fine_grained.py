import copy

import pytest
import torch

from distiller.errors import DistillerError
from distiller.interfaces import EpochWindow, StepContext
from distiller.masks import MaskStore
from distiller.names import named_parameters
from distiller.pruning.fine_grained import (
    MagnitudeParameterPruner,
    SensitivityPruner,
    SparsityLevelParameterPruner,
)


@pytest.fixture
def ctx(tiny_cnn) -> StepContext:
    return StepContext(tiny_cnn, MaskStore(tiny_cnn), None, EpochWindow.spanning(0, 10), 0)


@pytest.fixture
def params(tiny_cnn) -> dict[str, torch.Tensor]:
    return {name: param.detach() for name, param in named_parameters(tiny_cnn)}


def test_magnitude_keeps_what_is_above_the_threshold_of_its_parameter(params, ctx):
    pruner = MagnitudeParameterPruner("p", {"conv1.weight": 0.2, "*": 0.05})
    masks = pruner.compute_masks(params, ctx)
    assert masks.keys() == params.keys()
    assert torch.equal(masks["conv1.weight"], (params["conv1.weight"].abs() > 0.2).float())
    assert torch.equal(masks["fc.bias"], (params["fc.bias"].abs() > 0.05).float())


def test_magnitude_without_a_default_leaves_other_parameters_alone(params, ctx):
    pruner = MagnitudeParameterPruner("p", {"conv?.weight": 0.2})
    assert pruner.select(list(params)) == ("conv1.weight", "conv2.weight")
    assert list(pruner.compute_masks(params, ctx)) == ["conv1.weight", "conv2.weight"]
    assert pruner.target_sparsity(ctx) == {}


def test_sensitivity_masks_by_the_deviation_of_the_dense_weights(params, ctx):
    pruner = SensitivityPruner("p", {"module.fc.weight": 0.8})
    w = params["fc.weight"]
    threshold = 0.8 * float(w.std())
    first = pruner.compute_masks(params, ctx)["fc.weight"]
    assert torch.equal(first, (w.abs() > threshold).float())
    masked = {"fc.weight": 2 * w * first}
    later = pruner.compute_masks(masked, ctx)["fc.weight"]
    assert torch.equal(later, (masked["fc.weight"].abs() > threshold).float())


def test_defect_sensitivity_deviation_survives_a_resume(params, ctx):
    """DEFECT of Distiller: it was kept on the tensor, so that a resumed run measured the pruned weights."""
    pruner = SensitivityPruner("p", {"*.weight": 1.0})
    masks = pruner.compute_masks(params, ctx)
    pruned = {name: params[name] * mask for name, mask in masks.items()}
    resumed = SensitivityPruner("p", {"*.weight": 1.0})
    resumed.load_state_dict(copy.deepcopy(pruner.state_dict()))
    again = resumed.compute_masks(pruned, ctx)
    assert all(torch.equal(again[name], masks[name]) for name in masks)
    assert SensitivityPruner("p", {"*.weight": 1.0}).compute_masks(pruned, ctx).keys() == again.keys()


def test_sensitivity_state_is_plain_numbers(params, ctx):
    pruner = SensitivityPruner("p", {"fc.weight": 1.0})
    pruner.compute_masks(params, ctx)
    assert pruner.state_dict() == {"stddevs": {"fc.weight": float(params["fc.weight"].std())}}


def test_level_prunes_a_fraction_of_each_parameter(params, ctx):
    pruner = SparsityLevelParameterPruner("p", {"conv2.weight": 0.75, "fc.*": 0.25})
    masks = pruner.compute_masks(params, ctx)
    assert {name: int((mask == 0).sum()) for name, mask in masks.items()} == {
        "conv2.weight": 162,  # of 216
        "fc.weight": 6,  # of 24
        "fc.bias": 1,  # of 4
    }
    assert pruner.target_sparsity(ctx) == {"conv2.weight": 0.75, "fc.*": 0.25}


def test_level_zero_excepts_a_parameter_from_the_default(params, ctx):
    pruner = SparsityLevelParameterPruner("p", {"*": 0.5, "conv1.weight": 0})
    assert "conv1.weight" not in pruner.select(list(params))
    assert "conv1.weight" not in pruner.compute_masks(params, ctx)
    assert len(pruner.select(list(params))) == len(params) - 1


def test_levels_may_be_replaced_while_training(params, ctx):
    pruner = SparsityLevelParameterPruner("p", {"fc.weight": 0.25})
    pruner.levels = {"fc.weight": 0.5}
    assert pruner.levels == {"fc.weight": 0.5}
    assert int((pruner.compute_masks(params, ctx)["fc.weight"] == 0).sum()) == 12


def test_replaced_levels_are_checked_too():
    pruner = SparsityLevelParameterPruner("p", {"fc.weight": 0.25})
    with pytest.raises(DistillerError) as error:
        pruner.levels = {"fc.weight": 1.0}
    assert str(error.value) == "levels['fc.weight'] must be in [0, 1), got 1.0"
    assert pruner.levels == {"fc.weight": 0.25}


def test_nan_is_refused_with_pruner_and_parameter(params, ctx):
    params["fc.weight"] = params["fc.weight"].clone().fill_(float("nan"))
    with pytest.raises(DistillerError) as error:
        SparsityLevelParameterPruner("low_pruner", {"*": 0.5}).compute_masks(params, ctx)
    assert str(error.value).startswith(
        "pruner 'low_pruner', 'fc.weight': cannot be pruned, got 24 NaN in 24 elements; "
    )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: MagnitudeParameterPruner("p", {"*": -0.1}),
            "thresholds['*'] must be 0 or more, got -0.1",
        ),
        (
            lambda: SensitivityPruner("p", {"fc.weight": -1}),
            "sensitivities['fc.weight'] must be 0 or more, got -1",
        ),
        (
            lambda: SparsityLevelParameterPruner("p", {"fc.weight": 80}),
            "levels['fc.weight'] must be in [0, 1), got 80",
        ),
    ],
)
def test_values_out_of_range_are_refused(make, text):
    with pytest.raises(DistillerError) as error:
        make()
    assert str(error.value) == text
