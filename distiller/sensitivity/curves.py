"""What a sensitivity sweep measures: points, and the curves they form.

A *level* is how strongly one thing is compressed; on the pruning axes it is the sparsity, a
fraction 0..1.
Knows nothing about models, axes or files.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class SensitivityPoint:
    """The score of the model with one thing compressed to one level.

    Attributes:
        axis: the name of the axis; "" where a file does not say it.
        parameter: what is compressed, by canonical name.
        level: how strongly.
        score: percents first.
        n: images that were looked at; None where it is not known, as the next two.
        top1_correct: of these.
        top5_correct: of these.
        top1_low: the lower end of the 95 % interval of the top-1 accuracy on all test images, in percent;
            None in a sweep without an error, which looks at all of them; as the next.
        top1_high: the upper end.
        removed: what the level really takes away, in words; "" where the level says it all.
    """

    axis: str
    parameter: str
    level: float
    score: Score
    n: int | None = None
    top1_correct: int | None = None
    top5_correct: int | None = None
    top1_low: float | None = None
    top1_high: float | None = None
    removed: str = ""


Curves: TypeAlias = OrderedDict[str, OrderedDict[float, Score]]
"""`{parameter: {level: (top1, top5, loss)}}` of one axis, parameters in the order of the model."""


def curves_by_axis(points: Iterable[SensitivityPoint]) -> OrderedDict[str, Curves]:
    """The curves of each axis, everything in the order of the points."""
    found: OrderedDict[str, Curves] = OrderedDict()
    for point in points:
        curves = found.setdefault(point.axis, OrderedDict())
        curves.setdefault(point.parameter, OrderedDict())[point.level] = point.score
    return found


def clean_level(level: float) -> float:
    """The level without the noise of float arithmetic: 0.15000000000000002 -> 0.15."""
    return round(float(level), _LEVEL_DIGITS)


def dense_score(
    curves: Mapping[str, Mapping[float, tuple[float, float, float]]],
) -> tuple[float, float, float] | None:
    """The score of the uncompressed model (level 0), or None when it was not measured."""
    return next((points[0.0] for points in curves.values() if 0.0 in points), None)
