"""How far one thing can be compressed by itself before the accuracy drops noticeably.

Knows nothing about pictures or schedules.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from distiller.sensitivity.curves import SensitivityPoint
from distiller.sensitivity.plot_labels import LevelScale, Metric

__all__ = ["MAX_DROP", "Tolerated", "tolerated_levels"]

MAX_DROP = 1.0
"""Points of accuracy."""
_NOISE = 1e-9  # of float arithmetic: 91.71 - 90.71 is more than 1


@dataclass(frozen=True, slots=True)
class Tolerated:
    """The levels of one curve that drop by no more than `MAX_DROP`, from the mildest on.

    Attributes:
        levels: them, from mild to strong, without the dense one; a level behind one that drops by more is not
            among them.
        swept: how many levels there are, without the dense one.
    """

    levels: tuple[float, ...]
    swept: int


def tolerated_levels(
    curve: Iterable[SensitivityPoint], scale: LevelScale, metric: Metric, reference: float
) -> Tolerated:
    """How far one thing can be compressed.

    Args:
        curve: its points on one axis.
        scale: of the axis.
        metric: an accuracy.
        reference: the accuracy that a drop is counted from.
    """
    scores = {point.level: point.score for point in curve if point.level != scale.dense_level}
    ordered = scale.ordered(scores)
    # Counted as "not at most", so that NaN is no small drop.
    too_much = (not metric.harm(scores[level], reference) <= MAX_DROP + _NOISE for level in ordered)
    count = next((place for place, is_too_much in enumerate(too_much) if is_too_much), len(ordered))
    return Tolerated(tuple(ordered[:count]), len(ordered))
