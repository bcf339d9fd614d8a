"""The loss of a network with early exits.

    L = sum_i w_i CE(exit_i, y) + (1 - sum_i w_i) CE(final, y)

Knows nothing about models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from distiller.auxiliary_outputs import loss_with_auxiliaries
from distiller.early_exit.rules import check_count
from distiller.errors import UsageError, require


def check_weights(weights: Sequence[float]) -> None:
    """See to it that the weights of the exits leave some for the final output.

    Raises:
        UsageError: one is negative or no number, or they add up to 1 or more.
    """
    require(weights, (tuple, list), "early exit: weights", "a list of numbers")
    for weight in weights:
        require(weight, (int, float), "early exit: weights", "a list of numbers")
        if not (math.isfinite(weight) and weight >= 0):
            raise UsageError(f"early exit: the weight of a loss is a number from 0, got {weight:g}")
    if not sum(weights) < 1:
        raise UsageError(
            "early exit: the weights must add up to less than 1, the rest is the weight of the final output; "
            f"got {' + '.join(f'{weight:g}' for weight in weights)} = {sum(weights):g}"
        )


class JointLoss:
    """The weighted cross-entropy of all outputs: a criterion for the training loop.

    Args:
        weights: of the exits, in the order of execution, each from 0, together less than 1.

    Raises:
        UsageError: as `check_weights`.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        check_weights(weights)
        self.weights = tuple(float(weight) for weight in weights)

    def __call__(self, outputs: Any, labels: Tensor) -> Tensor:
        """The loss.

        Args:
            outputs: [exit 1, ..., final], logits of shape (batch, classes) each; the final one with
                auxiliary classifiers where the network has them, whose losses are part of its own.
            labels: (batch,).

        Raises:
            UsageError: the model has another number of exits.
        """
        exits = len(outputs) - 1 if isinstance(outputs, list) else 0
        check_count("weights", len(self.weights), exits)
        weights = (*self.weights, 1 - sum(self.weights))
        losses = [
            weight * loss_with_auxiliaries(x, labels, cross_entropy)
            for weight, x in zip(weights, outputs, strict=True)
        ]
        return sum(losses[1:], losses[0])
