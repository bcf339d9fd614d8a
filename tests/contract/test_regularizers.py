"""What every registered regularizer must do. A new regularizer needs a row in CASES.

`L0Regularizer` is an extension, which masks by gates of its own; its part is at the end.
"""

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
from distiller.policy import RegularizationPolicy
from distiller.registry import EXTENSIONS, REGULARIZERS
from distiller.scheduler import CompressionScheduler
from distiller.signatures import check_settings
from tests.contract.in_turn import in_turn

NAME = "layer.weight"
NAN_REFUSED = (
    "regularizer 'the_regularizer', 'layer.weight': cannot be penalised, got 1 NaN in {} elements; "
    "training has diverged: resume from an earlier checkpoint with a lower learning rate"
)
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


def regularizers(are_meant: Callable[[Case], bool]):
    """A test for each of the cases that are meant."""
    return pytest.mark.parametrize(
        ("class_name", "case"),
        [
            pytest.param(
                name,
                case,
                id=f"{name}-{case.settings['reg_regims'][NAME]}-{case.settings.get('threshold_criteria')}",
            )
            for name, cases in CASES.items()
            for case in cases
            if are_meant(case)
        ],
    )


every_regularizer = regularizers(lambda case: True)


def one_element(case: Case) -> Tensor:
    shape = [1] * len(case.shape)
    shape[1] = case.fewest_channels
    return torch.randn(shape)


