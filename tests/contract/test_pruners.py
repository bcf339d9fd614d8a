"""What every registered pruner must do. A new pruner needs a row in PRUNER_CASES."""

from __future__ import annotations

import copy
import inspect
import io
import json
import math
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import distiller.pruning  # noqa: F401 - registers the pruners
from distiller.errors import DistillerError, UnknownNameError
from distiller.interfaces import DataDrivenPruner, EpochWindow, Pruner, StepContext
from distiller.masks import MaskStore
from distiller.registry import PRUNERS
from distiller.signatures import injected
from tests.contract.in_turn import in_turn

NAME = "layer.weight"
CONV, LINEAR = (8, 6, 3, 3), (8, 6)


@dataclass(frozen=True)
class Case:
    """How to make a pruner of NAME, and what it promises.

    shape: of the weight.
    group_dims: the dims that tell groups apart (None: elements).
    group_elements: how many elements a group has, where group_dims cannot tell.
    least: the shape of the smallest weight it takes.
    draws: it draws from torch's generator, so that masks repeat with its seed only.
    hits_target: it has a target, and its sparsity is within a group of it.
    is_read: it needs a model in which another layer reads what the weight makes.
    """

    settings: dict
    shape: tuple[int, ...] = CONV
    group_dims: tuple[int, ...] | None = None
    group_elements: int | None = None
    least: tuple[int, ...] | None = None
    draws: bool = False
    hits_target: bool = True
    is_read: bool = False


def whole_groups(shape: tuple[int, ...] = CONV, **settings) -> Case:
    least, hits_target = (2, *shape[1:]), "final_sparsity" in settings
    return Case({"weights": [NAME], **settings}, shape, (0,), None, least, False, hits_target, is_read=True)


def ranked(group_type: str, draws: bool = False, hits_target: bool = True, **rates) -> Case:
    if group_type == "Blocks":
        settings = {"group_type": group_type, "weights": [NAME], "kwargs": {"block_shape": [1, 8, 1, 1]}}
        return Case({**settings, **rates}, CONV, None, 8, (8, 1, 1, 1), draws, hits_target)
    dim = 0 if group_type in ("3D", "Filters") else 1
    shape = LINEAR if group_type == "Rows" else CONV
    settings = {"group_type": group_type, "weights": [NAME], **rates}
    return Case(settings, shape, (dim,), draws=draws, hits_target=hits_target)


CONSTANT = [ranked(group, desired_sparsity=0.45) for group in ("3D", "Filters", "Channels", "Rows", "Blocks")]
GRADUAL = [
    ranked(group, initial_sparsity=0.1, final_sparsity=0.7)
    for group in ("Filters", "Channels", "Rows", "Blocks")
]
NOISY = [ranked("Filters", draws=True, desired_sparsity=0.45, noise=0.5)]

