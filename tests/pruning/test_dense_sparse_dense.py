"""A sparsity may fall as well as rise: pruned weights come back, from zero, and are trained again.

Source: Han et al., "DSD: Dense-Sparse-Dense Training for Deep Neural Networks" (arXiv 1607.04381).
"""

import pytest
import torch

from distiller.policy import PruningPolicy
from distiller.pruning import (
    AutomatedGradualPruner,
    GlobalMagnitudePruner,
    L1RankedStructureParameterPruner_AGP,
)
from distiller.scheduler import CompressionScheduler
from tests.doubles import train

RISE_AND_FALL = {
    "elements": (
        lambda: AutomatedGradualPruner("up", 0.0, 0.75, "conv2.weight"),
        lambda: AutomatedGradualPruner("down", 0.75, 0.0, "conv2.weight"),
        216,
    ),
    "elements of all layers": (
        lambda: GlobalMagnitudePruner("up", 0.75, ["conv2.weight"], initial_sparsity=0.0),
        lambda: GlobalMagnitudePruner("down", 0.0, ["conv2.weight"], initial_sparsity=0.75),
        216,
    ),
    "filters": (
        lambda: L1RankedStructureParameterPruner_AGP("up", 0.0, 0.75, "Filters", "conv2.weight"),
        lambda: L1RankedStructureParameterPruner_AGP("down", 0.75, 0.0, "Filters", "conv2.weight"),
        6,
    ),
}


@pytest.mark.parametrize("kind", RISE_AND_FALL)
def test_the_measured_sparsity_rises_and_falls(tiny_cnn, kind):
    up, down, count = RISE_AND_FALL[kind]
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(PruningPolicy(up()), starting_epoch=0, ending_epoch=4)
    scheduler.add_policy(PruningPolicy(down()), starting_epoch=4, ending_epoch=8)
    measured = train(tiny_cnn, scheduler, range(10))

    rising = [0.75 - 0.75 * (1 - epoch / 3) ** 3 for epoch in range(4)]
    falling = [0.75 * (1 - epoch / 3) ** 3 for epoch in range(4)]
    expected = [int(target * count + 1e-9) / count for target in (*rising, *falling, 0, 0)]
    assert measured == pytest.approx(expected)


def test_restored_weights_start_from_zero_and_the_others_are_not_disturbed(tiny_cnn):
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(
        PruningPolicy(AutomatedGradualPruner("p", 0.5, 0.0, "conv2.weight")), starting_epoch=0, ending_epoch=2
    )
    optimizer = torch.optim.SGD(tiny_cnn.parameters(), lr=0.1)
    dense = tiny_cnn.conv2.weight.detach().clone()
    scheduler.on_epoch_begin(0, optimizer)
    scheduler.on_minibatch_begin(0, 0, 1, optimizer)
    pruned = tiny_cnn.conv2.weight == 0
    assert int(pruned.sum()) == 108
    scheduler.on_minibatch_end(0, 0, 1, optimizer)
    scheduler.on_epoch_end(0, optimizer, {"loss": 1.0, "top1": 50.0})
    scheduler.on_epoch_begin(1, optimizer)
    scheduler.on_minibatch_begin(1, 0, 1, optimizer)
    assert bool((scheduler.masks["conv2.weight"].mask == 1).all())  # type: ignore[union-attr]
    assert torch.equal(tiny_cnn.conv2.weight, torch.where(pruned, 0.0, dense))
