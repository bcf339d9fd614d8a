"""From the curves of a sweep to a level for each thing that was swept.

    max_drop                      maximise  sum_i removed_i(l_i)   subject to  sum_i drop_i(l_i) <= max_drop
    target_sparsity, target_macs  minimise  sum_i drop_i(l_i)      subject to  sum_i removed_i(l_i) >= target

over levels l_i that were measured. Solved exactly, by integer programming (a knapsack of multiple choice). A
curve is made monotone first: single points are noisy, and more compression does not really help a model.

That the drops add up is an assumption: each was measured with all else uncompressed.
Knows nothing about models, nor about schedules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import numpy as np
from scipy.optimize import isotonic_regression

from distiller.errors import SensitivityError, UsageError
from distiller.quantization.search.width_choice import WidthCost, cheapest_widths, choose_widths
from distiller.sensitivity.curves import SensitivityPoint

__all__ = [
    "Goal",
    "Harm",
    "Option",
    "Recommendation",
    "Together",
    "monotone_curves",
    "recommend",
    "total_harm",
]

T = TypeVar("T")
_TIES = 1e-4  # what the rise of the loss counts beside a point of top-1, at most
_SPARED = 1e-7  # what is taken away beyond need counts so little, at most
_FINEST = 1_000_000  # steps to a point in which a budget of drops is counted
_LARGEST = 1e6  # stands for a loss that is not finite
_DIGITS = 4


@dataclass(frozen=True, slots=True)
class Harm:
    """What a level costs, by a monotone curve.

    Attributes:
        drop: points of top-1, 0 or more.
        loss: rise of the mean loss, 0 or more.
    """

    drop: float
    loss: float


@dataclass(frozen=True, slots=True)
class Option:
    """One level of one thing.

    Attributes:
        level: as in the sweep.
        harm: what it costs; of several curves, their sum.
        removed: what it takes away: elements, multiply-accumulates, or bits.
        units: of a group of channels, how many stay.
    """

    level: float
    harm: Harm
    removed: int
    units: int = 0


@dataclass(frozen=True, slots=True)
class Together:
    """What levels take away where that is less than the sum of what each takes away alone, as channels of
    neighbouring layers do.

    Attributes:
        removed: levels by thing -> what they really take away.
        cost: what stays, by the units of things that stay; None where it has no such form.
    """

    removed: Callable[[Mapping[str, float]], int]
    cost: WidthCost[str] | None


@dataclass(frozen=True, slots=True)
class Goal:
    """What is asked for.

    Attributes:
        kind: `max_drop`: take away as much as costs no more; `target_sparsity` and `target_macs`: come to it
            at the least cost.
        value: points of top-1; the share of elements that is zero; the share of MACs that stays.
    """

    kind: Literal["max_drop", "target_sparsity", "target_macs"]
    value: float

    def __str__(self) -> str:
        return f"{self.kind} {self.value:g}"


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The levels.

    Attributes:
        levels: by thing; the dense level for those that stay as they are.
        drop: the sum of the single drops, in points of top-1.
        removed: what is really taken away by all of them together.
    """

    levels: dict[str, float]
    drop: float
    removed: int


def monotone_curves(points: Iterable[SensitivityPoint], dense_level: float) -> dict[str, dict[float, Harm]]:
    """What each level costs, with curves that only rise.

    By isotonic regression, which averages neighbouring points that are out of order (weighted by the images
    they were measured on), the strongest level last. What is below the dense model's cost then is 0.

    Args:
        points: of one axis, the dense level of some parameter among them.
        dense_level: levels farther from it are stronger.

    Returns:
        By parameter and level, the dense level first.

    Raises:
        SensitivityError: no dense point, or a parameter that lacks levels which others have.
    """
    by_parameter: dict[str, dict[float, SensitivityPoint]] = {}
    for point in points:
        by_parameter.setdefault(point.parameter, {})[point.level] = point
    dense = next((found[dense_level] for found in by_parameter.values() if dense_level in found), None)
    if dense is None:
        raise SensitivityError(
            f"sweep: the point of the dense model, level {dense_level:g}, is missing; sweep again with it"
        )
    swept = {level for found in by_parameter.values() for level in found} - {dense_level}
    for name, found in by_parameter.items():
        if missing := sorted(swept.difference(found)):
            raise SensitivityError(
                f"sweep: '{name}' lacks {len(missing)} of {len(swept)} levels (first: {missing[0]:g}); "
                "finish it with --sense-resume"
            )
    order = sorted(swept, key=lambda level: abs(level - dense_level))
    return {name: _monotone(dense, [found[level] for level in order]) for name, found in by_parameter.items()}


def recommend(
    options: Mapping[str, Sequence[Option]],
    goal: Goal,
    total: int,
    together: Together | None = None,
) -> Recommendation:
    """The levels that meet a goal best.

    Args:
        options: by thing, its levels, the weakest first, beginning with the dense one (no harm, nothing
            removed).
        goal: what is asked for.
        total: what targets are shares of, as `Option.removed` counts.
        together: what levels really take away, by which a target is held; None: the sum. Where its `cost` is
            None too, what each takes away alone is what choices are compared by.

    Raises:
        UsageError: the goal cannot be met; says how far one comes.
    """
    removed = together.removed if together else partial(removed_alone, options)
    widths = _Widths(options, together.cost if together else None)
    if goal.kind == "max_drop":
        levels = widths.most_removed(goal.value)
        if not removed(levels):
            least = min((o.harm.drop for own in options.values() for o in own if o.removed), default=math.nan)
            raise UsageError(
                f"{goal}: not one level costs so little, the least drop is {least:.4f} points; allow more"
            )
    else:
        levels = _to_target(options, widths, goal, total, removed)
    return Recommendation(levels, _summed_drop(options, levels), removed(levels))