PRUNER_CASES: dict[str, list[Case]] = {
    "MagnitudeParameterPruner": [Case({"thresholds": {NAME: 0.3}}, hits_target=False)],
    "SensitivityPruner": [Case({"sensitivities": {NAME: 0.6}}, hits_target=False)],
    "SparsityLevelParameterPruner": [Case({"levels": {NAME: 0.37}}), Case({"levels": {"*": 0.5}}, LINEAR)],
    "AutomatedGradualPruner": [Case({"initial_sparsity": 0.0, "final_sparsity": 0.77, "weights": NAME})],
    "L1RankedStructureParameterPruner": CONSTANT + NOISY,
    "L2RankedStructureParameterPruner": CONSTANT + NOISY,
    "L1RankedStructureParameterPruner_AGP": GRADUAL,
    "L2RankedStructureParameterPruner_AGP": GRADUAL,
    "BaiduRNNPruner": [
        Case(
            {"q": 0.5, "ramp_epoch_offset": 3, "ramp_slope_mult": 1.5, "weights": [NAME]},
            LINEAR,
            hits_target=False,
        )
    ],
    "SplicingPruner": [
        Case(
            {
                "sensitivities": {NAME: 0.2},
                "low_thresh_mult": 0.9,
                "hi_thresh_mult": 1.1,
                "sensitivity_multiplier": 0.05,
            },
            hits_target=False,
        )
    ],
    "StructureParameterPruner": [
        Case(
            {"reg_regims": {NAME: [0.8, group]}, "threshold_criteria": criteria},
            shape,
            dims,
            hits_target=False,
        )
        for group, criteria, shape, dims in (
            ("2D", "Mean_Abs", CONV, (0, 1)),
            ("Filters", "Mean_Abs", CONV, (0,)),
            ("Channels", "Max", CONV, (1,)),
            ("Rows", "Mean_Abs", LINEAR, (0,)),
            ("Cols", "Max", LINEAR, (1,)),
            ("4D", "Mean_Abs", CONV, ()),
        )
    ],
    "RandomLevelStructureParameterPruner": [
        ranked(group, draws=True, hits_target=False, sparsity_range=[0.2, 0.6])
        for group in ("Filters", "Channels", "Blocks")
    ],
    "RandomRankedFilterPruner": [ranked("Filters", draws=True, desired_sparsity=0.45)],
    "RandomRankedFilterPruner_AGP": [ranked("3D", draws=True, initial_sparsity=0.1, final_sparsity=0.7)],
    "BernoulliFilterPruner": [ranked("Filters", draws=True, hits_target=False, desired_sparsity=0.45)],
    "BernoulliFilterPruner_AGP": [
        ranked("3D", draws=True, hits_target=False, initial_sparsity=0.1, final_sparsity=0.7)
    ],
    "NMPruner": [
        Case({"weights": [NAME]}, (6, 8, 3, 3)),
        Case({"weights": [NAME], "n": 1}, (6, 8)),
        Case({"weights": [NAME]}, CONV),
    ],
    "GlobalMagnitudePruner": [
        Case({"weights": [NAME], "final_sparsity": 0.37}),
        Case({"weights": NAME, "initial_sparsity": 0.1, "final_sparsity": 0.77}, LINEAR),
    ],
    **{
        f"{score}RankedFilterPruner{rate}": cases
        for score in ("ActivationAPoZ", "ActivationMean", "Gradient", "TaylorFO")
        for rate, cases in {
            "": [ranked("Filters", desired_sparsity=0.45)],
            "_AGP": [ranked("3D", initial_sparsity=0.1, final_sparsity=0.7)],
        }.items()
    },
    "MovementPruner": [
        Case({"initial_sparsity": 0.0, "final_sparsity": 0.77, "weights": NAME}),
        Case({"initial_sparsity": 0.1, "final_sparsity": 0.5, "weights": [NAME]}, LINEAR),
    ],
    "FMReconstructionChannelPruner": [
        ranked("Channels", desired_sparsity=0.45),
        ranked("Channels", draws=True, desired_sparsity=0.45, ranking_noise=0.5),
    ],
    "StructuredGroupPruner": [
        whole_groups(final_sparsity=0.45, criterion="l2"),
        whole_groups(LINEAR, final_sparsity=0.7, initial_sparsity=0.1, ranking="global"),
        whole_groups(final_macs=0.5),
    ],
    "StructuredGroupTaylorPruner": [
        whole_groups(final_sparsity=0.45),
        whole_groups(LINEAR, final_sparsity=0.7, initial_sparsity=0.1),
        whole_groups(final_macs=0.6, initial_macs=0.9, ranking="global"),
    ],
}


def kind_of(case: Case) -> str:
    regimes = case.settings.get("reg_regims", {NAME: [0, len(case.shape)]})
    return str(case.settings.get("group_type", regimes[NAME][1]))


def pruners(are_meant: Callable[[Case], bool]):
    """A test for each of the cases that are meant."""
    return pytest.mark.parametrize(
        ("class_name", "case"),
        [
            pytest.param(name, case, id=f"{name}-{kind_of(case)}")
            for name, cases in PRUNER_CASES.items()
            for case in cases
            if are_meant(case)
        ],
    )


