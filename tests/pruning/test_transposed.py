"""Transposed convolutions have inputs first: pruners that take dimension 0 for filters refuse them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distiller.errors import DistillerError
from distiller.policy import PruningPolicy
from distiller.pruning import (
    L1RankedStructureParameterPruner,
    NMPruner,
    SparsityLevelParameterPruner,
    StructuredGroupPruner,
    StructureParameterPruner,
    TaylorFORankedFilterPruner,
)
from distiller.scheduler import CompressionScheduler


def model() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 8, 3), nn.Conv2d(8, 2, 3))
    net.input_shape = (1, 3, 8, 8)
    return net


@pytest.mark.parametrize(
    "pruner",
    [
        L1RankedStructureParameterPruner("p", "Filters", 0.5, ["1.weight"]),
        TaylorFORankedFilterPruner("p", "Filters", 0.5, ["1.weight"]),
        NMPruner("p", ["1.weight"]),
        StructureParameterPruner("p", model(), {"1.weight": [0.1, "Filters"]}, "Mean_Abs"),
    ],
    ids=lambda pruner: type(pruner).__name__,
)
def test_a_transposed_convolution_is_refused_before_training(pruner):
    with pytest.raises(DistillerError) as caught:
        CompressionScheduler(model()).add_policy(PruningPolicy(pruner), epochs=[0])
    assert str(caught.value) == (
        "'1.weight' is of a transposed convolution, which has its inputs along dimension 0 and its outputs "
        "along dimension 1: filters and channels would be mistaken for each other; take "
        "StructuredGroupPruner, which tells them apart, or a pruner of single elements"
    )


def test_single_elements_of_one_are_pruned():
    net = model()
    scheduler = CompressionScheduler(net)
    scheduler.add_policy(PruningPolicy(SparsityLevelParameterPruner("p", {"1.weight": 0.5})), epochs=[0])
    scheduler.on_epoch_begin(0)
    assert scheduler.masks["1.weight"].mask.mean() == 0.5


def test_whole_groups_prune_its_outputs_along_dimension_1():
    torch.manual_seed(0)
    net = model()
    pruner = StructuredGroupPruner("p", net, final_sparsity=0.5, weights=["1.weight"])
    scheduler = CompressionScheduler(net)
    scheduler.add_policy(PruningPolicy(pruner), epochs=[0])
    scheduler.on_epoch_begin(0)
    outputs = scheduler.masks["1.weight"].mask.transpose(0, 1).flatten(1)
    assert (outputs.sum(1) == 0).sum() == 4
