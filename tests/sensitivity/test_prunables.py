from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distiller.config import dict_config
from distiller.errors import SensitivityError, UsageError
from distiller.model_summaries import total_macs
from distiller.names import named_parameters
from distiller.pruning.n_to_m import n_to_m_mask
from distiller.sensitivity.prunables import (
    coupled_prunables,
    macs_by_weight,
    removed_work,
    single_prunables,
)
from distiller.sensitivity.schedule_text import Chosen, pruning_epochs, recommended_schedule
from distiller.thinning import apply_recipe, thinning_recipe
from distiller.thinning.trial import model_groups

LEVELS = (0.5, 0.05, 0.25, 1.0)


class Residual(nn.Module):
    """conv1 - bn1 - relu - (conv2 - relu - conv3) + shortcut - pool - fc."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (1, 1, 8, 8)
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1)
        self.conv3 = nn.Conv2d(4, 8, 3, padding=1)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = x + self.conv3(self.conv2(x).relu())
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def residual():
    return Residual()


def shapes_of(model):
    return {name: tuple(param.shape) for name, param in named_parameters(model)}


def test_levels_of_a_weight_take_elements_and_their_share_of_the_macs():
    (own,) = single_prunables("element", {"w": (4, 5, 1, 1)}, {"w": 2000}, LEVELS, 4)
    assert (own.weights, own.curves, own.elements, own.size) == (("w",), ("w",), 20, 0)
    assert {level: (a.elements, a.macs) for level, a in own.amounts.items()} == {
        0.05: (1, 100), 0.25: (5, 500), 0.5: (10, 1000),
    }  # fmt: skip


def test_a_level_that_takes_nothing_or_all_is_none():
    (own,) = single_prunables("element", {"w": (3, 3)}, {}, (0.05, 0.5, 1.0), 4)
    assert list(own.amounts) == [0.5]
    (own,) = single_prunables("channel", {"w": (6, 2, 3, 3)}, {}, (0.25, 0.5, 0.95, 1.0), 4)
    assert {level: (a.elements, a.units) for level, a in own.amounts.items()} == {
        0.5: (54, 1), 0.95: (54, 1),
    }  # fmt: skip


def test_of_m_neighbours_elements_are_counted_as_the_pruner_masks_them():
    for channels in (8, 10):
        weight = torch.randn(3, channels)
        (own,) = single_prunables("n:m", {"w": (3, channels)}, {}, (0.25, 0.5, 0.75), 4)
        assert {level: a.elements for level, a in own.amounts.items()} == {
            k / 4: int((n_to_m_mask(weight, 4 - k, 4) == 0).sum()) for k in (1, 2, 3)
        }


def test_a_level_of_other_blocks_is_refused():
    with pytest.raises(UsageError) as error:
        single_prunables("n:m", {"w": (3, 8)}, {}, (1 / 3,), 4)
    assert str(error.value) == (
        "axis 'n:m': level 0.333333 is not of blocks of 4, as the sweep says they are"
    )


def test_bits_save_bits_and_fewer_are_stronger():
    (own,) = single_prunables("weight-bits", {"w": (2, 5)}, {}, (1.0, 2.0, 8.0), 4)
    assert {bits: a.elements for bits, a in own.amounts.items()} == {8.0: 240, 2.0: 300}
    assert list(own.amounts) == [8.0, 2.0]


def test_ranks_save_parameters_and_macs_where_factors_are_smaller():
    fc, conv = single_prunables(
        "rank", {"fc": (100, 60), "conv": (20, 10, 3, 3)}, {"fc": 6000, "conv": 180_000}, (0.1, 0.5, 0.9), 4
    )
    assert [fc.size, conv.size] == [60, 20]
    # fc: 54 (100 + 60) > 6,000; 30 (100 + 60) = 4,800; 6 * 160 = 960
    assert {level: (a.elements, a.macs, a.units) for level, a in fc.amounts.items()} == {
        0.5: (1200, 1200, 30), 0.9: (5040, 5040, 54),
    }  # fmt: skip
    # conv: 18 (90 + 20) > 1,800; 10 * 110 = 1,100; 2 * 110 = 220; each at 100 positions
    assert {level: (a.elements, a.macs, a.units) for level, a in conv.amounts.items()} == {
        0.5: (700, 70_000, 10), 0.9: (1580, 158_000, 18),
    }  # fmt: skip


def test_no_schedule_is_made_of_activation_bits():
    with pytest.raises(UsageError) as error:
        single_prunables("activation-bits", {"w": (2, 5)}, {}, (0.5,), 4)
    assert str(error.value) == (
        "axis 'activation-bits': no schedule is made of it, only of element, channel, n:m, weight-bits, rank, filter, group"
    )


def test_filters_that_are_added_go_together_with_the_channels_of_who_reads_them(residual):
    swept = ["conv1.weight", "conv2.weight", "conv3.weight"]
    found, reasons, _ = coupled_prunables(
        "filter", model_groups(residual, "test"), shapes_of(residual), swept, LEVELS
    )
    assert [(own.name, own.weights, own.curves, own.size) for own in found] == [
        ("conv1.weight", ("conv1.weight", "conv3.weight"), ("conv1.weight", "conv3.weight"), 8),
        ("conv2.weight", ("conv2.weight",), ("conv2.weight",), 4),
    ]
    assert reasons == {}
    assert {level: (a.units, a.elements) for level, a in found[0].amounts.items()} == {
        0.25: (2, 2 * 9 + 2 * 36 + 2 * 36), 0.5: (4, 4 * 9 + 4 * 36 + 4 * 36),
    }  # fmt: skip


def test_groups_go_by_their_name(residual):
    groups = model_groups(residual, "test")
    found, reasons, _ = coupled_prunables("group", groups, shapes_of(residual), ["conv2.weight"], LEVELS)
    assert [(own.name, own.weights, own.curves) for own in found] == [
        ("conv2.weight", ("conv2.weight",), ("conv2.weight",))
    ]
    assert reasons == {}
    with pytest.raises(SensitivityError) as error:
        coupled_prunables("group", groups, shapes_of(residual), ["conv9.weight"], LEVELS)
    assert str(error.value) == (
        "sweep: the model has no channel group 'conv9.weight'; it is of another model"
    )


class Shared(nn.Module):
    """A layer whose filters are of two groups, each with another layer."""

    def __init__(self):
        super().__init__()
        self.input_shape = (1, 3, 8, 8)
        self.stem, self.read = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return self.read(self.stem(x) + torch.cat([self.left(x), self.right(x)], 1)).flatten(1)


class Overlapping(nn.Module):
    """Filters 2 and 3 of the sum are made by layers that make others, too."""

    def __init__(self):
        super().__init__()
        self.input_shape = (1, 3, 8, 8)
        self.all, self.read = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.first4, self.last4 = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.first2, self.last6 = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 6, 1)

    def forward(self, x):
        halves = torch.cat([self.first4(x), self.last4(x)], 1)
        return self.read(self.all(x) + halves + torch.cat([self.first2(x), self.last6(x)], 1)).flatten(1)


def prunables_of_all_groups(model):
    groups = model_groups(model, "a test")
    names = [group.name for group in groups if group.reason is None]
    return coupled_prunables("group", groups, shapes_of(model), names, (0.25, 0.5))[:2]


def test_groups_that_share_a_layer_are_told_apart_by_another():
    """Else the level of one would be that of both."""
    torch.manual_seed(0)
    model = Shared()
    found, reasons = prunables_of_all_groups(model)
    assert reasons == {}
    assert {own.name: own.weights for own in found} == {
        "stem.weight": ("left.weight", "stem.weight"),
        "stem.weight#2": ("right.weight", "stem.weight"),
    }
    chosen = [Chosen(own.weights, level) for own, level in zip(found, (0.25, 0.5), strict=True)]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scheduler = dict_config(model, optimizer, recommended_schedule("group", chosen, 4))
    for epoch in range(pruning_epochs(4)):
        scheduler.on_epoch_begin(epoch, optimizer)
    masks = scheduler.masks.masked()
    gone = {
        name: int((masks[f"{name}.weight"].flatten(1).sum(1) == 0).sum())
        for name in ("left", "right", "stem")
    }
    assert gone == {"left": 1, "right": 2, "stem": 3}


def test_a_group_without_a_layer_of_its_own_stays_whole():
    found, reasons = prunables_of_all_groups(Overlapping())
    assert [own.weights[0] for own in found] == ["first2.weight", "last4.weight"]
    (reason,) = reasons.values()
    assert reason.startswith("all layers that make its units make those of groups 'first4.weight'")


def test_what_stays_whole_says_why(residual):
    groups = model_groups(residual, "test")
    found, reasons, _ = coupled_prunables("filter", groups, shapes_of(residual), ["conv1.weight"], LEVELS)
    assert found == ()
    assert reasons == {"conv1.weight": "conv3.weight goes with it and was not swept"}
    _, reasons, _ = coupled_prunables("filter", groups, shapes_of(residual), ["fc.weight"], LEVELS)
    assert set(reasons) == {"fc.weight"}


def test_macs_and_elements_of_several_groups_are_those_of_the_thinned_network(residual):
    groups = model_groups(residual, "test")
    swept = ["conv1.weight", "conv2.weight", "conv3.weight"]
    found, _, elements = coupled_prunables("filter", groups, shapes_of(residual), swept, LEVELS)
    levels = {"conv1.weight": 0.5, "conv2.weight": 0.25}
    thinned = copy.deepcopy(residual)
    apply_recipe(thinned, thinning_recipe(thinned, groups, {"conv1.weight": range(4), "conv2.weight": (0,)}))
    dense, left = (total_macs(model, (1, 1, 8, 8)) for model in (residual, thinned))
    assert removed_work(groups, found, levels) == dense - left
    alone = [removed_work(groups, found, {name: level}) for name, level in levels.items()]
    assert alone == [own.amounts[levels[own.name]].macs for own in found]
    assert sum(alone) > dense - left
    assert removed_work(groups, found, {"conv1.weight": 0.0}) == 0
    whole, small = (dict(model.named_parameters()) for model in (residual, thinned))
    gone = sum(whole[name].numel() - small[name].numel() for name in swept)
    assert removed_work(elements, found, levels) == gone
    assert sum(own.amounts[levels[own.name]].elements for own in found) > gone


def test_macs_are_those_of_the_layers_of_weights(residual):
    by_weight, total = macs_by_weight(residual, torch.zeros(1, 1, 8, 8))
    assert by_weight == {
        "conv1.weight": 64 * 72, "conv2.weight": 64 * 288, "conv3.weight": 64 * 288, "fc.weight": 24,
    }  # fmt: skip
    assert total == sum(by_weight.values()) == total_macs(residual, (1, 1, 8, 8))


class TwoHeads(nn.Module):
    """A layer that has two names, and another that has its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.again = self.first
        self.other = nn.Linear(8, 8)
        self.other.weight = self.first.weight
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.other(self.again(self.first(x)).relu()))


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_a_weight_that_several_layers_have_does_the_work_of_all(wrap):
    by_weight, total = macs_by_weight(wrap(TwoHeads()), torch.zeros(1, 8))
    assert by_weight == {"first.weight": 3 * 64, "last.weight": 24}
    assert total == 3 * 64 + 24


def test_a_parametrized_weight_keeps_its_work():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    by_weight, total = macs_by_weight(model, torch.zeros(1, 8))
    made_of = "0.parametrizations.weight.original"
    assert by_weight == {f"{made_of}0": 64 * 8 // 72, f"{made_of}1": 64 * 64 // 72, "1.weight": 24}
    assert total == 88
