from __future__ import annotations

import pytest
import torch

from distiller.channel_groups import find_channel_groups
from distiller.errors import UnknownNameError, UsageError


@pytest.fixture
def groups(tiny_cnn):
    return find_channel_groups(tiny_cnn, torch.zeros(1, 1, 8, 8))


def test_macs_by_hand(groups):
    # conv1: 4 filters of 1x3x3, conv2: 6 of 4x3x3, each at 64 places; fc: 6x4
    assert groups.macs() == 64 * 4 * 9 + 64 * 6 * 4 * 9 + 24
    removed = {"conv1.weight": [0], "conv2.weight": [1, 5]}
    assert groups.macs(removed) == 64 * 3 * 9 + 64 * 4 * 3 * 9 + 16


def test_iteration_size_and_look_up(groups):
    assert len(groups) == len(list(groups)) == 4
    assert groups.of("conv2.weight", 1) == (groups["conv1.weight"],)
    assert groups.of("conv2.weight", 3) == ()


def test_an_unknown_group_is_refused(groups):
    with pytest.raises(
        UnknownNameError, match=r"no channel group 'conv1\.weigth'; did you mean 'conv1\.weight'\?"
    ):
        groups["conv1.weigth"]


def test_units_that_cannot_be_removed_are_refused(groups):
    with pytest.raises(
        UsageError, match="channel group 'fc.weight': no unit can be removed, the network returns it"
    ):
        groups.macs({"fc.weight": [0]})
    with pytest.raises(UsageError, match=r"channel group 'conv1.weight': units are 0\.\.3, got \[4\]"):
        groups.macs({"conv1.weight": [4]})
