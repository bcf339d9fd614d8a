from __future__ import annotations

import pytest
import torch
from torch import nn

from distiller.errors import DistillerError, UnknownNameError
from distiller.regularization.regimes import FAMILIES, Regime, Regimes

NAMES = ["conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "conv2.bias", "fc.weight", "fc.bias"]


def strengths(model, reg_regims):
    return {name: regime.strength for name, regime in Regimes(model, reg_regims).by_name.items()}


def test_names_are_found_with_and_without_wrapper_parts(tiny_cnn):
    assert strengths(tiny_cnn, {"module.fc.weight": 0.1, "conv1.module.weight": 0.2}) == {
        "conv1.weight": 0.2,
        "fc.weight": 0.1,
    }
    assert strengths(nn.DataParallel(tiny_cnn), {"fc.weight": 0.1}) == {"fc.weight": 0.1}


def test_exact_names_go_before_patterns_in_order_and_these_before_the_default(tiny_cnn):
    assert strengths(
        tiny_cnn, {"*": 0.1, "module.conv?.weight": 0.2, "*.weight": 0.3, "conv2.weight": 0.4, "fc.bias": 0.0}
    ) == {
        "conv1.weight": 0.2,
        "bn1.weight": 0.3,
        "bn1.bias": 0.1,
        "conv2.weight": 0.4,
        "conv2.bias": 0.1,
        "fc.weight": 0.3,
        "fc.bias": 0.0,
    }


def test_a_name_as_written_goes_before_one_with_wrapper_parts(tiny_cnn):
    assert strengths(tiny_cnn, {"module.fc.weight": 0.1, "fc.weight": 0.2}) == {"fc.weight": 0.2}


def test_what_is_selected_stands_in_the_order_of_the_names_asked(tiny_cnn):
    regimes = Regimes(tiny_cnn, {"fc.weight": 0.1, "conv*.weight": 0.1})
    assert regimes.select(NAMES) == ("conv1.weight", "conv2.weight", "fc.weight")
    assert regimes.select(NAMES[::-1]) == ("fc.weight", "conv2.weight", "conv1.weight")


def test_every_unknown_name_is_told(tiny_cnn):
    with pytest.raises(UnknownNameError) as caught:
        Regimes(tiny_cnn, {"fc.weigth": 0.1, "conv1.weight": 0.1, "layer*": 0.1})
    assert caught.value.faults == {
        "fc.weigth": "no parameter 'fc.weigth' in the model; did you mean 'fc.weight'?",
        "layer*": "pattern 'layer*' matches no parameter of the model",
    }
    with pytest.raises(UnknownNameError, match=r"no parameter 'fc\.weight' in the model"):
        Regimes(tiny_cnn, {"fc.weight": 0.1}).select(["conv1.weight"])


def test_every_unknown_group_is_told(tiny_cnn):
    with pytest.raises(UnknownNameError) as caught:
        Regimes(tiny_cnn, {"fc.weight": [0.1, "Row"], "conv1.weight": [0.1, 7]}, groups=("Rows", "4D"))
    assert caught.value.faults == {
        "fc.weight": "reg_regims['fc.weight']: group must be one of Rows, 4D, got 'Row'; did you mean 'Rows'?",
        "conv1.weight": "reg_regims['conv1.weight']: group must be one of Rows, 4D, got 7",
    }


@pytest.mark.parametrize(
    ("reg_regims", "groups", "text"),
    [
        ({}, (), "reg_regims: at least one parameter name, pattern or '*' is wanted, got {}"),
        (
            {"fc.weight": -0.1},
            (),
            "reg_regims['fc.weight']: lambda must be 0 or more, got -0.1",
        ),
        (
            {"fc.weight": float("nan")},
            (),
            "reg_regims['fc.weight']: lambda must be 0 or more, got nan",
        ),
        (
            {"fc.weight": float("inf")},
            (),
            "reg_regims['fc.weight']: lambda must be at most 1e+30, got inf",
        ),
        ({"fc.weight": True}, (), "reg_regims['fc.weight']: lambda must be a number, got True"),
        (
            {"fc.weight": ["a", "Rows"]},
            ("Rows",),
            "reg_regims['fc.weight']: lambda must be a number, got 'a'",
        ),
        (
            {"fc.weight": 0.1},
            ("Rows",),
            "reg_regims['fc.weight'] must be [lambda, group], as [0.001, Rows], got 0.1",
        ),
        (
            {"fc.weight": [0.1]},
            ("Rows",),
            "reg_regims['fc.weight'] must be [lambda, group], as [0.001, Rows], got [0.1]",
        ),
        (
            {"conv1.weight": [0.1, "Rows+Cols"]},
            ("Rows+Cols",),
            "reg_regims, 'conv1.weight': group_type 'Rows' wants a tensor of 2 dimensions, got shape (4, 1, 3, 3)",
        ),
        (
            {"fc.*": [0.1, "4D"]},
            ("4D",),
            "reg_regims, 'fc.weight': group_type '4D' wants a tensor of 4 dimensions, got shape (4, 6)",
        ),
    ],
)
def test_values_and_shapes_that_do_not_fit_are_refused(tiny_cnn, reg_regims, groups, text):
    with pytest.raises(DistillerError) as caught:
        Regimes(tiny_cnn, reg_regims, groups)
    assert str(caught.value) == text


@pytest.mark.parametrize("group", FAMILIES)
def test_every_group_is_taken_by_a_tensor_that_has_it(group):
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones((2, 2) if "Rows" in group or "Cols" in group else (2, 2, 1, 1)))
    regimes = Regimes(model, {"weight": [1, group]}, tuple(FAMILIES))
    assert regimes.by_name == {"weight": Regime(1.0, group)}
    assert regimes.by_name["weight"].families == tuple(group.split("+"))
