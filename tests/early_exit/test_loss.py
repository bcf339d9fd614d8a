from __future__ import annotations

import math
from collections import namedtuple

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from distiller.early_exit import JointLoss, check_weights
from distiller.errors import UsageError

LABELS = torch.tensor([0, 2, 1])


def outputs(count: int) -> list[torch.Tensor]:
    return [torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def cross_entropy(logits: torch.Tensor) -> float:
    return -float(log_softmax(logits.double().numpy(), axis=1)[np.arange(3), LABELS.numpy()].mean())


def test_the_loss_is_the_weighted_sum_with_the_rest_for_the_final_output():
    one, two, final = outputs(3)
    expected = 0.2 * cross_entropy(one) + 0.3 * cross_entropy(two) + 0.5 * cross_entropy(final)
    assert JointLoss([0.2, 0.3])([one, two, final], LABELS).item() == pytest.approx(expected, rel=1e-5)


def test_an_exit_without_weight_gets_no_gradient():
    one, final = (x.requires_grad_() for x in outputs(2))
    JointLoss([0.0])([one, final], LABELS).backward()
    assert one.grad is not None
    assert one.grad.abs().max() == 0
    assert final.grad is not None
    assert final.grad.abs().max() > 0


@pytest.mark.parametrize(
    "weights, told",
    [
        ([0.5, 0.5], "early exit: the weights must add up to less than 1, the rest is the weight of the final output; "
         "got 0.5 + 0.5 = 1"),
        ([-0.1], "early exit: the weight of a loss is a number from 0, got -0.1"),
        ([math.nan], "early exit: the weight of a loss is a number from 0, got nan"),
    ],
)  # fmt: skip
def test_weights_that_leave_nothing_are_refused(weights, told):
    with pytest.raises(UsageError) as caught:
        check_weights(weights)
    assert str(caught.value) == told


@pytest.mark.parametrize("given, exits", [(outputs(3), 2), (outputs(1)[0], 0)])
def test_another_number_of_exits_is_told(given, exits):
    with pytest.raises(UsageError) as caught:
        JointLoss([0.5])(given, LABELS)
    assert str(caught.value) == (
        f"early exit: the model has {exits} exits, got 1 weights; give one for each exit, none for the final output"
    )


def test_weights_that_are_no_numbers_are_refused():
    with pytest.raises(UsageError) as error:
        JointLoss("0.3")  # type: ignore[arg-type]
    assert str(error.value) == "early exit: weights: must be a list of numbers, got str"


def test_auxiliary_classifiers_are_part_of_the_final_outputs_loss():
    one, main, first, second = outputs(4)
    final = namedtuple("GoogLeNetOutputs", ["logits", "aux_logits2", "aux_logits1"])(main, second, first)
    whole = cross_entropy(main) + 0.3 * (cross_entropy(first) + cross_entropy(second))
    found = JointLoss([0.2])([one, final], LABELS).item()
    assert found == pytest.approx(0.2 * cross_entropy(one) + 0.8 * whole, rel=1e-5)
