"""Which rank each layer gets: by kept energy, by a fraction of its own cost, or by a budget of all layers.

Knows nothing about layers: it has their costs, and what of them a rank loses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from distiller.errors import UsageError
from distiller.factorization.decompositions import mode_energies, singular_values
from distiller.factorization.forms import Form, LayerShape, Rank, candidate_ranks
from distiller.pruning.criteria import snap

__all__ = [
    "Cost",
    "RankPoint",
    "loss_of_energy",
    "matrix_of",
    "points_by_energy",
    "rank_for_energy",
    "rank_within",
    "rank_without",
    "ranks_for_budget",
]

Cost = Literal["parameters", "macs"]
"""What a budget counts."""


@dataclass(frozen=True, slots=True)
class RankPoint:
    """What a layer costs at a rank, and loses by it.

    Attributes:
        rank: the rank; None: the layer is left whole.
        parameters: elements of its weights.
        macs: multiply-accumulates for one sample.
        loss: 0 of the whole layer; of what kind, the caller says.
    """

    rank: Rank | None
    parameters: int
    macs: int
    loss: float


def matrix_of(weight: Tensor, form: Form) -> Tensor:
    """The matrix whose singular values tell what a rank of a form loses."""
    if form == "spatial":
        m, n, kh, kw = weight.shape
        return weight.permute(1, 2, 0, 3).reshape(n * kh, m * kw)
    return weight.flatten(1)


def rank_without(full: int, share: float) -> int:
    """The rank that is left when a share of it goes: full - floor(share full), at least 1.

    Args:
        full: at least 1.
        share: 0..1.
    """
    return max(1, full - int(snap(share * full)))


def loss_of_energy(weight: Tensor, form: Form) -> Callable[[Rank], float]:
    """A function from a rank to what it loses: -log of the energy kept, sum_(i <= r) s_i^2 / sum_i s_i^2.

    The sum over layers is -log of the product of their energies, which a layer that loses all spoils. Of
    `tucker2`, the energies of both modes count.

    Args:
        weight: of the layer.
        form: its form.

    Source: Zhang et al., "Accelerating Very Deep Convolutional Networks for Classification and Detection"
    (2015), section 2.4.
    """
    spectra = _spectra(weight, form)
    totals = [float(spectrum.sum()) for spectrum in spectra]
    kept = [spectrum.cumsum(0).tolist() for spectrum in spectra]

    def loss(rank: Rank) -> float:
        lost = 0.0
        for own, sums, total in zip(rank, kept, totals, strict=True):
            if total > 0:
                lost -= math.log(min(1.0, max(_LEAST, sums[min(own, len(sums)) - 1] / total)))
        return lost

    return loss


def rank_for_energy(weight: Tensor, form: Form, energy: float) -> Rank:
    """The lowest rank that keeps a fraction of the sum of squared singular values.

    Of `tucker2`, each mode may lose half of what may be lost; both together then keep at least `energy`.

    Args:
        weight: of the layer.
        form: its form.
        energy: more than 0, at most 1.
    """
    spectra = _spectra(weight, form)
    may_lose = (1 - energy) / len(spectra)
    ranks = tuple(_lowest(spectrum, may_lose) for spectrum in spectra)
    if form != "tucker2":
        return ranks
    k = weight[0, 0].numel()
    return (min(ranks[0], ranks[1] * k), min(ranks[1], ranks[0] * k))


def rank_within(shape: LayerShape, form: Form, cost: Cost, fraction: float, nonzeros: int = 0) -> Rank:
    """The highest rank at which a factored layer costs at most a fraction of the whole one.

    Raises:
        UsageError: it costs more at rank 1.
    """
    count = shape.factored_parameters if cost == "parameters" else shape.factored_macs
    whole = shape.parameters if cost == "parameters" else shape.macs
    fitting = [
        rank for rank in candidate_ranks(shape, form) if count(form, rank, nonzeros) <= fraction * whole
    ]
    if not fitting:
        least = count(form, candidate_ranks(shape, form)[0], nonzeros) / max(1, whole)
        raise UsageError(f"{cost} must be at least {least:.4f}, which rank 1 costs, got {fraction}")
    return fitting[-1]


def points_by_energy(shape: LayerShape, weight: Tensor | None, form: Form) -> list[RankPoint]:
    """Each rank below break-even, with `loss_of_energy`; the whole layer last.

    Args:
        shape: of the layer.
        weight: its weight; None: no rank loses anything.
        form: its form.
    """
    loss = loss_of_energy(weight, form) if weight is not None else _nothing
    points = [
        RankPoint(rank, shape.factored_parameters(form, rank), shape.factored_macs(form, rank), loss(rank))
        for rank in candidate_ranks(shape, form)
        if shape.shrinks(form, rank)
    ]
    return [*points, RankPoint(None, shape.parameters, shape.macs, 0.0)]


def ranks_for_budget(
    points: Mapping[str, Sequence[RankPoint]], cost: Cost, budget: int
) -> dict[str, RankPoint]:
    """What each layer becomes so that all together cost at most `budget`.

    Greedy: of the steps along the lower convex hulls of the layers' points (loss over cost), that which loses
    least for each parameter or MAC it saves comes first. The last step goes only as far as it has to. Of
    convex losses this is the best choice but for what the last step saves too much.

    Args:
        points: by layer, what it may become; the whole layer among them.
        cost: what is counted.
        budget: for these layers together.

    Raises:
        UsageError: they cost more at their cheapest.
    """
    chosen: dict[str, RankPoint] = {}
    steps: list[tuple[float, str, RankPoint]] = []
    for name, own in points.items():
        hull = _hull(own, cost)
        chosen[name] = hull[0]
        for before, after in pairwise(hull):
            saved = getattr(before, cost) - getattr(after, cost)
            steps.append(((after.loss - before.loss) / saved, name, after))
    total = sum(getattr(point, cost) for point in chosen.values())
    for _, name, after in sorted(steps, key=lambda step: step[0]):
        if total <= budget:
            break
        others = total - getattr(chosen[name], cost)
        between = [
            point
            for point in points[name]
            if getattr(point, cost) + others <= budget and getattr(point, cost) >= getattr(after, cost)
        ]
        new = min(between, key=lambda point: point.loss) if between else after
        total = others + getattr(new, cost)
        chosen[name] = new
    if total > budget:
        raise UsageError(
            f"the layers cost {total:,} {_UNITS[cost]} at the least, more than the {budget:,} that the "
            "budget leaves them; allow more, or name more layers"
        )
    return chosen


_LEAST = 1e-12
"""Energies are taken for at least that, so that their logarithms are finite."""
_UNITS = {"parameters": "parameters", "macs": "MACs"}


def _nothing(rank: Rank) -> float:
    return 0.0


def _spectra(weight: Tensor, form: Form) -> tuple[Tensor, ...]:
    """The squared singular values of the weight, or of both modes of `tucker2`."""
    if form == "tucker2":
        return mode_energies(weight)
    return (singular_values(matrix_of(weight, form)).square(),)


def _hull(points: Sequence[RankPoint], cost: Cost) -> list[RankPoint]:
    """The lower convex hull of loss over cost, the whole layer first, costs descending."""
    ordered = sorted(points, key=lambda point: (-getattr(point, cost), point.loss))
    start = next(index for index, point in enumerate(ordered) if point.rank is None)
    hull: list[RankPoint] = []
    for point in ordered[start:]:
        if hull and getattr(point, cost) >= getattr(hull[-1], cost):
            continue
        while len(hull) >= 2 and _slope(hull[-2], hull[-1], cost) >= _slope(hull[-2], point, cost):
            hull.pop()
        hull.append(point)
    return hull


def _slope(before: RankPoint, after: RankPoint, cost: Cost) -> float:
    return (after.loss - before.loss) / (getattr(before, cost) - getattr(after, cost))


def _lowest(spectrum: Tensor, may_lose: float) -> int:
    """How many of descending values are needed so that the rest is at most a fraction of their sum."""
    total = float(spectrum.sum())
    if total == 0:
        return 1
    lost = 1 - spectrum.cumsum(0) / total
    # A few units in the last place: all of a spectrum must be enough for an energy of 1.
    enough = (lost <= may_lose + 1e-12).nonzero()
    return int(enough[0]) + 1 if len(enough) else len(spectrum)
