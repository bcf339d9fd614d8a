"""The hard concrete distribution: gates in [0, 1] that are exactly 0 or 1 with some probability.

A gate is a stretched and clamped sigmoid of logistic noise around its location `log_alpha`:

    s = sigmoid((log u - log(1 - u) + log_alpha) / BETA),  u uniform in (0, 1)
    z = min(1, max(0, s (ZETA - GAMMA) + GAMMA))

Everything is element-wise and can be differentiated with respect to `log_alpha`.
Knows nothing about weights, models or training.

Source: Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization" (2018).
"""

from __future__ import annotations

import math

from torch import Tensor

from distiller.errors import DistillerError

__all__ = ["BETA", "GAMMA", "ZETA", "location_of", "open_probability", "sampled_gates", "steady_gates"]

BETA = 2 / 3
"""The temperature."""
GAMMA, ZETA = -0.1, 1.1
"""The interval that the sigmoid is stretched to."""

_TINY = 1e-6  # keeps the noise away from infinity


def sampled_gates(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """The gates that uniform noise gives (equations 10 and 11).

    Args:
        log_alpha: locations, any shape.
        uniform: in [0, 1], shape of `log_alpha`.

    Returns:
        The gates in [0, 1], shape of `log_alpha`.
    """
    return _stretched((uniform.clamp(_TINY, 1 - _TINY).logit() + log_alpha) / BETA)


def steady_gates(log_alpha: Tensor) -> Tensor:
    """The gates without noise, for evaluations and in the end (equation 13).

        z = min(1, max(0, sigmoid(log_alpha) (ZETA - GAMMA) + GAMMA))

    Returns:
        The gates in [0, 1], shape of `log_alpha`.
    """
    return _stretched(log_alpha)


def open_probability(log_alpha: Tensor) -> Tensor:
    """The probability that a gate is not 0 (equation 12): sigmoid(log_alpha - BETA log(-GAMMA / ZETA)).

    Returns:
        The probabilities, shape of `log_alpha`.
    """
    return (log_alpha - BETA * math.log(-GAMMA / ZETA)).sigmoid()


def location_of(probability: float) -> float:
    """The `log_alpha` at which a gate is not 0 with the given probability.

    Raises:
        DistillerError: the probability is not in (0, 1).
    """
    if not 0 < probability < 1:
        raise DistillerError(f"keep_probability must be in (0, 1), got {probability!r}")
    return math.log(probability / (1 - probability)) + BETA * math.log(-GAMMA / ZETA)


def _stretched(logit: Tensor) -> Tensor:
    return (logit.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