def total_harm(harms: Iterable[Harm]) -> Harm:
    """Of several curves at one level: drops and rises added up."""
    known = list(harms)
    return Harm(sum(harm.drop for harm in known), sum(harm.loss for harm in known))


def removed_alone(options: Mapping[str, Sequence[Option]], levels: Mapping[str, float]) -> int:
    """The sum of what levels take away, each by itself."""
    return sum(_at(options[name], level).removed for name, level in levels.items())


def _monotone(dense: SensitivityPoint, points: Sequence[SensitivityPoint]) -> dict[float, Harm]:
    harms = {dense.level: Harm(0.0, 0.0)}
    if not points:
        return harms
    known = [point.n for point in points]
    weights = [float(n) for n in known if n] if all(known) else None
    drops = _rising([dense.score.top1 - point.score.top1 for point in points], weights)
    rises = _rising([point.score.loss - dense.score.loss for point in points], weights)
    pairs = zip(points, drops, rises, strict=True)
    return harms | {point.level: Harm(drop, rise) for point, drop, rise in pairs}


def _rising(values: Sequence[float], weights: Sequence[float] | None) -> list[float]:
    finite = np.nan_to_num(np.asarray(values, dtype=float), nan=_LARGEST, posinf=_LARGEST)
    fitted = isotonic_regression(finite, weights=weights).x
    return [max(0.0, float(value)) for value in fitted]


class _Widths:
    """The levels as widths, of which more cost more: of groups of channels the units that stay."""

    def __init__(self, options: Mapping[str, Sequence[Option]], cost: WidthCost[str] | None) -> None:
        self._options = options
        self._by_width: dict[str, dict[int, int]] = {}
        for name, own in options.items():
            by_width = self._by_width.setdefault(name, {})
            for index, option in enumerate(own):  # of equal ones the weakest
                by_width.setdefault(len(own) - 1 - index if cost is None else option.units, index)
        self._most = sum(own[-1].removed for own in options.values())
        self._cost = cost or WidthCost(sizes=self._valued(lambda _, own, i: own[-1].removed - own[i].removed))
        self._stays = (
            self._most if cost is None else cost.of({name: max(w) for name, w in self._by_width.items()})
        )
        """Of the dense network, counted alike."""

    def most_removed(self, max_drop: float) -> dict[str, float]:
        """Within the budget of drops; of equal choices the one of less harm."""
        drops = self._valued(lambda _, own, i: math.ceil(own[i].harm.drop * _FINEST - 1e-6))
        shares = _harm_shares(self._options)
        ties = self._valued(lambda name, _, i: shares[name][i])
        return self._levels(cheapest_widths(drops, self._cost, math.floor(max_drop * _FINEST + 1e-6), ties))

    def least_drop(self, needed: int) -> dict[str, float]:
        """With so much removed; of equal drops the choice whose loss rises less, then the weaker one."""
        shares = _harm_shares(self._options)
        most = max(1, self._most)
        harms = self._valued(
            lambda name, own, i: own[i].harm.drop + _TIES * shares[name][i] + _SPARED * own[i].removed / most
        )
        return self._levels(choose_widths(harms, self._cost, self._stays - needed))

    def _valued(self, value: Callable[[str, Sequence[Option], int], T]) -> dict[str, dict[int, T]]:
        return {
            name: {width: value(name, self._options[name], index) for width, index in by_width.items()}
            for name, by_width in self._by_width.items()
        }

    def _levels(self, widths: Mapping[str, int]) -> dict[str, float]:
        return {
            name: self._options[name][self._by_width[name][width]].level for name, width in widths.items()
        }


def _to_target(
    options: Mapping[str, Sequence[Option]],
    widths: _Widths,
    goal: Goal,
    total: int,
    removed: Callable[[Mapping[str, float]], int],
) -> dict[str, float]:
    share = goal.value if goal.kind == "target_sparsity" else 1 - goal.value
    needed = math.ceil(share * total - 1e-9 * total)
    strongest = {name: own[-1].level for name, own in options.items()}
    if (most := removed(strongest)) < needed:
        farthest = _farthest(goal, most, total)
        raise UsageError(f"{goal}: cannot be reached with the levels that were swept; {farthest}")
    asked = needed
    while True:
        levels = widths.least_drop(asked)
        short = needed - removed(levels)
        if short <= 0:
            return levels
        # Together they take away less than one by one, which is what was counted: ask for more.
        asked = min(removed_alone(options, levels) + short, removed_alone(options, strongest))


def _harm_shares(options: Mapping[str, Sequence[Option]]) -> dict[str, list[float]]:
    """By thing and option, what breaks ties: the rise of the loss, of at most 1 in all."""
    most = sum(own[-1].harm.loss for own in options.values())
    return {name: [o.harm.loss / most if most > 0 else 0.0 for o in own] for name, own in options.items()}


def _farthest(goal: Goal, most: int, total: int) -> str:
    unit = 10**_DIGITS
    if goal.kind == "target_sparsity":
        return f"{math.floor(most / total * unit) / unit:g} is the most; give that, or sweep higher levels"
    left = math.ceil((total - most) / total * unit) / unit
    return f"{left:g} of the MACs stay at the least; give that, or sweep higher levels"


def _summed_drop(options: Mapping[str, Sequence[Option]], levels: Mapping[str, float]) -> float:
    return sum(_at(options[name], level).harm.drop for name, level in levels.items())


def _at(options: Sequence[Option], level: float) -> Option:
    return next(option for option in options if option.level == level)
