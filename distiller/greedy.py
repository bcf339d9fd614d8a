"""Greedy filter pruning: take filters where it hurts least, again and again.

    until the network is small enough:
        for each candidate, a group of channels that convolutions make:
            on a copy of the network: mask the next share of its units, fine-tune, evaluate
        go on with the best of the copies

Candidates are read off the network's graph (`distiller.channel_groups`), coupled layers as one. How
small the network is, is counted as if the masked units were removed; they are masked only.
Knows nothing about data, files, or how fine-tuning is done.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from distiller.channel_groups import ChannelGroup, ChannelGroups
from distiller.errors import UsageError
from distiller.names import named_parameters
from distiller.pruning.channel_units import unit_l1_norms, unit_masks
from distiller.scheduler import CompressionScheduler

_CONVOLUTION_DIMS = range(3, 6)  # Conv1d, Conv2d, Conv3d


class FineTune(Protocol):
    """Trains a model under masks."""

    def __call__(
        self, model: nn.Module, scheduler: CompressionScheduler, iteration: int, density: float
    ) -> None:
        """Train `model` in place.

        Args:
            model: to be trained; its pruned weights are masked by `scheduler`.
            scheduler: of the model; has its masks.
            iteration: from 0; the same for all candidates that are compared.
            density: MACs before this iteration's pruning, as a fraction of the dense network's.
        """


class Evaluate(Protocol):
    """Scores a model, always on the same data."""

    def __call__(self, model: nn.Module) -> tuple[float, float, float]:
        """(top-1 in percent, top-5 in percent, mean loss)."""
        ...


@dataclass(frozen=True, slots=True)
class GreedyIteration:
    """The best candidate of one iteration.

    Attributes:
        iteration: from 0.
        group: the name of the group that was pruned.
        top1: accuracy after fine-tuning, in percent.
        top5: the same.
        loss: mean loss.
        macs: of the network without the masked units.
        density: the same as a fraction of the dense network's.
        removed: by group, the units that are masked so far, ascending.
        model: the fine-tuned network.
        scheduler: of this model, with the masks.
    """

    iteration: int
    group: str
    top1: float
    top5: float
    loss: float
    macs: int
    density: float
    removed: dict[str, list[int]]
    model: nn.Module
    scheduler: CompressionScheduler


def greedy_filter_pruning(
    model: nn.Module,
    groups: ChannelGroups,
    target_density: float,
    fine_tune: FineTune,
    evaluate: Evaluate,
    step: float = 0.1,
    removed: Mapping[str, Sequence[int]] | None = None,
    iteration: int = 0,
) -> Iterator[GreedyIteration]:
    """Prune the group that costs the least accuracy, until the network is small enough.

    Ends when the MACs are at most `target_density` of the dense network's, or when every candidate
    has a single unit left.

    Args:
        model: the network; stays as it is.
        groups: of the network.
        target_density: MACs to reach, as a fraction of the dense network's, 0..1.
        fine_tune: trains a candidate.
        evaluate: scores it; the best (top1, top5, -loss) wins, the first of equals.
        step: the fraction of a group's remaining units that an iteration prunes, 0..1, at least one
            unit; those whose filters have the smallest L1 norm.
        removed: to go on with: by group, the units that are masked already.
        iteration: to go on with: the number of the next iteration.

    Yields:
        The best candidate of each iteration.

    Raises:
        UsageError: a number out of range, or a network without candidates.
        DistillerError: a weight holds NaN.

    Source: D. Intel's Distiller, greedy filter pruning; Yang et al., "NetAdapt", 2018.
    """
    for name, value in (("target_density", target_density), ("step", step)):
        if not 0 < value < 1:
            raise UsageError(f"greedy pruning: {name} must lie between 0 and 1, got {value:g}")
    candidates = greedy_candidates(model, groups)
    dense, gone = groups.macs(), {name: sorted(units) for name, units in (removed or {}).items()}
    density = groups.macs(gone) / dense
    while density > target_density:
        best: GreedyIteration | None = None
        for group in candidates:
            tried = _pruned_further(model, group, gone, step)
            if tried is None:
                continue
            found = _try(model, groups, group.name, tried, iteration, density, fine_tune, evaluate)
            if best is None or _rank(found) > _rank(best):
                best = found
        if best is None:
            return
        yield best
        model, gone, density, iteration = best.model, best.removed, best.density, iteration + 1


def greedy_candidates(model: nn.Module, groups: ChannelGroups) -> tuple[ChannelGroup, ...]:
    """The groups that greedy pruning chooses from: made by convolutions, removable, of several units.

    Channels that a layer norm takes statistics over are none: without them it would compute others.

    Raises:
        UsageError: there are none.
    """
    params = dict(named_parameters(model))
    made = [
        group
        for group in groups
        if any(m.name in params and params[m.name].dim() in _CONVOLUTION_DIMS for m in group.filters())
    ]
    found = tuple(g for g in made if g.is_removable and g.size > 1 and not g.normalized_by)
    if not found:
        reasons = {group.reason or f"{group.normalized_by[0]} normalizes over it" for group in made
                   if group.reason or group.normalized_by}  # fmt: skip
        told = f": {'; '.join(sorted(reasons))}" if reasons else ", it has no convolutions of several filters"
        raise UsageError(f"greedy pruning: nothing of the network can be pruned{told}")
    return found


def unit_densities(groups: Sequence[ChannelGroup], removed: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """By group, the fraction of its units that is left, 0..1."""
    return {group.name: 1 - len(removed.get(group.name, ())) / group.size for group in groups}


def _pruned_further(
    model: nn.Module, group: ChannelGroup, gone: Mapping[str, Sequence[int]], step: float
) -> dict[str, list[int]] | None:
    """The removed units with the next share of the group's among them; None when one unit is left."""
    removed = set(gone.get(group.name, ()))
    left = group.size - len(removed)
    count = min(max(1, int(step * left)), left - 1)
    if count == 0:
        return None
    norms = unit_l1_norms(dict(named_parameters(model)), group)
    norms[sorted(removed)] = torch.inf
    weakest = torch.argsort(norms, stable=True)[:count].tolist()
    return {**{name: list(units) for name, units in gone.items()}, group.name: sorted([*removed, *weakest])}


def _try(
    model: nn.Module,
    groups: ChannelGroups,
    name: str,
    removed: dict[str, list[int]],
    iteration: int,
    density: float,
    fine_tune: FineTune,
    evaluate: Evaluate,
) -> GreedyIteration:
    model = copy.deepcopy(model)
    scheduler = CompressionScheduler(model, unit_masks(dict(named_parameters(model)), groups, removed))
    fine_tune(model, scheduler, iteration, density)
    with scheduler.masked():
        top1, top5, loss = evaluate(model)
    macs = groups.macs(removed)
    return GreedyIteration(
        iteration, name, top1, top5, loss, macs, macs / groups.macs(), removed, model, scheduler
    )


def _rank(found: GreedyIteration) -> tuple[float, float, float]:
    return found.top1, found.top5, -found.loss
