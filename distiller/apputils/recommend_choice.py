"""From a sweep and its model to levels: what can be pruned, what is counted, and what the levels come to.

Knows nothing about files, nor about schedules.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch

from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.apputils.recommend_text import Choice
from distiller.apputils.recommend_usage import GOALS
from distiller.channel_groups import ChannelGroups
from distiller.errors import SensitivityError, UsageError
from distiller.names import named_parameters, unwrap
from distiller.quantization.search.width_choice import WidthCost
from distiller.sensitivity.curves import SensitivityPoint
from distiller.sensitivity.group_work import cost_of_units
from distiller.sensitivity.prunables import (
    DENSE_BITS,
    Amount,
    Prunable,
    coupled_prunables,
    macs_by_weight,
    removed_work,
    single_prunables,
)
from distiller.sensitivity.recommend import (
    Goal,
    Harm,
    Option,
    Together,
    monotone_curves,
    recommend,
    total_harm,
)
from distiller.thinning.removal import apply_recipe, thinning_recipe
from distiller.thinning.trial import model_groups

__all__ = ["Sweep", "choose_levels"]

_STRUCTURED = ("filter", "group")
_GOALS_OF = {"weight-bits": ("max_drop",), "rank": ("max_drop", "target_macs")}
_PURPOSE = "--recommend"
_MOST_PRODUCTS = 100_000
"""With more the best choice is sought by what each level takes alone."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """The points of one axis.

    Attributes:
        file: the CSV file.
        axis: its name.
        dense_level: of the axis.
        points: of the axis.
        block: M of `n:m`.
    """

    file: Path
    axis: str
    dense_level: float
    points: Sequence[SensitivityPoint]
    block: int


@dataclass(frozen=True, slots=True)
class _Found:
    """What can be pruned.

    Attributes:
        prunables: what has levels.
        reasons: why the rest of what was swept stays whole.
        elements: of all that was swept.
        macs: of the model.
        groups: with MACs, and with those elements, as their work; None: levels take what they take alone.
    """

    prunables: tuple[Prunable, ...]
    reasons: Mapping[str, str]
    elements: int
    macs: int
    groups: tuple[ChannelGroups, ChannelGroups] | None = None

    def together(self, counts_macs: bool) -> Together | None:
        """MACs or elements that really go at some levels; None: the sum."""
        if self.groups is None:
            return None
        counted = self.groups[0 if counts_macs else 1]
        cost = cost_of_units(counted, [own.name for own in self.prunables])
        if cost is not None and self._products(cost) > _MOST_PRODUCTS:
            cost = None
        return Together(partial(removed_work, counted, self.prunables), cost)

    def _products(self, cost: WidthCost[str]) -> int:
        """Of two levels each that the cost has; the time of the solver grows with them."""
        levels: dict[str | int, int] = {own.name: len(own.amounts) + 1 for own in self.prunables}
        pairs = {frozenset((product.first, product.second)) for product in cost.products}
        return sum(prod(levels[name] for name in pair) for pair in pairs if len(pair & levels.keys()) == 2)


def choose_levels(compressor: ClassifierCompressor, sweep: Sweep) -> Choice:
    """The levels that meet the goal of the flags best.

    Raises:
        SensitivityError: the sweep is not finished, or of another model.
        UsageError: the goal cannot be met, or no schedule is made of the axis.
    """
    args = compressor.args
    goal = next(Goal(kind, getattr(args, kind)) for kind in GOALS if getattr(args, kind) is not None)
    curves = monotone_curves(sweep.points, sweep.dense_level)
    levels = [level for level in next(iter(curves.values())) if level != sweep.dense_level]
    is_structured = sweep.axis in _STRUCTURED
    found = (_coupled if is_structured else _single)(compressor, sweep, list(curves), levels)
    if goal.kind not in (known := _GOALS_OF.get(sweep.axis, GOALS)):
        flags = " or ".join(f"--{kind.replace('_', '-')}" for kind in known)
        raise UsageError(f"--recommend: axis '{sweep.axis}' has no {goal.kind}; give {flags}")
    if not any(own.amounts for own in found.prunables):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.reasons.items())
        told = reasons or "no level takes anything away"
        raise UsageError(f"--recommend: nothing of what was swept can be pruned: {told}")
    counts_macs = goal.kind == "target_macs" or (is_structured and goal.kind == "max_drop")
    options = {
        own.name: _options(own, [curves[name] for name in own.curves], sweep.dense_level, counts_macs)
        for own in found.prunables
    }
    total = found.macs if counts_macs else found.elements
    best = recommend(options, goal, total, found.together(counts_macs))
    taken = {
        own.name: own.amounts[best.levels[own.name]]
        for own in found.prunables
        if best.levels[own.name] in own.amounts
    }
    reached = _reached(compressor, sweep.axis, taken, found)
    return Choice(goal, found.prunables, found.reasons, best.levels, best.drop, reached)


def _coupled(
    compressor: ClassifierCompressor, sweep: Sweep, swept: Sequence[str], levels: Sequence[float]
) -> _Found:
    model = unwrap(compressor.model)
    groups = model_groups(model, _PURPOSE)
    shapes = _shapes(compressor, sweep, swept if sweep.axis == "filter" else ())
    prunables, reasons, elements = coupled_prunables(sweep.axis, groups, shapes, swept, levels)
    return _Found(prunables, reasons, elements.macs(), groups.macs(), (groups, elements))


def _single(
    compressor: ClassifierCompressor, sweep: Sweep, swept: Sequence[str], levels: Sequence[float]
) -> _Found:
    shapes = _shapes(compressor, sweep, swept)
    dummy = torch.zeros(1, *compressor.input_shape, device=compressor.device)
    macs, total = macs_by_weight(unwrap(compressor.model), dummy)
    own = {name: shapes[name] for name in swept}
    prunables = single_prunables(sweep.axis, own, macs, levels, sweep.block)
    return _Found(prunables, {}, sum(map(prod, own.values())), total)


def _shapes(
    compressor: ClassifierCompressor, sweep: Sweep, needed: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(param.shape) for name, param in named_parameters(compressor.model)}
    if unknown := [name for name in needed if name not in shapes]:
        raise SensitivityError(f"{sweep.file}: the model has no '{unknown[0]}'; it is of another model")
    return shapes


def _options(
    own: Prunable, curves: Sequence[Mapping[float, Harm]], dense_level: float, counts_macs: bool
) -> list[Option]:
    options = [Option(dense_level, Harm(0.0, 0.0), 0, own.size)]
    for level, amount in own.amounts.items():
        harm = total_harm(curve[level] for curve in curves)
        removed = amount.macs if counts_macs else amount.elements
        options.append(Option(level, harm, removed, own.size - amount.units))
    return options


def _reached(compressor: ClassifierCompressor, axis: str, taken: Mapping[str, Amount], found: _Found) -> str:
    """What the levels come to, counted exactly."""
    removed = {name: range(amount.units) for name, amount in taken.items()}
    if found.groups is None:
        elements = sum(amount.elements for amount in taken.values())
    else:
        elements = found.elements - found.groups[1].macs(removed)
    if axis == "weight-bits":
        bits = DENSE_BITS - elements / found.elements
        return f"Reached: {bits:.2f} bits an element of the swept weights, {DENSE_BITS} before."
    if axis == "rank":
        macs = found.macs - sum(amount.macs for amount in taken.values())
        return (
            f"Reached: {found.elements - elements:,} of the {found.elements:,} elements of the swept weights "
            f"stay, as factors; {macs:,} of {found.macs:,} MACs stay ({100 * macs / found.macs:.2f} %)."
        )
    zeros = (
        f"Reached: {100 * elements / found.elements:.2f} % of the elements of the swept weights are zero "
        f"({elements:,} of {found.elements:,})"
    )
    if found.groups is None:
        left = 1 - sum(amount.macs for amount in taken.values()) / found.macs
        return (
            f"{zeros}; {100 * left:.2f} % of the MACs are multiplications by weights that are not zero; "
            "dense kernels do not save the others."
        )
    model, (groups, _) = unwrap(compressor.model), found.groups
    smaller = copy.deepcopy(model)
    apply_recipe(smaller, thinning_recipe(smaller, groups, removed))
    before, after = (sum(param.numel() for param in net.parameters()) for net in (model, smaller))
    return (
        f"{zeros}; when they are removed, {groups.macs(removed):,} of {groups.macs():,} MACs stay "
        f"({100 * groups.macs(removed) / groups.macs():.2f} %) and {after:,} of {before:,} parameters."
    )
