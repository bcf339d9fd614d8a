"""What every registered pruner, regularizer and extension must do when the model is thinned in mid-training.

It goes on with what is left, and a run that is resumed afterwards goes on bit for bit as if it had not been
interrupted. A new one needs a row in PRUNER_CASES, CASES or EXTENSION_SETTINGS.
"""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn

import distiller  # noqa: F401 - registers everything
from distiller.apputils.checkpoint import (
    load_state,
    read_checkpoint,
    restore_optimizer,
    restore_rng_state,
    restore_scheduler,
    save_checkpoint,
)
from distiller.channel_groups import find_channel_groups
from distiller.interfaces import Policy
from distiller.policy import PruningPolicy, RegularizationPolicy
from distiller.registry import EXTENSIONS, PRUNERS, REGULARIZERS
from distiller.scheduler import CompressionScheduler
from distiller.signatures import injected
from distiller.thinning import ThinningRecipe, apply_recipe, thinning_recipe
from tests.contract.test_pruners import CONV, NAME, PRUNER_CASES, kind_of
from tests.contract.test_regularizers import CASES

EXTENSION_SETTINGS = {
    "SoftWeightSharing": [
        {"components": 4, "initial_std": 0.1, "tau": 1e-3},
        {"components": 4, "per_parameter": True, "weights": [NAME], "initial_means": "kmeans"},
    ],
    "KMeansWeightSharing": [{"bits": {"*.weight": 2}}],
    "QuantizeToMixture": [{"components": 4}, {"mode": "zero_bin", "weights": [NAME]}],
    "L0Regularizer": [
        {"reg_regims": {NAME: [0.01, group]}, "keep_probability": 0.7}
        for group in ("Elements", "2D", "Channels", "Filters")
    ],
    "WeightRewinder": [{}, {"late": True}],
    "FilterRemover": [{}],
    "ChannelRemover": [{}],
    "StructureRemover": [{}],
    "LowRankFactorization": [],  # its layers have other names after it: tests/factorization thins them
    "KnowledgeDistillation": [{"temperature": 4}, {"hints": [{"teacher": "after", "student": "before"}]}],
}
REMOVED = {"before.weight": [0, 2], "layer.weight": [3]}
SCALING = {"use_double_copies": True, "mask_on_forward_only": True}


class Stack(nn.Module):
    """before - ReLU - layer, of some shape - ReLU - after."""

    def __init__(self, shape):
        super().__init__()
        outputs, inputs, *kernel = shape
        if kernel:
            self.before = nn.Conv2d(2, inputs, 1)
            self.layer = nn.Conv2d(inputs, outputs, kernel[0])
            self.after = nn.Conv2d(outputs, 3, 1)
        else:
            self.before, self.layer = nn.Linear(2, inputs), nn.Linear(inputs, outputs)
            self.after = nn.Linear(outputs, 3)
        self.arch, self.dataset = "stack", None
        self.input_shape = (4, 2, *(5 for _ in kernel))

    def forward(self, x):
        return self.after(torch.relu(self.layer(torch.relu(self.before(x)))))


class Thinner(Policy):
    """Thins the model before the second mini-batch of epoch 1."""

    def __init__(self, recipe):
        self.recipe = recipe

    def on_minibatch_begin(self, ctx):
        if (ctx.epoch, ctx.minibatch) == (1, 1):
            apply_recipe(ctx.model, self.recipe, ctx.optimizer, ctx.masks, ctx.policies)


@cache
def recipe_of(shape, with_filters) -> ThinningRecipe:
    model = Stack(shape)
    groups = find_channel_groups(model, torch.zeros(model.input_shape))
    removed = REMOVED if with_filters else {"before.weight": REMOVED["before.weight"]}
    return thinning_recipe(model, groups, removed)


def epoch_of(model, optimizer, scheduler, epoch, batches=3):
    scheduler.on_epoch_begin(epoch, optimizer)
    for step in range(batches):
        scheduler.on_minibatch_begin(epoch, step, batches, optimizer)
        loss = model(torch.randn(model.input_shape)).square().mean()
        loss = scheduler.before_backward_pass(epoch, step, batches, loss, optimizer)
        optimizer.zero_grad()
        loss.backward()
        scheduler.before_parameter_optimization(epoch, step, batches, optimizer)
        optimizer.step()
        scheduler.on_minibatch_end(epoch, step, batches, optimizer)
    scheduler.on_epoch_end(epoch, optimizer, {"loss": 1.0, "top1": 50.0})


