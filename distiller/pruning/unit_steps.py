"""In which order the units of channel groups go, and how far down that order to go.

A step takes one unit of a group, or as many as keep the group's size a multiple of some number. Steps are
in the order in which they are taken, so that what a smaller target takes, a larger one takes too.
Knows nothing about where scores come from, nor about models or masks.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from distiller.pruning.criteria import snap

__all__ = [
    "RankedGroup",
    "Step",
    "kept_sizes",
    "relative_to_mean",
    "removal_steps",
    "steps_until_small",
    "steps_within_budget",
    "steps_within_share",
    "units_of",
]


@dataclass(frozen=True, slots=True)
class RankedGroup:
    """A group with what its units are worth.

    Attributes:
        name: the group's.
        scores: (units,), the lowest go first; 0 or more, -inf for a unit that is zero already.
        dense_size: units of the group in the dense network; more than it has now, if some were removed.
    """

    name: str
    scores: Tensor
    dense_size: int


@dataclass(frozen=True, slots=True)
class Step:
    """Units of one group that go together.

    Attributes:
        group: its name.
        units: which.
        gone: how many of the dense group's units have gone after it.
        dense_size: units of the dense group.
        score: of the units, comparable with those of other groups; -inf when all are zero already.
    """

    group: str
    units: tuple[int, ...]
    gone: int
    dense_size: int
    score: float


def removal_steps(
    ranked: Iterable[RankedGroup], ranking: Literal["local", "global"], round_to: int, max_sparsity: float
) -> list[Step]:
    """All steps that may be taken, in their order.

    Within a group the units of lowest score go first, of equal ones those of lower index. Across groups:

        local   the step after which the smaller share of its dense group has gone goes first, so that all
                groups come down alike; scores of different groups are not compared
        global  the step of the lower score goes first, relative to the mean of the group (`relative_to_mean`)

    Args:
        ranked: the groups; of equal steps those of earlier groups go first.
        ranking: across groups.
        round_to: what the size of a group that is touched is a multiple of.
        max_sparsity: the share of a dense group that may go, 0..1; one unit always stays.
    """
    steps: list[Step] = []
    for group in ranked:
        order = torch.argsort(group.scores, stable=True)
        scores = relative_to_mean(group.scores)[order]
        size, taken, score = scores.numel(), 0, -math.inf
        for kept in kept_sizes(size, group.dense_size, round_to, max_sparsity):
            among = slice(taken, size - kept)
            score = max(score, _score_of(scores[among]))  # rounding must not change the order in a group
            units = tuple(sorted(order[among].tolist()))
            steps.append(Step(group.name, units, group.dense_size - kept, group.dense_size, score))
            taken = size - kept
    if ranking == "local":
        return sorted(steps, key=lambda step: step.gone / step.dense_size)
    return sorted(steps, key=lambda step: step.score)


def kept_sizes(size: int, dense_size: int, round_to: int, max_sparsity: float) -> list[int]:
    """The sizes to which a group may come down, the largest first.

    Args:
        size: units now.
        dense_size: units in the dense network.
        round_to: what the sizes are multiples of; the group may have another size as long as it is whole.
        max_sparsity: the share of the dense units that may go, 0..1; one unit always stays.
    """
    least = max(1, dense_size - int(snap(max_sparsity * dense_size)))
    return [kept for kept in range((size - 1) // round_to * round_to, 0, -round_to) if kept >= least]


def relative_to_mean(scores: Tensor) -> Tensor:
    """Scores of a group's units divided by their mean, so that groups can be compared.

    Norms grow with the number and the size of a group's layers, and gradients with its depth. The mean is
    that of the units that are not zero, so that scores stay the same when zero units are removed.

    Args:
        scores: (units,), 0 or more; -inf for units that are zero.

    Returns:
        The same shape; -inf stays. All as they were where the mean is 0.

    Source: Fang et al., "DepGraph: Towards Any Structural Pruning" (arXiv 2301.12900), section 3.3,
    relative scores within each group.
    """
    present = scores[scores > -torch.inf]
    mean = float(present.mean()) if present.numel() else 0.0
    return scores / mean if mean > 0 else scores


def steps_within_share(steps: Sequence[Step], share: float) -> list[Step]:
    """The steps after which at most floor(share * units) of each dense group have gone."""
    return [step for step in steps if step.gone <= int(snap(share * step.dense_size))]


def steps_within_budget(steps: Sequence[Step], budget: int) -> list[Step]:
    """The first of the steps, as many as take at most `budget` units in all."""
    taken: list[Step] = []
    for step in steps:
        budget -= len(step.units)
        if budget < 0:
            break
        taken.append(step)
    return taken


def steps_until_small(
    steps: Sequence[Step], size: Callable[[Sequence[Step]], int], most: float
) -> list[Step] | None:
    """The first of the steps, as few as make the network small enough.

    Where the units that are zero are enough by themselves, they are taken as they are unless it would be
    small enough without any one of the steps, too: what was pruned stays pruned while the target shrinks,
    whatever order the zeros, which have no scores any more, are in.

    Args:
        steps: in their order.
        size: of the network (as its MACs) without the units of some steps; smaller with more of them.
        most: the size to come down to.

    Returns:
        The steps: without the last, or another one of the zeros, it would be larger than `most`. None if all
        of them are not enough.
    """
    count = bisect_left(range(len(steps) + 1), True, key=lambda number: size(steps[:number]) <= most)
    if count > len(steps):
        return None
    zeros = [step for step in steps if step.score == -math.inf]
    if count < len(zeros) and size(zeros) <= most:
        last_of_group = {step.group: step for step in zeros}
        for last in last_of_group.values():
            if size([step for step in zeros if step is not last]) > most:
                return zeros
    return list(steps[:count])


def units_of(steps: Iterable[Step]) -> dict[str, list[int]]:
    """By group, the units of the steps."""
    units: dict[str, list[int]] = {}
    for step in steps:
        units.setdefault(step.group, []).extend(step.units)
    return units


def _score_of(scores: Tensor) -> float:
    """The mean of the scores of one step's units; those that are zero count as 0, unless all are."""
    if bool((scores == -torch.inf).all()):
        return -math.inf
    return float(scores.clamp(min=0).mean())