WEIGHTS: dict[str, Callable[[Case], Tensor]] = {
    "random": lambda case: torch.randn(case.shape),
    "small": lambda case: torch.randn(case.shape) * 0.05,
    "large": lambda case: torch.randn(case.shape) * 1e4,
    "tied": lambda case: torch.randn(case.shape).sign(),
    "at the threshold": lambda case: torch.randn(case.shape).sign() * 0.05,
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

every_weight = in_turn("kind", WEIGHTS)


def model_with(weight: Tensor) -> nn.Module:
    model, layer = nn.Module(), nn.Module()
    layer.weight = nn.Parameter(weight.detach().clone())
    model.layer = layer
    return model


def make(class_name: str, case: Case, weight: Tensor):
    return REGULARIZERS[class_name]("the_regularizer", model_with(weight), **copy.deepcopy(case.settings))


def with_lambda(case: Case, strength: float) -> dict:
    """The case's settings with another lambda than their 0.05."""
    settings = copy.deepcopy(case.settings)
    value = settings["reg_regims"][NAME]
    settings["reg_regims"][NAME] = strength if isinstance(value, float) else [strength, value[1]]
    return settings


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
    once = make(class_name, case, weight).penalty({NAME: weight})
    twice = make(class_name, Case(with_lambda(case, 0.1), case.shape), weight).penalty({NAME: weight})
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


@regularizers(lambda case: case.settings.get("threshold_criteria") is not None)
def test_what_is_at_the_threshold_goes_and_what_is_above_stays(class_name, case):
    threshold = 0.0625  # a power of 2, so that means of it are it
    regularizer = make(class_name, Case(with_lambda(case, threshold), case.shape), torch.ones(case.shape))
    at = torch.randn(case.shape).sign() * threshold  # every element and every group
    assert torch.count_nonzero(regularizer.threshold_masks({NAME: at})[NAME]) == 0
    assert regularizer.threshold_masks({NAME: at * 1.001})[NAME].all()


@every_regularizer
def test_nan_is_refused_when_an_epoch_begins_naming_regularizer_and_parameter(class_name, case):
    model = model_with(torch.randn(case.shape))
    scheduler = CompressionScheduler(model)
    regularizer = REGULARIZERS[class_name]("the_regularizer", model, **copy.deepcopy(case.settings))
    scheduler.add_policy(RegularizationPolicy(regularizer), epochs=[0, 1])
    scheduler.on_epoch_begin(0)
    with torch.no_grad():
        model.layer.weight.view(-1)[3] = float("nan")  # type: ignore[operator, union-attr]
    with pytest.raises(DistillerError) as caught:
        scheduler.on_epoch_begin(1)
    assert str(caught.value) == NAN_REFUSED.format(model.layer.weight.numel())  # type: ignore[operator, union-attr]


@every_regularizer
def test_masks_of_nan_are_refused_naming_regularizer_and_parameter(class_name, case):
    weight = torch.randn(case.shape)
    weight.view(-1)[3] = float("nan")
    regularizer = make(class_name, case, weight)
    if case.settings.get("threshold_criteria") is None:  # there are none: the policy refuses, as above
        assert regularizer.threshold_masks({NAME: weight}) == {}
        return
    with pytest.raises(DistillerError, match=r"^regularizer 'the_regularizer', 'layer\.weight': .*NaN"):
        regularizer.threshold_masks({NAME: weight})


@every_regularizer
def test_settings_pass_the_check_of_schedules(class_name, case):
    assert check_settings(REGULARIZERS[class_name], case.settings) == []


@pytest.mark.parametrize("class_name", REGULARIZERS)
def test_constructors_take_name_and_model_first_and_every_argument_has_a_type(class_name):
    parameters = list(inspect.signature(REGULARIZERS[class_name]).parameters)
    hints = typing.get_type_hints(REGULARIZERS[class_name].__init__)
    assert parameters[:2] == ["name", "model"]
    assert set(parameters) <= set(hints)


# ------------------------------------------------------------- the regularizer that is an extension


L0_CASES = [
    Case({"reg_regims": {NAME: [0.05, group]}}, LINEAR if group in ("Rows", "Cols") else CONV)
    for group in ("Elements", "2D", "Rows", "Cols", "Channels", "Filters", "4D")
]
every_gate = pytest.mark.parametrize(
    "case", L0_CASES, ids=[case.settings["reg_regims"][NAME][1] for case in L0_CASES]
)


class Gated:
    """An `L0Regularizer` of one weight in training; the loss is the mean square of the gated weight."""

    def __init__(self, case: Case, weight: Tensor) -> None:
        self.model = model_with(weight)
        self.l0 = EXTENSIONS["L0Regularizer"](
            "the_regularizer", self.model, **copy.deepcopy(case.settings), keep_probability=0.5, gate_lr=0.3
        )
        self.weight = dict(self.model.named_parameters())[NAME]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.scheduler = CompressionScheduler(self.model)
        self.scheduler.add_policy(self.l0, epochs=[0, 1])

    def epoch(self, epoch: int, steps: int = 2) -> None:
        """Train for an epoch, up to the evaluation at its end."""
        self.scheduler.on_epoch_begin(epoch, self.optimizer)
        for step in range(steps):
            self.scheduler.on_minibatch_begin(epoch, step, steps, self.optimizer)
            loss = self.weight.float().square().mean()
            loss = self.scheduler.before_backward_pass(epoch, step, steps, loss, self.optimizer)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[union-attr]
            self.scheduler.before_parameter_optimization(epoch, step, steps, self.optimizer)
            self.optimizer.step()
            self.scheduler.on_minibatch_end(epoch, step, steps, self.optimizer)


@every_gate
@every_weight
def test_l0_is_a_finite_penalty_and_gates_in_0_to_1_for_every_kind_of_weight(case, kind):
    weight = WEIGHTS[kind](case)
    gated = Gated(case, weight)
    gated.epoch(0)
    penalty = gated.l0.penalty()
    assert penalty.shape == ()
    assert torch.isfinite(penalty)
    assert penalty >= 0
    (gates,) = gated.l0.gates().values()
    assert ((gates >= 0) & (gates <= 1)).all()
    assert torch.isfinite(gated.weight).all()
    mask = gated.scheduler.masks.masked()[NAME]
    assert (mask.shape, mask.dtype, mask.stride()) == (weight.shape, weight.dtype, weight.stride())
    assert torch.equal(mask, gates.to(mask.dtype).expand_as(mask))
    dense = gated.weight.detach().clone()
    with gated.scheduler.masked():
        assert torch.equal(gated.weight.detach(), dense * mask)
    assert torch.equal(gated.weight.detach(), dense)


@every_gate
@every_weight
def test_l0_leaves_a_plain_mask_and_zeros_at_its_end(case, kind):
    gated = Gated(case, WEIGHTS[kind](case))
    for epoch in (0, 1):
        gated.epoch(epoch)
        gated.scheduler.on_epoch_end(epoch, gated.optimizer, {})
    mask = gated.scheduler.masks.masked()[NAME]
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    gated.epoch(2)  # without the policy
    assert torch.count_nonzero(gated.weight.detach()[mask == 0]) == 0


@every_gate
def test_l0_refuses_nan_when_an_epoch_begins_naming_regularizer_and_parameter(case):
    gated = Gated(case, torch.randn(case.shape))
    gated.epoch(0)
    with torch.no_grad():
        gated.weight.view(-1)[3] = float("nan")
    with pytest.raises(DistillerError) as caught:
        gated.epoch(1)
    assert str(caught.value) == NAN_REFUSED.format(gated.weight.numel())


@every_gate
def test_l0_refuses_a_name_that_the_model_does_not_have(case):
    model = nn.Module()
    model.conv = model_with(torch.ones(case.shape)).layer
    with pytest.raises(UnknownNameError, match=r"no parameter 'layer\.weight' in the model"):
        EXTENSIONS["L0Regularizer"]("the_regularizer", model, **case.settings)


@every_gate
def test_settings_of_l0_pass_the_check_of_schedules(case):
    assert check_settings(EXTENSIONS["L0Regularizer"], case.settings) == []