every_pruner = pruners(lambda case: True)


class Layer(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class Trained(nn.Module):
    """`layer`, a convolution or a linear layer of some shape, and a ReLU."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        outputs, inputs, *kernel = shape
        self.layer = nn.Conv2d(inputs, outputs, kernel[0]) if kernel else nn.Linear(inputs, outputs)
        self.input_shape = (4, inputs, *(5 for _ in kernel))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x))


class Read(nn.Module):
    """`layer`, which is the weight alone, a ReLU, and a layer that reads it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        outputs, inputs, *kernel = shape
        self.layer = nn.Conv2d(inputs, outputs, kernel[0]) if kernel else nn.Linear(inputs, outputs)
        self.layer.register_parameter("bias", None)
        self.reader = nn.Conv2d(outputs, 2, 1) if kernel else nn.Linear(outputs, 2)
        self.input_shape = (4, inputs, *(5 for _ in kernel))

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(torch.relu(self.layer(x)))


@cache
def read(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Read:
    """A `Read`, whose graph is kept with it; pruners of it are given weights of their own."""
    with torch.random.fork_rng():
        return Read(shape).to(dtype)


@cache
def trained_state(class_name: str, settings: str, shape: tuple[int, ...], is_read: bool) -> dict:
    """The state of a data-driven pruner that has seen three mini-batches."""
    with torch.random.fork_rng():
        model = read(shape) if is_read else Trained(shape)
        supplied = {"model": model} if is_read else {}
        pruner = PRUNERS[class_name](name="the_pruner", **supplied, **json.loads(settings))
        params = dict(model.named_parameters())
        ctx = StepContext(model, MaskStore(model), None, EpochWindow.spanning(2, 12), 2)
        pruner.attach(model)
        for _ in range(3):
            model.zero_grad()
            model(torch.randn(model.input_shape)).square().sum().backward()
            pruner.after_backward({NAME: params[NAME]}, ctx)
        pruner.detach()
    return copy.deepcopy(pruner.state_dict())


def made_ready(pruner: Pruner, case: Case, weight: Tensor) -> Pruner:
    """A data-driven pruner with something seen of a weight of that shape; any other as it is."""
    if isinstance(pruner, DataDrivenPruner) and pruner.seen == 0:
        settings = json.dumps(case.settings)
        state = trained_state(type(pruner).__name__, settings, tuple(weight.shape), case.is_read)
        pruner.load_state_dict(state)
    return pruner


def make(class_name: str, case: Case, weight: Tensor | None = None, **others) -> Pruner:
    """A pruner, ready to compute masks of `weight`; by default of one of the case's shape."""
    settings = {**copy.deepcopy(case.settings), **others}
    weight = torch.ones(case.shape) if weight is None else weight
    if "model" in injected(PRUNERS[class_name]):
        settings["model"] = read(tuple(weight.shape), weight.dtype) if case.is_read else context(weight).model
    pruner = PRUNERS[class_name](name="the_pruner", **settings)
    return made_ready(pruner, case, weight)


def context(weight: Tensor, epoch: int = 7) -> StepContext:
    model = nn.Module()
    model.layer = Layer(weight.detach())
    return StepContext(model, MaskStore(model), None, EpochWindow.spanning(2, 12), epoch)


def mask_of(pruner: Pruner, weight: Tensor, epoch: int = 7) -> Tensor:
    return pruner.compute_masks({NAME: weight}, context(weight, epoch))[NAME]


def size_of_group(case: Case) -> int:
    if case.group_elements is not None:
        return case.group_elements
    dims = range(len(case.shape)) if case.group_dims is None else case.group_dims
    return math.prod(case.shape) // math.prod(case.shape[dim] for dim in dims)


def random(case: Case) -> Tensor:
    return torch.randn(case.shape)


WEIGHTS: dict[str, Callable[[Case], Tensor]] = {
    "random": random,
    "tied": lambda case: torch.randn(case.shape).sign(),
    "two values": lambda case: torch.randn(case.shape).round().clamp(0, 1),
    "all equal": lambda case: torch.full(case.shape, 0.25),
    "all zero": lambda case: torch.zeros(case.shape),
    "masked": lambda case: torch.randn(case.shape) * (torch.rand(case.shape) > 0.6),
    "float16": lambda case: torch.randn(case.shape).half(),
    "bfloat16": lambda case: torch.randn(case.shape).bfloat16(),
    "float64": lambda case: torch.randn(case.shape).double(),
    "channels last": lambda case: (
        random(case).to(memory_format=torch.channels_last) if len(case.shape) == 4 else random(case)
    ),
    "transposed": lambda case: random(case).transpose(0, 1).contiguous().transpose(0, 1),
    "one element": lambda case: torch.randn(case.least or [1] * len(case.shape)),
    "requires grad": lambda case: random(case).requires_grad_(),
}

every_weight = in_turn("kind", WEIGHTS)


def test_every_registered_pruner_has_a_case():
    assert set(PRUNER_CASES) == set(PRUNERS)


@every_pruner
@every_weight
def test_masks_are_0_or_one_value_of_the_parameters_shape_dtype_device_and_strides(class_name, case, kind):
    weight = WEIGHTS[kind](case)
    mask = mask_of(make(class_name, case, weight), weight)
    kept = mask[mask != 0]
    if "Bernoulli" in class_name:  # the mean of the mask is 1
        assert torch.allclose(kept, (mask != 0).to(mask.dtype).mean().reciprocal())
    else:
        assert bool((kept == 1).all())
    assert (mask.shape, mask.dtype, mask.device, mask.stride()) == (
        weight.shape,
        weight.dtype,
        weight.device,
        weight.stride(),
    )
    assert not mask.requires_grad


@every_pruner
@every_weight
def test_neither_parameters_nor_model_are_changed(class_name, case, kind):
    weight = WEIGHTS[kind](case)
    before = weight.detach().clone()
    ctx = context(weight)
    in_model = ctx.model.layer.weight.detach().clone()  # type: ignore[union-attr]
    make(class_name, case, weight).compute_masks({NAME: weight}, ctx)
    assert torch.equal(weight.detach(), before)
    assert torch.equal(ctx.model.layer.weight.detach(), in_model)  # type: ignore[union-attr]
    assert ctx.masks.masked() == {}


@pruners(lambda case: case.hits_target)
@in_turn("epoch", [2, 5, 11])
@every_weight
def test_sparsity_is_within_one_element_or_group_of_the_target(class_name, case, kind, epoch):
    weight = WEIGHTS[kind](case)
    pruner = make(class_name, case, weight)
    (target,) = set(pruner.target_sparsity(context(weight, epoch)).values())
    zeros = int((mask_of(pruner, weight, epoch) == 0).sum())
    group = size_of_group(case) if weight.numel() > 1 else 1
    assert target * weight.numel() - group < zeros <= target * weight.numel() + 1e-6


@pruners(lambda case: not case.hits_target)
def test_what_depends_on_the_weights_or_is_drawn_has_no_target(class_name, case):
    weight = random(case)
    targets = make(class_name, case, weight).target_sparsity(context(weight))
    assert (targets != {}) == ("Bernoulli" in class_name)  # those come to it in the mean


@every_pruner
@in_turn("epoch", [2, 11])
@in_turn("kind", ["random", "one element"])
def test_of_what_is_too_small_nothing_goes_and_of_the_rest_something(class_name, case, kind, epoch):
    weight = WEIGHTS[kind](case)
    pruner, ctx = make(class_name, case, weight), context(weight, epoch)
    is_small = pruner.too_small({NAME: weight}, ctx) == (NAME,)
    if "Bernoulli" in class_name or not pruner.target_sparsity(ctx):
        assert not is_small  # depends on the data, or on what is drawn
        return
    assert bool(mask_of(pruner, weight, epoch).all()) == is_small


@pruners(lambda case: case.group_dims is not None)
@every_weight
def test_masks_are_constant_within_groups(class_name, case, kind):
    weight = WEIGHTS[kind](case)
    mask = mask_of(make(class_name, case, weight), weight)
    for dim in set(range(mask.dim())).difference(case.group_dims):
        assert torch.equal(mask, mask.narrow(dim, 0, 1).expand_as(mask))


@every_pruner
@every_weight
def test_masks_are_deterministic(class_name, case, kind):
    weight = WEIGHTS[kind](case)
    torch.manual_seed(123)
    first = mask_of(make(class_name, case, weight), weight)
    torch.manual_seed(123 if case.draws else 321)
    assert torch.equal(mask_of(make(class_name, case, weight), weight), first)


@every_pruner
def test_a_resumed_pruner_goes_on_as_if_it_had_not_been_interrupted(class_name, case):
    pruner, resumed = make(class_name, case), make(class_name, case)
    weight = random(case)
    pruned = weight * mask_of(pruner, weight, epoch=2)

    stored = io.BytesIO()
    torch.save(pruner.state_dict(), stored)
    stored.seek(0)
    resumed.load_state_dict(torch.load(stored, weights_only=True))

    for epoch in (3, 7, 11):
        generator = torch.get_rng_state()  # a checkpoint has it
        expected = mask_of(pruner, pruned, epoch)
        torch.set_rng_state(generator)
        assert torch.equal(mask_of(resumed, pruned, epoch), expected)


@pruners(lambda case: not case.draws)
def test_what_is_pruned_stays_pruned_when_the_target_grows(class_name, case):
    pruner = make(class_name, case)
    weight = random(case)
    mask = mask_of(pruner, weight, epoch=2)
    for epoch in range(3, 12):
        new = mask_of(pruner, torch.randn(case.shape) * mask, epoch)
        assert (new <= mask).all()
        mask = new


@every_pruner
def test_nan_is_refused_naming_pruner_and_parameter(class_name, case):
    weight = random(case)
    weight.view(-1)[3] = float("nan")
    with pytest.raises(DistillerError, match=r"^pruner 'the_pruner', 'layer\.weight': .*NaN"):
        mask_of(make(class_name, case), weight)


@every_pruner
def test_only_selected_parameters_get_masks(class_name, case):
    others = {"levels": {NAME: 0.5}} if "levels" in case.settings else {}
    pruner = make(class_name, case, None, **others)
    weight = random(case)
    names = ["layer.bias", NAME, "other.layer.weight"]
    assert pruner.select(names) == (NAME,)
    assert list(pruner.compute_masks(dict.fromkeys(names, weight), context(weight))) == [NAME]


@pruners(lambda case: "*" not in case.settings.get("levels", {}))
def test_a_name_that_the_model_does_not_have_is_refused(class_name, case):
    with pytest.raises(UnknownNameError, match=r"no parameter 'layer\.weight' in the model"):
        make(class_name, case).select(["conv.weight"])


@every_pruner
def test_distillers_set_param_mask_fills_the_entry_of_the_parameter(class_name, case):
    weight = random(case)
    ctx = context(weight)
    pruner = make(class_name, case)
    torch.manual_seed(5)
    pruner.set_param_mask(weight, NAME, ctx.masks, ctx)
    found = ctx.masks[NAME].mask
    assert found is not None
    torch.manual_seed(5)
    assert torch.equal(found, mask_of(make(class_name, case), weight))


@pytest.mark.parametrize("class_name", PRUNERS)
def test_constructors_take_the_name_first_and_every_argument_has_a_type(class_name):
    parameters = list(inspect.signature(PRUNERS[class_name]).parameters)
    hints = typing.get_type_hints(PRUNERS[class_name].__init__)
    assert parameters[0] == "name"
    assert set(parameters) <= set(hints)
