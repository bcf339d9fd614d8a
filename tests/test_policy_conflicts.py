from __future__ import annotations

from itertools import product

import pytest

from distiller.config import document_config
from distiller.errors import PolicyConflictError, ScheduleError
from distiller.interfaces import Policy
from distiller.policy import PruningPolicy
from distiller.pruning import BernoulliFilterPruner
from distiller.regularization import L0Regularizer
from distiller.schedule_yaml import parse_document
from distiller.scheduler import CompressionScheduler
from distiller.weight_sharing import KMeansWeightSharing, QuantizeToMixture, SoftWeightSharing
from tests.doubles import HalfPruner, train

DROPPING = {"mask_on_forward_only": True, "use_double_copies": True}


def gates(model):
    return L0Regularizer("l0", model, {"conv2.weight": [0.01, "Filters"]})


def refusal(model, first, second):
    """What is said when the second policy is added; each is (policy, epochs, name)."""
    scheduler = CompressionScheduler(model)
    scheduler.add_policy(first[0], epochs=first[1], name=first[2])
    with pytest.raises(PolicyConflictError) as caught:
        scheduler.add_policy(second[0], epochs=second[1], name=second[2])
    assert len(scheduler.policies) == 1
    return str(caught.value)


@pytest.mark.parametrize("gates_first", [True, False])
@pytest.mark.parametrize(
    ("pruner", "args"),
    [
        (HalfPruner("conv2.weight"), {"mask_on_forward_only": True, "keep_mask": True}),
        (BernoulliFilterPruner("b", "Filters", 0.5, ["conv2.weight"]), DROPPING),
    ],
)
def test_gates_and_masks_of_the_forward_pass_in_overlapping_epochs_conflict(
    tiny_cnn, pruner, args, gates_first
):
    both = [(gates(tiny_cnn), [1, 2], "l"), (PruningPolicy(pruner, args), [2, 3], "p")]
    assert refusal(tiny_cnn, *(both if gates_first else both[::-1])) == (
        "'l' (epochs 1..2) gates 'conv2.weight', which 'p' (epochs 2..3) masks in the forward pass only; "
        "let one end before the other begins"
    )


@pytest.mark.parametrize(
    ("pruner", "args", "remedy"),
    [
        (HalfPruner("conv2.weight"), {"mask_on_forward_only": True}, "keep_mask"),
        (
            BernoulliFilterPruner("b", "Filters", 0.5, ["conv2.weight"]),
            DROPPING,
            "discard_masks_at_minibatch_end",
        ),
    ],
)
def test_masks_of_the_forward_pass_that_outlast_their_policy_conflict_with_later_gates(
    tiny_cnn, pruner, args, remedy
):
    text = refusal(tiny_cnn, (PruningPolicy(pruner, args), [0], "p"), (gates(tiny_cnn), [1, 2], "l"))
    assert text == (
        "'l' (epochs 1..2) gates 'conv2.weight', which 'p' (epochs 0..0) goes on masking in the forward pass "
        f"only; let it end that with args: {{{remedy}: true}}"
    )
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(PruningPolicy(pruner, {**args, remedy: True}), epochs=[0])
    scheduler.add_policy(gates(tiny_cnn), epochs=[1, 2])
    train(tiny_cnn, scheduler, range(4))


def test_masks_of_the_forward_pass_may_follow_gates(tiny_cnn):
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(gates(tiny_cnn), epochs=[0])
    scheduler.add_policy(PruningPolicy(HalfPruner("conv2.weight"), DROPPING), epochs=[1, 2])
    train(tiny_cnn, scheduler, range(3))


def test_gates_and_masks_of_other_parameters_go_together(tiny_cnn):
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(gates(tiny_cnn), epochs=[0])
    scheduler.add_policy(PruningPolicy(HalfPruner("fc.weight"), DROPPING), epochs=[0])


def test_two_regularizers_may_gate_one_parameter(tiny_cnn):
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(gates(tiny_cnn), epochs=[0, 1])
    other = L0Regularizer("channels", tiny_cnn, {"conv2.weight": [0.01, "Channels"]})
    scheduler.add_policy(other, epochs=[0, 1])
    train(tiny_cnn, scheduler, range(3))


def test_one_extension_may_not_be_twice_in_an_epoch(tiny_cnn):
    extension = gates(tiny_cnn)
    assert refusal(tiny_cnn, (extension, [0, 1], "extension l"), (extension, [1, 2], "extension l")) == (
        "'extension l' (epochs 1..2) is in another policy of overlapping epochs (epochs 0..1) already, and would "
        "be called twice at every step; keep one, or make a second instance of it"
    )


