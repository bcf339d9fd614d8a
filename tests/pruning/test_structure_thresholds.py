import numpy as np
import pytest
import torch
from torch import nn

from distiller.errors import DistillerError, UnknownNameError
from distiller.interfaces import EpochWindow, StepContext
from distiller.masks import MaskStore
from distiller.names import named_parameters
from distiller.pruning.structure_thresholds import StructureParameterPruner

AXES = {"2D": (2, 3), "3D": (1, 2, 3), "Filters": (1, 2, 3), "Channels": (0, 2, 3), "4D": (0, 1, 2, 3)}


class ConvAndLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 6, 3)
        self.fc = nn.Linear(7, 4)


@pytest.fixture
def model() -> ConvAndLinear:
    return ConvAndLinear()


def masks_of(model, regimes, criteria="Mean_Abs"):
    pruner = StructureParameterPruner("s", model, regimes, criteria)  # type: ignore[arg-type]
    params = {name: param.detach() for name, param in named_parameters(model)}
    return pruner.compute_masks(
        params, StepContext(model, MaskStore(model), None, EpochWindow.spanning(0, 2), 0)
    )


@pytest.mark.parametrize("criteria", ["Max", "Mean_Abs"])
@pytest.mark.parametrize(
    ("param", "group", "axes"),
    [*(("conv.weight", group, axes) for group, axes in AXES.items()),
     ("fc.weight", "Rows", 1), ("fc.weight", "Cols", 0)],
)  # fmt: skip
def test_structures_over_the_threshold_are_kept(model, criteria, param, group, axes):
    weight = dict(named_parameters(model))[param].detach().numpy()
    measure = np.max if criteria == "Max" else np.mean
    magnitudes = measure(np.abs(weight), axis=axes, keepdims=True)
    threshold = float(np.median(magnitudes)) * 1.0001
    masks = masks_of(model, {param: [threshold, group]}, criteria)
    assert list(masks) == [param]
    assert np.array_equal(masks[param].numpy(), np.broadcast_to(magnitudes > threshold, weight.shape))


def test_an_exact_name_wins_over_a_pattern(model):
    masks = masks_of(model, {"*.weight": [0.0, "3D"], "module.conv.weight": [1e9, "Channels"]})
    assert int(masks["conv.weight"].sum()) == 0
    assert bool((masks["fc.weight"] == 1).all())


def test_a_weight_without_such_structures_is_refused_when_the_schedule_is_read(model):
    with pytest.raises(DistillerError) as error:
        StructureParameterPruner("s", model, {"conv.weight": [0.1, "Rows"]}, "Max")
    assert str(error.value) == (
        "pruner 's', 'conv.weight': group_type 'Rows' wants a tensor of 2 dimensions, got shape (6, 5, 3, 3)"
    )


def test_a_name_that_the_model_does_not_have_is_refused(model):
    with pytest.raises(UnknownNameError, match="did you mean 'conv.weight'"):
        StructureParameterPruner("s", model, {"conv.weigth": [0.1, "3D"]}, "Max")


@pytest.mark.parametrize(
    ("regimes", "criteria", "text"),
    [
        ({}, "Max", "reg_regims: at least one 'parameter: [threshold, group type]' is wanted, got {}"),
        ({"conv.weight": [0.1, "3D"]}, "L1", "threshold_criteria must be 'Max' or 'Mean_Abs', got 'L1'"),
        (
            {"conv.weight": ["3D", 0.1]},
            "Max",
            "reg_regims['conv.weight'] must be [threshold, group type], got ['3D', 0.1]",
        ),
        ({"conv.weight": [True, "3D"]}, "Max",
         "reg_regims['conv.weight'] must be [threshold, group type], got [True, '3D']"),
        ({"conv.weight": [-1, "3D"]}, "Max",
         "reg_regims['conv.weight']: the threshold must be 0 or more, got -1"),
    ],
)  # fmt: skip
def test_arguments_are_checked(model, regimes, criteria, text):
    with pytest.raises(DistillerError) as error:
        StructureParameterPruner("s", model, regimes, criteria)
    assert str(error.value) == text


def test_weights_stay_as_they_are(model):
    before = model.conv.weight.detach().clone()
    masks_of(model, {"conv.weight": [1e9, "3D"]})
    assert torch.equal(model.conv.weight, before)
