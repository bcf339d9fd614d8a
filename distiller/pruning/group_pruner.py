"""What the pruners share that mask whole units of channel groups.

Which units there are is in `distiller.channel_groups`, in which order they go in `pruning.unit_steps`; what
they are worth, in the subclasses.
Knows nothing about when it is called, how masks are applied, or physical removal.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distiller.channel_groups import ChannelGroup, ChannelGroups
from distiller.errors import DistillerError
from distiller.interfaces import Pruner, StepContext
from distiller.names import is_pattern, named_parameters, resolve_all
from distiller.pruning.channel_units import filter_weights, nonzero_units, unit_masks
from distiller.pruning.criteria import refuse_nan, snap
from distiller.pruning.group_targets import GroupTarget
from distiller.pruning.scored_filters import zeros_first
from distiller.pruning.settings import LONGEST, ParameterError, as_names, check_whole_number, naming
from distiller.pruning.unit_steps import (
    RankedGroup,
    Step,
    removal_steps,
    steps_until_small,
    steps_within_budget,
    steps_within_share,
    units_of,
)
from distiller.tensor_cuts import TensorCuts
from distiller.thinning.trial import model_groups

__all__ = ["GroupPruner", "choose_groups", "levels_of_groups"]


def choose_groups(
    groups: ChannelGroups,
    param_names: Sequence[str],
    weights: Sequence[str] | None,
    protected: Sequence[str],
    pruner_name: str,
) -> tuple[ChannelGroup, ...]:
    """The groups that names and patterns of their filters, biases or norms stand for.

    Args:
        groups: of the model.
        param_names: all of the model's.
        weights: names and patterns, each of at least one group that can be pruned; None: every group.
        protected: names and patterns; groups that they stand for are left out.
        pruner_name: named in errors.

    Raises:
        UnknownNameError: a name or pattern matches no parameter.
        DistillerError: nothing can be pruned of what one stands for; says why.
    """
    resolve_all([*(weights or ()), *protected], param_names)
    kept_out = frozenset(resolve_all(protected, param_names))

    def hindrance(group: ChannelGroup) -> str | None:
        return "it is protected" if group.reason is None and _has_one_of(group, kept_out) else group.reason

    chosen: dict[str, ChannelGroup] = {}
    for request in weights or ("*",):
        names = resolve_all([request], param_names)
        candidates = [group for group in groups if _has_one_of(group, names)]
        free = {group.name: group for group in candidates if hindrance(group) is None}
        chosen.update(free)
        if not free:
            reasons = dict.fromkeys(f"{group.name}: {hindrance(group)}" for group in candidates)
            told = "; ".join(reasons) or "it makes no channels: name the weight of a layer"
            where = f"pruner '{pruner_name}'" + (f", '{request}'" if weights else "")
            raise ParameterError(f"{where}: there is no unit that can be removed; {told}", names[0])
    return tuple(group for group in groups if group.name in chosen)


def levels_of_groups(
    groups: Iterable[ChannelGroup], param_names: Sequence[str], levels: Mapping[str, float], pruner_name: str
) -> dict[str, float]:
    """The level of each group that names and patterns of its filters, biases or norms stand for.

    Args:
        groups: that can be pruned.
        param_names: all of the model's.
        levels: by name or pattern; a name wins over a pattern, and any other pattern over `*`.
        pruner_name: named in errors.

    Returns:
        By the group's name.

    Raises:
        DistillerError: two levels for the same group.
    """
    by_rank: list[dict[str, tuple[str, float]]] = [{}, {}, {}]
    for key, level in levels.items():
        found = by_rank[0 if key == "*" else 1 if is_pattern(key) else 2]
        names = resolve_all([key], param_names)
        for group in groups:
            if _has_one_of(group, names):
                other, known = found.setdefault(group.name, (key, level))
                if known != level:
                    raise ParameterError(
                        f"pruner '{pruner_name}': '{other}' and '{key}' have the same units (those of "
                        f"{group.name}), and so must have one level, got {known:g} and {level:g}",
                        group.name,
                    )
    return {name: level for found in by_rank for name, (_, level) in found.items()}


@dataclass(frozen=True, slots=True)
class _Found:
    """What the pruner works on, in the model as it is now; of groups with a level of their own, that."""

    groups: ChannelGroups
    chosen: tuple[ChannelGroup, ...]
    masked: frozenset[str]
    levels: Mapping[str, float]


class GroupPruner(Pruner):
    """A pruner of the units that are worth least, in every parameter that has a share of them.

    Args:
        name: the instance's name in the schedule.
        model: what is pruned.
        target: how much goes when.
        ranking: 'local' or 'global' (`unit_steps.removal_steps`).
        weights: names and patterns of weights whose groups are pruned; None: every group that can be.
        protected: names and patterns of weights whose groups stay whole.
        round_to: a group that is pruned keeps a multiple of so many units.
        max_sparsity: the share of a group that may go at most, in (0, 1].

    Raises:
        DistillerError: an argument out of range.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        target: GroupTarget,
        ranking: Literal["local", "global"],
        weights: list[str] | str | None,
        protected: list[str] | str | None,
        round_to: int,
        max_sparsity: float,
    ) -> None:
        if ranking not in ("local", "global"):
            raise DistillerError(f"ranking must be 'local' or 'global', got '{ranking}'")
        check_whole_number("round_to", round_to, least=1, most=LONGEST)
        if target.levels and (weights is not None or ranking != "local"):
            got = "weights" if weights is not None else "ranking 'global'"
            raise DistillerError(
                f"levels name the groups and the share of each, which ranks by itself; got {got} as well"
            )
        self.name = name
        self.target = target
        self.ranking: Literal["local", "global"] = ranking
        self.weights = tuple(target.levels) or (None if weights is None else as_names(weights))
        self.protected = (protected,) if isinstance(protected, str) else tuple(protected or ())
        self.round_to = round_to
        self.max_sparsity = max_sparsity
        self._model = model
        self._now: _Found | None = None
        self._dense_sizes: dict[str, int] = {}
        self._dense_macs = 0

    def select(self, param_names: Sequence[str]) -> tuple[str, ...]:
        """All parameters that take a share of a chosen group's units, in the model's order.

        Raises:
            UnknownNameError: a name or pattern matches nothing.
            DistillerError: nothing can be pruned of what one stands for, or the model has no graph.
        """
        resolve_all([*(self.weights or ()), *self.protected], param_names)
        masked = self._found().masked
        return tuple(name for name in param_names if name in masked)

    def check(self, params: Mapping[str, Tensor]) -> None:
        """See to it that the target can be reached.

        Raises:
            DistillerError: it cannot; says how far one comes.
        """
        found = self._found()
        steps = self._unranked_steps(found)
        if not steps:
            sizes = ", ".join(f"{group.name} has {group.size}" for group in found.chosen)
            raise DistillerError(
                f"pruner '{self.name}': no group can be made smaller with round_to {self.round_to} and "
                f"max_sparsity {self.max_sparsity:g}: {sizes}; lower the one or raise the other"
            )
        if self.target.is_of_macs:
            self._taken(found, steps, None)

    def too_small(self, params: Mapping[str, Tensor], ctx: StepContext) -> tuple[str, ...]:
        """Those of `params` whose groups cannot be made smaller, or not by so little as in this epoch."""
        found = self._found()
        steps = self._unranked_steps(found)
        if not self.target.is_of_macs:
            taken = self._taken(found, steps, ctx)
            steps = taken if self.ranking == "local" or not taken else steps
        smaller = {step.group for step in steps}
        pruned = {m.name for group in found.chosen if group.name in smaller for m in group.members}
        return tuple(name for name in params if name not in pruned)

    def target_sparsity(self, ctx: StepContext) -> Mapping[str, float]:
        """The share of the units that are aimed at in this epoch; {} where MACs are aimed at."""
        if self.target.is_of_macs:
            return {}
        levels = self.target.levels or dict.fromkeys(self.weights or ("*",), self.target.final)
        return {key: self.target.at(ctx, level) for key, level in levels.items()}

    def compute_masks(self, params: Mapping[str, Tensor], ctx: StepContext) -> dict[str, Tensor]:
        """Masks of the chosen groups' parameters in `params`; those that are not given count as in the model.

        Raises:
            DistillerError: a weight holds NaN, or there is nothing to rank by.
        """
        found = self._found()
        own = {name: param for name, param in params.items() if name in found.masked}
        if not own:
            return {}
        in_model = {name: param.detach() for name, param in named_parameters(self._model)}
        everything = {**in_model, **own}
        scores: dict[str, Tensor] = {}
        for group in found.chosen:
            for member in filter_weights(everything, group):
                with naming(self.name, member.name):
                    refuse_nan(everything[member.name])
            with naming(self.name, group.name):
                worth = self._scores(everything, group).cpu()
                scores[group.name] = zeros_first(worth, nonzero_units(everything, group))
        taken = self._taken(found, self._steps(found, scores), ctx)
        masks = unit_masks(own, found.groups, units_of(taken))
        whole = {name: torch.ones_like(own[name], requires_grad=False) for name in own if name not in masks}
        return {**whole, **masks}

    def state_dict(self) -> dict[str, Any]:
        """Of the dense network: its MACs, and the units of the groups."""
        return {"dense_macs": self._dense_macs, "dense_sizes": dict(self._dense_sizes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the dense network in `state`."""
        self._dense_macs, self._dense_sizes = state["dense_macs"], dict(state["dense_sizes"])

    def follow_thinning(self, cuts: TensorCuts) -> None:
        """Find the groups anew; targets go on being shares of the dense network."""
        self._now = None

    @abstractmethod
    def _scores(self, params: Mapping[str, Tensor], group: ChannelGroup) -> Tensor:
        """What each unit of a group is worth, 0 or more; shape (units,), float64."""

    def _check_group(self, group: ChannelGroup) -> None:
        """Raise a DistillerError if the units of a group cannot be ranked."""

    def _found(self) -> _Found:
        if self._now is None:
            groups = model_groups(self._model, type(self).__name__)
            names = [name for name, _ in named_parameters(self._model)]
            if self._dense_sizes:
                chosen = self._still_there(groups)
            else:
                chosen = choose_groups(groups, names, self.weights, self.protected, self.name)
                self._dense_sizes = {group.name: group.size for group in chosen}
                self._dense_macs = groups.macs()
            masked = frozenset(member.name for group in chosen for member in group.members)
            for group in chosen:
                with naming(self.name, group.name):
                    self._check_group(group)
            levels = levels_of_groups(chosen, names, self.target.levels, self.name)
            self._now = _Found(groups, chosen, masked, levels)
        return self._now

    def _still_there(self, groups: ChannelGroups) -> tuple[ChannelGroup, ...]:
        """The chosen groups in a model that was thinned; of one that is a single unit nothing can go."""
        return tuple(group for group in groups.removable() if group.name in self._dense_sizes)

    def _unranked_steps(self, found: _Found) -> Sequence[Step]:
        """All steps, as if every unit were worth the same."""
        return self._steps(found, {group.name: torch.zeros(group.size) for group in found.chosen})

    def _steps(self, found: _Found, scores: Mapping[str, Tensor]) -> list[Step]:
        ranked = (RankedGroup(group.name, scores[group.name], self._dense_sizes[group.name])
                  for group in found.chosen)  # fmt: skip
        return removal_steps(ranked, self.ranking, self.round_to, self.max_sparsity)

    def _taken(self, found: _Found, steps: Sequence[Step], ctx: StepContext | None) -> Sequence[Step]:
        """Those of the steps that bring the model to the target of now; of the end, without a context."""

        def aimed_at(final: float) -> float:
            return final if ctx is None else self.target.at(ctx, final)

        if found.levels:
            aims = {name: aimed_at(level) for name, level in found.levels.items()}
            return [step for step in steps if steps_within_share([step], aims[step.group])]
        target = aimed_at(self.target.final)
        if not self.target.is_of_macs:
            if self.ranking == "local":
                return steps_within_share(steps, target)
            return steps_within_budget(steps, self._budget(found, target))

        def macs(steps: Sequence[Step]) -> int:
            return found.groups.macs(units_of(steps))

        taken = steps_until_small(steps, macs, target * self._dense_macs)
        if taken is None:
            raise DistillerError(
                f"pruner '{self.name}': final_macs {target:g} cannot be reached: with at most max_sparsity "
                f"{self.max_sparsity:g} of each group pruned, {macs(steps) / self._dense_macs:.3f} of the "
                "dense model's MACs are left; raise final_macs or max_sparsity, or prune more groups"
            )
        return taken

    def _budget(self, found: _Found, sparsity: float) -> int:
        """How many more units of all chosen groups together are to go."""
        left = sum(group.size for group in found.groups if group.name in self._dense_sizes)
        dense = sum(self._dense_sizes.values())
        return int(snap(sparsity * dense)) - (dense - left)


def _has_one_of(group: ChannelGroup, names: Collection[str]) -> bool:
    """Whether the group's filters, biases or norms are among the names."""
    return any(member.role != "input" and member.name in names for member in group.members)
