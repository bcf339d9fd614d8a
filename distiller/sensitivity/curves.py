"""What a sensitivity sweep measures: points, and the curves they form.

A *level* is how strongly one parameter is compressed; on the pruning axes it is the
sparsity, a fraction 0..1.
Knows nothing about models, axes or files.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

_LEVEL_DIGITS = 10


class Score(NamedTuple):
    """How well a model does on the test images.

    Attributes:
        top1: top-1 accuracy in percent.
        top5: top-5 accuracy in percent.
        loss: mean loss per image.
    """

    top1: float
    top5: float
    loss: float


class SensitivityPoint(NamedTuple):
    """The score of the model with one parameter compressed to one level."""

    parameter: str
    level: float
    score: Score


Curves: TypeAlias = OrderedDict[str, OrderedDict[float, Score]]
"""`{parameter: {level: (top1, top5, loss)}}`, parameters in the order of the model."""


def clean_level(level: float) -> float:
    """The level without the noise of float arithmetic: 0.15000000000000002 -> 0.15."""
    return round(float(level), _LEVEL_DIGITS)


def dense_score(
    curves: Mapping[str, Mapping[float, tuple[float, float, float]]],
) -> tuple[float, float, float] | None:
    """The score of the uncompressed model (level 0), or None when it was not measured."""
    return next((points[0.0] for points in curves.values() if 0.0 in points), None)
