"""When an image leaves: how sure an exit is of its answer, and the threshold for it.

    confidence  max_c p_c              leaves when it is at least the threshold      0..1
    entropy     - sum_c p_c ln p_c     leaves when it is at most the threshold       nats, 0..ln(classes)

with p the softmax of the exit's logits. Labels are not looked at: what is decided can be decided in use.
Source: entropy, Teerapittayanon et al., "BranchyNet: Fast Inference via Early Exiting from Deep Neural
Networks", 2016, section III.
Knows nothing about models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType

from torch import Tensor

from distiller.errors import UsageError, require

CRITERIA = ("entropy", "confidence")
Threshold = float | None
_SLACK = 1.0001


def certainty(logits: Tensor, criterion: str) -> Tensor:
    """How sure an answer is, more is surer: the confidence, or the negative entropy in nats.

    Args:
        logits: (batch, classes).
        criterion: one of `CRITERIA`.

    Returns:
        (batch,), in float32; NaN where the logits are.
    """
    log_p = logits.float().log_softmax(-1)
    if criterion == "confidence":
        return log_p.max(-1).values.exp()
    p = log_p.exp()
    return (p * log_p.masked_fill(p == 0, 0)).sum(-1)  # p ln p is 0 at p = 0


@dataclass(frozen=True, slots=True)
class ExitRule:
    """Which images leave at which exit.

    Attributes:
        criterion: one of `CRITERIA`.
        thresholds: one for each exit, in the order of execution; at an exit of None nothing leaves.

    Raises:
        UsageError: no such criterion, or a threshold that cannot be.
    """

    criterion: str
    thresholds: tuple[Threshold, ...]

    def __post_init__(self) -> None:
        require(self.thresholds, (tuple, list), "ExitRule: thresholds", "a tuple of numbers or None")
        for threshold in self.thresholds:
            require(threshold, (int, float, NoneType), "ExitRule: thresholds", "numbers or None")
        if self.criterion not in CRITERIA:
            raise UsageError(f"early exit: the criterion is {' or '.join(CRITERIA)}, got '{self.criterion}'")
        for threshold in self.thresholds:
            if threshold is None:
                continue
            if self.criterion == "confidence" and not 0 <= threshold <= 1:
                raise UsageError(f"early exit: a confidence is a number from 0 to 1, got {threshold:g}")
            if not threshold >= 0:
                raise UsageError(f"early exit: an entropy is a number from 0, got {threshold:g}")

    def check(self, exits: int, classes: int) -> None:
        """See to it that the rule is for this model.

        Raises:
            UsageError: it has another number of exits, or an entropy no answer can have.
        """
        check_count("thresholds", len(self.thresholds), exits)
        highest = math.log(classes)
        for threshold in self.thresholds:
            if self.criterion == "entropy" and threshold is not None and threshold > highest * _SLACK:
                raise UsageError(
                    f"early exit: no entropy of {classes} classes is above ln({classes}) = {highest:.4g} "
                    f"nats, got the threshold {threshold:g}, at which every image would leave"
                )

    def bound(self, index: int) -> float:
        """The `certainty` from which on images leave at exit `index`."""
        threshold = self.thresholds[index]
        if threshold is None:
            return math.inf
        return threshold if self.criterion == "confidence" else -threshold

    def leaves(self, index: int, logits: Tensor) -> Tensor:
        """Which images leave at exit `index`.

        Args:
            index: of the exit, from 0.
            logits: of the exit, (batch, classes).

        Returns:
            (batch,) of booleans; an answer that is no number does not leave.
        """
        return certainty(logits, self.criterion) >= self.bound(index)

    def text(self) -> str:
        """The thresholds as they are given on the command line."""
        return " ".join("never" if t is None else f"{t:g}" for t in self.thresholds)


def rule_of_bounds(criterion: str, bounds: Sequence[float]) -> ExitRule:
    """The rule by which images leave from a `certainty` on; thresholds have six digits, as they are shown."""
    thresholds: list[Threshold] = []
    for bound in bounds:
        if bound == math.inf:
            thresholds.append(None)
            continue
        value = bound if criterion == "confidence" else -bound
        thresholds.append(min(1.0, _six(value)) if criterion == "confidence" else max(0.0, _six(value)))
    return ExitRule(criterion, tuple(thresholds))


def check_count(what: str, given: int, exits: int) -> None:
    """See to it that there is one of something for each exit.

    Raises:
        UsageError: there are more or fewer.
    """
    if given != exits:
        raise UsageError(
            f"early exit: the model has {exits} exit{'s' * (exits != 1)}, got {given} {what}; "
            "give one for each exit, none for the final output"
        )


def _six(value: float) -> float:
    return float(f"{value:.6g}")
