"""The cost by units is what the groups themselves count."""

from __future__ import annotations

import random

import pytest

from distiller.channel_groups import ChannelGroup, ChannelGroups, WorkShare
from distiller.models import create_model
from distiller.sensitivity.group_work import cost_of_units
from distiller.thinning.trial import model_groups
from tests.replay.networks import make

DATASETS = {
    "lenet5": "mnist",
    "resnet20_cifar": "cifar10",
    "mobilenet_cifar": "cifar10",
    "squeezenet1_1": "imagenet",
}


def network(name):
    if name in DATASETS:
        return create_model(False, DATASETS[name], name, parallel=False)
    model = make(name)
    model.input_shape = (1, 1, 8, 8)
    return model


@pytest.mark.parametrize("name", [*DATASETS, "Plain", "Residual"])
def test_it_is_what_the_groups_count(name):
    model = network(name)
    groups = model_groups(model, "test")
    sizes = {group.name: group.size for group in groups if group.is_removable}
    cost = cost_of_units(groups, sizes)
    assert cost is not None
    assert sizes
    draw = random.Random(1)
    for _ in range(10):
        kept = {name: draw.randint(1, size) for name, size in sizes.items()}
        removed = {name: draw.sample(range(size), size - kept[name]) for name, size in sizes.items()}
        assert cost.of(kept) == groups.macs(removed)


def test_groups_that_are_not_asked_for_stay():
    groups = model_groups(network("resnet20_cifar"), "test")
    name = "layer1.0.conv1.weight"
    cost = cost_of_units(groups, [name])
    assert cost is not None
    assert cost.of({name: groups[name].size}) == groups.macs()
    assert cost.of({name: 3}) == groups.macs({name: range(groups[name].size - 3)})


def test_a_product_of_three_groups_is_no_such_cost():
    groups = tuple(ChannelGroup(name, 2, (), None, ()) for name in "abc")
    factors = tuple(tuple((name, unit) for unit in range(2)) for name in "abc")
    assert cost_of_units(ChannelGroups(groups, (WorkShare("w", 80, factors),)), "abc") is None
    cost = cost_of_units(ChannelGroups(groups, (WorkShare("w", 80, factors),)), "ab")
    assert cost is not None
    assert cost.of({"a": 1, "b": 2}) == 40


@pytest.mark.parametrize(
    "macs, factor", [(7, (("a", 0), ("a", 1))), (30, (("a", 0), ("a", 1), ("a", 1)))], ids=["rest", "uneven"]
)
def test_what_no_number_of_units_says_is_no_such_cost(macs, factor):
    groups = ChannelGroups((ChannelGroup("a", 2, (), None, ()),), (WorkShare("w", macs, (factor,)),))
    assert cost_of_units(groups, "a") is None
