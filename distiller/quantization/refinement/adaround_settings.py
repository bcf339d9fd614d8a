"""Settings of AdaRound, and what is wrong with them.

Knows nothing about models.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from distiller.errors import UsageError

SCALES = ("kept", "weights", "outputs")


@dataclass(frozen=True, slots=True)
class AdaRoundSettings:
    """How the rounding of a layer is learned.

    Attributes:
        iterations: steps of gradient descent for each layer, at least 1.
        batch_size: samples in a step: single positions of a layer's output, with all that is read for them.
        learning_rate: of Adam; 0.001 to 0.03 is sensible.
        regularization: lambda, > 0: how strongly the weights are pulled to one side, relative to the layer's
            error; from 3 to 100 it makes little difference.
        warm_start: the fraction of the steps without that, 0 to below 1.
        beta: the exponent of the pull after the warm start and at the end, start >= end >= 2.
        samples: how many samples of each layer are drawn at random from all batches, if there are as many;
            of each input at least one.
        scales: which scales the weights are rounded at: "kept", those that they have; "weights", of least
            mean squared error of each weight (`mse_scale`); "outputs", of least error of the layer's outputs,
            rounded to nearest, on some of the samples.
        seed: of samples and batches.

    Raises:
        UsageError: a setting is out of range.
    """

    iterations: int = 2000
    batch_size: int = 256
    learning_rate: float = 0.01
    regularization: float = 10.0
    warm_start: float = 0.2
    beta: tuple[float, float] = (20.0, 2.0)
    samples: int = 8192
    scales: str = "outputs"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iterations", "batch_size", "samples"):
            _check(name, getattr(self, name), _is_whole(getattr(self, name)), "a whole number from 1 on")
        for name in ("learning_rate", "regularization"):
            value = getattr(self, name)
            _check(name, value, _is_number(value) and 0 < value < math.inf, "a number > 0")
        _check(
            "warm_start",
            self.warm_start,
            _is_number(self.warm_start) and 0 <= self.warm_start < 1,
            "0 to below 1",
        )
        ends = self.beta
        is_pair = isinstance(ends, tuple | list) and len(ends) == 2 and all(map(_is_number, ends))
        _check("beta", ends, is_pair and ends[0] >= ends[1] >= 2, "two numbers, start >= end >= 2")
        _check("scales", self.scales, self.scales in SCALES, "one of " + ", ".join(SCALES))
        _check("seed", self.seed, type(self.seed) is int, "a whole number")

    def as_plain(self) -> dict[str, Any]:
        """The settings by name."""
        return {**dataclasses.asdict(self), "beta": list(self.beta)}


def _check(name: str, value: Any, is_right: bool, wanted: str) -> None:
    if not is_right:
        raise UsageError(f"AdaRoundSettings: {name} must be {wanted}, got {value!r}")


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
