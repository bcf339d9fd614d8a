"""What every registered regularizer must do. A new regularizer needs a row in CASES."""

from __future__ import annotations

import copy
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import distiller.regularization  # noqa: F401 - registers the regularizers
from distiller.errors import DistillerError, UnknownNameError
from distiller.registry import REGULARIZERS
from distiller.signatures import check_settings

NAME = "layer.weight"
CONV, LINEAR = (6, 4, 3, 3), (6, 4)


@dataclass(frozen=True)
class Case:
    """How to make a regularizer of NAME, the weight's shape, and the fewest channels that it takes."""

    settings: dict
    shape: tuple[int, ...] = CONV
    fewest_channels: int = 1


def lasso(group: str, criteria: str | None) -> Case:
    shape = LINEAR if "Rows" in group or "Cols" in group else CONV
    return Case({"reg_regims": {NAME: [0.05, group]}, "threshold_criteria": criteria}, shape)


GROUPS = ("2D", "Rows", "Cols", "Rows+Cols", "Channels", "Filters", "3D", "4D", "Channels+4D")
CASES: dict[str, list[Case]] = {
    "L1Regularizer": [
        Case({"reg_regims": {NAME: 0.05}}),
        Case({"reg_regims": {NAME: 0.05}, "threshold_criteria": "Mean_Abs"}, LINEAR),
    ],
    "GroupLassoRegularizer": [
        *(lasso(group, "Mean_Abs") for group in GROUPS),
        lasso("Channels", None),
        lasso("Channels+4D", "Max"),
    ],
    "GroupVarianceRegularizer": [
        Case({"reg_regims": {NAME: [0.05, "Channels"]}}, shape, fewest_channels=2) for shape in (CONV, LINEAR)
    ],
}

every_regularizer = pytest.mark.parametrize(
    ("class_name", "case"),
    [
        pytest.param(
            name,
            case,
            id=f"{name}-{case.settings['reg_regims'][NAME]}-{case.settings.get('threshold_criteria')}",
        )
        for name, cases in CASES.items()
        for case in cases
    ],
)


def one_element(case: Case) -> Tensor:
    shape = [1] * len(case.shape)
    shape[1] = case.fewest_channels
    return torch.randn(shape)


WEIGHTS: dict[str, Callable[[Case], Tensor]] = {
    "random": lambda case: torch.randn(case.shape),
    "small": lambda case: torch.randn(case.shape) * 0.05,
    "large": lambda case: torch.randn(case.shape) * 1e4,
    "all equal": lambda case: torch.full(case.shape, 0.25),
    "all zero": lambda case: torch.zeros(case.shape),
    "masked": lambda case: torch.randn(case.shape) * (torch.rand(case.shape) > 0.6),
    "a channel of zeros": lambda case: torch.randn(case.shape).index_fill(1, torch.tensor([1]), 0),
    "float16": lambda case: torch.randn(case.shape).half(),
    "bfloat16": lambda case: torch.randn(case.shape).bfloat16(),
    "float16 all zero": lambda case: torch.zeros(case.shape).half(),
    "float64": lambda case: torch.randn(case.shape).double(),
    "channels last": lambda case: (
        torch.randn(case.shape).to(memory_format=torch.channels_last)
        if len(case.shape) == 4
        else torch.randn(case.shape)
    ),
    "transposed": lambda case: torch.randn(case.shape).transpose(0, 1).contiguous().transpose(0, 1),
    "one element": one_element,
}

every_weight = pytest.mark.parametrize("kind", WEIGHTS)


def model_with(weight: Tensor) -> nn.Module:
    model, layer = nn.Module(), nn.Module()
    layer.weight = nn.Parameter(weight.detach().clone())
    model.layer = layer
    return model


def make(class_name: str, case: Case, weight: Tensor):
    return REGULARIZERS[class_name]("the_regularizer", model_with(weight), **copy.deepcopy(case.settings))


def test_every_registered_regularizer_has_a_case():
    assert set(CASES) == set(REGULARIZERS)


@every_regularizer
@every_weight
def test_the_penalty_is_a_finite_scalar_of_0_or_more(class_name, case, kind):
    weight = WEIGHTS[kind](case)
    penalty = make(class_name, case, weight).penalty({NAME: weight})
    assert penalty.shape == ()
    assert torch.isfinite(penalty)
    assert penalty >= 0


@every_regularizer
@every_weight
def test_the_gradient_is_finite_and_of_the_parameters_shape_and_dtype(class_name, case, kind):
    weight = WEIGHTS[kind](case).requires_grad_()
    make(class_name, case, weight).penalty({NAME: weight}).backward()
    assert weight.grad is not None
    assert (weight.grad.shape, weight.grad.dtype) == (weight.shape, weight.dtype)
    assert torch.isfinite(weight.grad).all()