def test_one_extension_may_be_in_two_policies_one_after_the_other(tiny_cnn):
    scheduler, extension = CompressionScheduler(tiny_cnn), Policy()
    scheduler.add_policy(extension, epochs=[0])
    scheduler.add_policy(extension, epochs=[2])


SCHEDULE = """\
extensions:
  l: {class: L0Regularizer, reg_regims: {conv2.weight: [0.001, Filters]}}
pruners:
  t: {class: SplicingPruner, sensitivities: {conv2.weight: 0.5}, low_thresh_mult: 0.9, hi_thresh_mult: 1.1}
policies:
  - pruner: {instance_name: t, args: {mask_on_forward_only: true}}
    epochs: [0]
  - extension: {instance_name: l}
    starting_epoch: 1
    ending_epoch: 3
"""


def test_a_schedule_is_refused_at_the_line_of_the_later_policy(tiny_cnn):
    with pytest.raises(ScheduleError) as caught:
        document_config(tiny_cnn, None, parse_document(SCHEDULE))
    assert [str(fault) for fault in caught.value.faults] == [
        ":8    policies[1]: 'extension l' (epochs 1..2) gates 'conv2.weight', which 'pruner t' (epochs 0..0) goes "
        "on masking in the forward pass only; let it end that with args: {keep_mask: true}"
    ]


SHARING = {
    "kmeans": lambda model, name: KMeansWeightSharing("k", model, {name: 3}),
    "mixture": lambda model, name: SoftWeightSharing("m", model, [name], components=4),
    "quantize": lambda model, name: QuantizeToMixture("q", model, [name]),
}


@pytest.mark.parametrize(
    "first, second", [pair for pair in product(SHARING, repeat=2) if set(pair) != {"mixture", "quantize"}]
)
def test_two_that_share_the_values_of_one_parameter_in_overlapping_epochs_conflict(tiny_cnn, first, second):
    """They overwrote each other at every step."""
    both = [
        (SHARING[kind](tiny_cnn, "conv2.weight"), [1, 2], kind + str(i))
        for i, kind in enumerate((first, second))
    ]
    assert refusal(tiny_cnn, *both) == (
        f"'{first}0' (epochs 1..2) and '{second}1' (epochs 1..2) both share the values of 'conv2.weight'; let one "
        "end before the other begins, or name other weights"
    )


@pytest.mark.parametrize("mixture_first", [True, False])
def test_a_mixture_and_what_quantizes_to_it_go_together(tiny_cnn, mixture_first):
    both = [
        (SHARING["mixture"](tiny_cnn, "conv2.weight"), [0, 1, 2], "m"),
        (SHARING["quantize"](tiny_cnn, "conv2.weight"), [1, 2], "q"),
    ]
    scheduler = CompressionScheduler(tiny_cnn)
    for policy, epochs, name in both if mixture_first else both[::-1]:
        scheduler.add_policy(policy, epochs=epochs, name=name)
    assert len(scheduler.policies) == 2


@pytest.mark.parametrize("names", [["conv2.weight"], None])
@pytest.mark.parametrize("begin", [1, 2])
@pytest.mark.parametrize("mixture_first", [True, False])
def test_nothing_is_quantized_to_a_mixture_that_is_learned_later(tiny_cnn, mixture_first, begin, names):
    """It destroyed the network without a word."""
    both = [
        (SHARING["mixture"](tiny_cnn, "conv2.weight"), [begin, 3], "m"),
        (QuantizeToMixture("q", tiny_cnn, names), [1], "q"),
    ]
    assert refusal(tiny_cnn, *(both if mixture_first else both[::-1])) == (
        f"'q' (epochs 1..1) quantizes 'conv2.weight' to the mixture that 'm' (epochs {begin}..3) has not begun to "
        "learn; let the mixture begin in an earlier epoch"
    )


def test_sharing_goes_together_of_other_parameters_and_in_other_epochs(tiny_cnn):
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(SHARING["kmeans"](tiny_cnn, "conv2.weight"), epochs=[0, 1])
    scheduler.add_policy(SHARING["mixture"](tiny_cnn, "fc.weight"), epochs=[0, 1])
    scheduler.add_policy(QuantizeToMixture("q", tiny_cnn), epochs=[1])  # what has a mixture: fc.weight
    scheduler.add_policy(SHARING["quantize"](tiny_cnn, "conv2.weight"), epochs=[2])
    assert len(scheduler.policies) == 4
