"""What the scheduler tells of policies that cannot do what they aim at."""

from __future__ import annotations

import math

import pytest

from distiller.policy import PruningPolicy
from distiller.pruning import (
    AutomatedGradualPruner,
    BernoulliFilterPruner,
    GlobalMagnitudePruner,
    L1RankedStructureParameterPruner,
    NMPruner,
    RandomLevelStructureParameterPruner,
    RandomRankedFilterPruner,
    SparsityLevelParameterPruner,
)
from distiller.scheduler import CompressionScheduler

NAMES = ("conv1.weight", "conv2.weight")  # of 4 and of 6 filters; of 1 and of 4 input channels
BIASES = ("conv2.bias", "fc.weight")  # of 6 and of 24 elements
DROPPED = {
    "discard_masks_at_minibatch_end": True,
    "use_double_copies": True,
    "mask_on_forward_only": True,
}


def l1(sparsity: float, *names: str, **settings) -> L1RankedStructureParameterPruner:
    return L1RankedStructureParameterPruner("p", "Filters", sparsity, list(names), **settings)


@pytest.mark.parametrize(
    ("pruner", "args", "small"),
    [
        (NMPruner("p", list(NAMES)), {}, NAMES[:1]),
        (NMPruner("p", list(NAMES), n=4, m=8), {}, NAMES),
        (l1(0.2, *NAMES), {}, NAMES[:1]),
        (l1(0.1, *NAMES), {}, NAMES),
        (l1(0.4, *NAMES, group_size=2), {}, NAMES[:1]),
        (l1(0.4, *NAMES, group_size=2, rounding_fn=math.ceil), {}, ()),
        (AutomatedGradualPruner("p", 0.0, 0.1, list(BIASES)), {}, BIASES[:1]),
        (AutomatedGradualPruner("p", 0.3, 0.0, list(BIASES)), {}, ()),
        (GlobalMagnitudePruner("p", 0.03, list(BIASES)), {}, BIASES),
        (GlobalMagnitudePruner("p", 0.04, list(BIASES)), {}, ()),
        (SparsityLevelParameterPruner("p", dict.fromkeys(BIASES, 0.1)), {}, BIASES[:1]),
        (
            SparsityLevelParameterPruner("p", dict.fromkeys(BIASES, 0.1)),
            {"levels": {BIASES[0]: 0.2}},
            (),
        ),
        (RandomRankedFilterPruner("p", "Filters", 0.2, list(NAMES)), {}, NAMES[:1]),
        (RandomLevelStructureParameterPruner("p", "Filters", [0, 0.1], list(NAMES)), DROPPED, ()),
        (BernoulliFilterPruner("p", "Filters", 0.01, list(NAMES)), DROPPED, ()),
    ],
)
def test_weights_of_which_nothing_can_go_are_told(tiny_cnn, pruner, args, small):
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(PruningPolicy(pruner, args), epochs=[0, 1], name="pruner p")
    notes = scheduler.idle_notes(0, 2)
    if not small:
        assert notes == []
        return
    assert notes == [
        f"pruner p: prunes nothing of {', '.join(small)}: too small for the sparsity aimed at, "
        "not a single element or group of elements of it would go"
    ]
    scheduler.on_epoch_begin(0)
    scheduler.on_epoch_begin(1)
    for name in {*NAMES, *BIASES}:
        mask = scheduler.masks[name].mask
        assert (mask is None or bool(mask.all())) == (
            name in small or name not in pruner.select(list(scheduler.masks))
        )


def test_what_drops_for_one_minibatch_has_no_final_sparsity_to_come_to(tiny_cnn):
    scheduler = CompressionScheduler(tiny_cnn)
    for pruner in (
        BernoulliFilterPruner("p", "Filters", 0.5, NAMES[0]),
        RandomLevelStructureParameterPruner("q", "Filters", [0.1, 0.5], NAMES[1]),
    ):
        scheduler.add_policy(PruningPolicy(pruner, DROPPED), starting_epoch=0, ending_epoch=5)
    assert scheduler.idle_notes(0, 2) == []
    assert scheduler.pruning_is_complete(0)