@every_regularizer
@every_weight
def test_masks_are_0_or_1_of_the_parameters_shape_dtype_and_strides(class_name, case, kind):
    weight = WEIGHTS[kind](case)
    masks = make(class_name, case, weight).threshold_masks({NAME: weight})
    assert (list(masks) == [NAME]) == (case.settings.get("threshold_criteria") is not None)
    for mask in masks.values():
        assert set(mask.unique().tolist()) <= {0.0, 1.0}
        assert (mask.shape, mask.dtype, mask.stride()) == (weight.shape, weight.dtype, weight.stride())
        assert not mask.requires_grad


@every_regularizer
@every_weight
def test_neither_parameters_nor_model_are_changed(class_name, case, kind):
    weight = WEIGHTS[kind](case).requires_grad_()
    before = weight.detach().clone()
    model = model_with(weight)
    regularizer = REGULARIZERS[class_name]("the_regularizer", model, **case.settings)
    regularizer.penalty({NAME: weight})
    regularizer.threshold_masks({NAME: weight})
    assert torch.equal(weight.detach(), before)
    assert torch.equal(dict(model.named_parameters())[NAME].detach(), before)
    assert weight.grad is None


@every_regularizer
@every_weight
def test_penalty_and_masks_are_deterministic(class_name, case, kind):
    weight = WEIGHTS[kind](case)
    regularizer, another = make(class_name, case, weight), make(class_name, case, weight)
    torch.manual_seed(123)
    assert torch.equal(regularizer.penalty({NAME: weight}), another.penalty({NAME: weight}))
    first = regularizer.threshold_masks({NAME: weight})
    for name, mask in another.threshold_masks({NAME: weight}).items():
        assert torch.equal(mask, first[name])


@every_regularizer
def test_the_penalty_grows_in_proportion_to_lambda(class_name, case):
    weight = torch.randn(case.shape, dtype=torch.float64)
    doubled = copy.deepcopy(case.settings)
    value = doubled["reg_regims"][NAME]
    doubled["reg_regims"][NAME] = 2 * value if isinstance(value, float) else [2 * value[0], value[1]]
    once = make(class_name, case, weight).penalty({NAME: weight})
    twice = make(class_name, Case(doubled, case.shape), weight).penalty({NAME: weight})
    torch.testing.assert_close(twice, 2 * once)


@every_regularizer
def test_only_selected_parameters_count(class_name, case):
    weight, other = torch.randn(case.shape), torch.randn(case.shape)
    regularizer = make(class_name, case, weight)
    both = {"layer.bias": other, NAME: weight}
    assert regularizer.select(list(both)) == (NAME,)
    assert torch.equal(regularizer.penalty(both), regularizer.penalty({NAME: weight}))
    assert set(regularizer.threshold_masks(both)) <= {NAME}
    assert regularizer.penalty({"layer.bias": other}) == 0


@every_regularizer
def test_a_name_that_the_model_does_not_have_is_refused(class_name, case):
    model = nn.Module()
    model.conv = model_with(torch.ones(case.shape)).layer
    with pytest.raises(UnknownNameError, match=r"no parameter 'layer\.weight' in the model"):
        REGULARIZERS[class_name]("the_regularizer", model, **case.settings)
    with pytest.raises(UnknownNameError, match=r"no parameter 'layer\.weight' in the model"):
        make(class_name, case, torch.ones(case.shape)).select(["conv.weight"])


@every_regularizer
def test_masks_of_nan_are_refused_naming_regularizer_and_parameter(class_name, case):
    if case.settings.get("threshold_criteria") is None:
        return
    weight = torch.randn(case.shape)
    weight.view(-1)[3] = float("nan")
    with pytest.raises(DistillerError, match=r"^regularizer 'the_regularizer', 'layer\.weight': .*NaN"):
        make(class_name, case, weight).threshold_masks({NAME: weight})


@every_regularizer
def test_settings_pass_the_check_of_schedules(class_name, case):
    assert check_settings(REGULARIZERS[class_name], case.settings) == []


@pytest.mark.parametrize("class_name", REGULARIZERS)
def test_constructors_take_name_and_model_first_and_every_argument_has_a_type(class_name):
    parameters = list(inspect.signature(REGULARIZERS[class_name]).parameters)
    hints = typing.get_type_hints(REGULARIZERS[class_name].__init__)
    assert parameters[:2] == ["name", "model"]
    assert set(parameters) <= set(hints)