def put_together(shape, make_policy, recipe, checkpoint=None):
    """A model, its optimizer and its scheduler; as a checkpoint left them."""
    model = Stack(shape)
    if checkpoint is not None:
        load_state(model, checkpoint)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = CompressionScheduler(model)
    scheduler.add_policy(make_policy(model), epochs=range(5), name="subject")
    scheduler.add_policy(Thinner(recipe), epochs=range(5), name="thinner")
    if checkpoint is not None:
        restore_scheduler(scheduler, checkpoint)
        restore_optimizer(model, checkpoint, optimizer)
        restore_rng_state(checkpoint.rng)
    return model, optimizer, scheduler


def check_that_it_goes_on(folder, shape, make_policy, with_filters=True):
    recipe = recipe_of(shape, with_filters)
    model, optimizer, scheduler = put_together(shape, make_policy, recipe)
    for epoch in range(3):
        epoch_of(model, optimizer, scheduler, epoch)
    wanted = list(shape)
    wanted[0] -= with_filters
    wanted[1] -= 2
    params = dict(model.named_parameters())
    assert list(params[NAME].shape)[: len(wanted)] == wanted
    for name, mask in scheduler.masks.masked().items():
        assert mask.shape == params[name].shape, name

    with scheduler.masked():
        path = save_checkpoint(2, "stack", model, optimizer, scheduler, dir=folder)
    epoch_of(model, optimizer, scheduler, 3)
    resumed, optimizer, again = put_together(shape, make_policy, recipe, read_checkpoint(path))
    epoch_of(resumed, optimizer, again, 3)
    for name, value in model.state_dict().items():
        assert value.isfinite().all(), name
        assert torch.equal(value, resumed.state_dict()[name]), name
    for name, mask in scheduler.masks.masked().items():
        assert torch.equal(mask, again.masks.masked()[name]), name


@pytest.mark.parametrize(
    ("class_name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{kind_of(case)}")
        for name, cases in PRUNER_CASES.items()
        for case in cases
    ],
)
def test_a_pruner_goes_on_after_a_thinning_and_through_a_restart(tmp_path, class_name, case):
    def make_policy(model):
        settings = copy.deepcopy(case.settings)
        if "model" in injected(PRUNERS[class_name]):
            settings["model"] = model
        pruner = PRUNERS[class_name](name="p", **settings)
        return PruningPolicy(pruner, SCALING if pruner.rescales or "Movement" in class_name else None)

    # blocks are of 8 filters, which must stay together
    check_that_it_goes_on(tmp_path, case.shape, make_policy, case.settings.get("group_type") != "Blocks")


@pytest.mark.parametrize(
    ("class_name", "case"),
    [
        pytest.param(name, case, id=f"{name}-{case.settings['reg_regims'][NAME]}-{index}")
        for name, cases in CASES.items()
        for index, case in enumerate(cases)
    ],
)
def test_a_regularizer_goes_on_after_a_thinning_and_through_a_restart(tmp_path, class_name, case):
    def make_policy(model):
        settings = copy.deepcopy(case.settings)
        keep_mask = settings.get("threshold_criteria") is not None
        return RegularizationPolicy(REGULARIZERS[class_name]("r", model, **settings), keep_mask)

    check_that_it_goes_on(tmp_path, case.shape, make_policy)


def test_every_registered_extension_has_settings_here():
    assert set(EXTENSION_SETTINGS) == set(EXTENSIONS)


@pytest.mark.parametrize(
    ("class_name", "settings"),
    [(name, settings) for name, several in EXTENSION_SETTINGS.items() for settings in several],
)
def test_an_extension_goes_on_after_a_thinning_and_through_a_restart(tmp_path, class_name, settings):
    def make_policy(model):
        extra = {"model": model} if "model" in injected(EXTENSIONS[class_name]) else {}
        extension = EXTENSIONS[class_name](name="e", **extra, **copy.deepcopy(settings))
        if class_name == "KnowledgeDistillation":
            torch.manual_seed(1)
            extension.learn_from(Stack(CONV))
        return extension

    check_that_it_goes_on(tmp_path, CONV, make_policy)
