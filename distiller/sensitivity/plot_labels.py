"""What is written on pictures of a sweep: names of scores, levels and parameters.

Knows nothing about how a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from distiller.errors import UsageError, did_you_mean
from distiller.sensitivity.axes import find_axis
from distiller.sensitivity.curves import Score, SensitivityPoint

__all__ = [
    "LevelScale",
    "Metric",
    "dense_value",
    "find_metric",
    "level_scale",
    "parameter_labels",
]

LONGEST_LABEL = 42

_SUFFIX = ".weight"
_PART_WIDTHS = (16, 12, 9)  # tried in this order


@dataclass(frozen=True, slots=True)
class Metric:
    """One of the numbers of a score.

    Attributes:
        name: as a field of `Score`.
        label: of an axis.
        value: a format for one value.
        change: a format for how far it is worse than something.
        is_better_when: +1: higher, -1: lower.
    """

    name: str
    label: str
    value: str
    change: str
    is_better_when: int = 1

    @property
    def is_accuracy(self) -> bool:
        """Whether it is a percentage, the more the better."""
        return self.is_better_when > 0

    @property
    def has_intervals(self) -> bool:
        """Whether points hold intervals of it."""
        return self.name == "top1"

    def of(self, score: Score) -> float:
        """Its value."""
        return float(score[Score._fields.index(self.name)])

    def harm(self, score: Score, reference: float) -> float:
        """How much worse it is than `reference`; negative: better."""
        return self.is_better_when * (reference - self.of(score))


_METRICS = {
    metric.name: metric
    for metric in (
        Metric("top1", "Top-1 accuracy (%)", "top-1 {:.2f} %", "Drop of top-1 accuracy from {} (points)"),
        Metric("top5", "Top-5 accuracy (%)", "top-5 {:.2f} %", "Drop of top-5 accuracy from {} (points)"),
        Metric("loss", "Loss", "loss {:.4g}", "Rise of the loss from {}", -1),
    )
}


def find_metric(name: str) -> Metric:
    """The metric called `name`: `top1`, `top5` or `loss`.

    Raises:
        UsageError: there is none.
    """
    if name not in _METRICS:
        raise UsageError(
            f"sensitivity plot: unknown metric '{name}', not one of {', '.join(_METRICS)}"
            f"{did_you_mean(name, _METRICS)}"
        )
    return _METRICS[name]


@dataclass(frozen=True, slots=True)
class LevelScale:
    """How the levels of an axis are shown: fractions in percent, ascending; bits from many to few.

    Attributes:
        label: what a level is.
        dense_level: at which nothing is compressed.
    """

    label: str
    dense_level: float

    @property
    def is_percent(self) -> bool:
        """Whether levels are fractions."""
        return self.dense_level == 0

    def shown(self, level: float) -> float:
        """The number that stands for a level."""
        return 100 * level if self.is_percent else level

    def text(self, level: float) -> str:
        """A level in words: `80 %`, `4 bits`."""
        return f"{self.shown(level):.4g} {'%' if self.is_percent else 'bits'}"

    def ordered(self, levels: Iterable[float]) -> list[float]:
        """Each once, from mild to strong; the dense one only where it lies on the scale."""
        kept = {level for level in levels if self.is_percent or level != self.dense_level}
        return sorted(kept, reverse=not self.is_percent)


def level_scale(axis: str) -> LevelScale:
    """How the levels of an axis are shown; "": that of a sparsity.

    Raises:
        UnknownNameError: there is no such axis.
    """
    if not axis:
        return LevelScale("Sparsity of the one pruned parameter (%)", 0.0)
    found = find_axis(axis)
    unit = " (%)" if found.dense_level == 0 else ""
    return LevelScale(f"{found.label}{unit}", found.dense_level)


def dense_value(points: Iterable[SensitivityPoint], metric: Metric) -> float | None:
    """What the uncompressed model scores, or None when it was not measured."""
    dense = (point for point in points if point.level == level_scale(point.axis).dense_level)
    return next((metric.of(point.score) for point in dense), None)


def parameter_labels(names: Sequence[str]) -> dict[str, str]:
    """A label for each name, no two alike.

    It is the name without `.weight`. Where one is long, all are without what they share at both ends; where
    that is not enough, long parts lose their middle, and then names their first parts.
    """
    labels = [name.removesuffix(_SUFFIX) for name in names]
    if _differ(labels) and _are_short(labels):
        return dict(zip(names, labels, strict=True))
    parts = [label.split(".") for label in labels]
    begin, end = _shared_ends(parts)
    parts = [own[begin : len(own) - end] for own in parts]
    cuts = [[[_cut(part, width) for part in own] for own in parts] for width in _PART_WIDTHS]
    for shown in (parts, *cuts, *([_end_that_fits(own) for own in cut] for cut in cuts)):
        found = [
            "…" * (begin > 0 or len(own) < len(whole)) + ".".join(own) + "…" * (end > 0)
            for own, whole in zip(shown, parts, strict=True)
        ]
        if _differ(found) and _are_short(found):
            return dict(zip(names, found, strict=True))
    return {
        name: name if len(name) <= LONGEST_LABEL else _cut_begin(name, f"{number}: ")
        for number, name in enumerate(names, start=1)
    }


def _shared_ends(names: Sequence[list[str]]) -> tuple[int, int]:
    """How many parts all names begin and end with, so that at least one part of each is left."""
    rest = min(len(name) for name in names) - 1
    begin = min(_shared(names), rest)
    return begin, min(_shared([name[::-1] for name in names]), rest - begin)


def _shared(names: Sequence[list[str]]) -> int:
    """How many parts all names begin with."""
    count = 0
    for parts in zip(*names, strict=False):
        if len(set(parts)) > 1:
            break
        count += 1
    return count


def _cut(part: str, width: int) -> str:
    """A part without its middle, where it is long: what tells it from others is often a number at its end."""
    kept = width - 1
    return part if len(part) <= width else f"{part[: kept - kept // 2]}…{part[-(kept // 2) :]}"


def _end_that_fits(parts: list[str]) -> list[str]:
    """The last parts of a name, as many as make a short label; at least one."""
    while len(parts) > 1 and len(".".join(parts)) > LONGEST_LABEL - len("……"):
        parts = parts[1:]
    return parts


def _cut_begin(name: str, number: str) -> str:
    return f"{number}…{name[len(number) + 1 - LONGEST_LABEL :]}"


def _differ(labels: Sequence[str]) -> bool:
    return len(set(labels)) == len(labels)


def _are_short(labels: Sequence[str]) -> bool:
    return all(len(label) <= LONGEST_LABEL for label in labels)
