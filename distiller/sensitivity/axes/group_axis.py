"""The axis of coupled channel groups: channels that go from every layer that has a share of them.

A group is what `distiller.channel_groups` finds and thinning can remove: where outputs are added, the filters
of all the layers that make them, with their biases and norms and with what reads them. In a variant all
of that is zero, so that it answers as the network without these channels does.
Knows nothing about how a compressed model is judged.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from torch import Tensor, nn

from distiller.channel_groups import ChannelGroup, ChannelGroups
from distiller.names import named_parameters, owner, resolve_all
from distiller.pruning.channel_units import unit_l1_norms, unit_masks
from distiller.pruning.criteria import lowest, snap
from distiller.replay import Variant
from distiller.sensitivity.axes.axis import Axis, AxisContext, naming
from distiller.sensitivity.units import Unit
from distiller.thinning.trial import model_groups, removable_groups

__all__ = ["GroupAxis"]

_PURPOSE = "sensitivity of channel groups"


class GroupAxis(Axis):
    """Level s takes floor(s n) of the n channels of a group away, those of least magnitude; one stays.

    They are ranked as by `StructuredGroupPruner` with criterion l1: by the sum of |w| over a channel's
    filters in all layers that make it. A curve goes by the group's name, that of the first of these weights.
    """

    name = "group"
    takes = "weights, biases and norms of channel groups that thinning can remove channels from"
    label = "Share of the coupled channels removed"

    def units(
        self, model: nn.Module, names: Iterable[str], levels: Iterable[float], context: AxisContext
    ) -> list[Unit]:
        """One for each group of several channels that one of the parameters makes (or norms), as executed."""
        chosen_levels = self._checked_levels(levels)
        parameters = dict(named_parameters(model))
        requested = resolve_all(names, parameters)
        if context.dummy_input is None:
            groups = model_groups(model, _PURPOSE)
        else:
            groups = removable_groups(model, context.dummy_input, _PURPOSE)
        chosen = [group for group in groups.removable() if group.size > 1 and _has_one_of(group, requested)]
        concerned = {member.name for group in chosen for member in group.members}
        dense = {name: param.detach().clone() for name, param in parameters.items() if name in concerned}
        counts = sum(param.numel() for param in parameters.values()), groups.macs()
        units = []
        for group in chosen:
            own = {member.name: dense[member.name] for member in group.members if member.name in dense}
            make = _GroupVariants(group, own)
            note = _GroupNote(make, _work_of(group, groups), *counts)
            units.append(Unit(self.name, group.name, chosen_levels, make, tensors=tuple(own), note=note))
        return self._require_some(units, len(requested))


@dataclass(frozen=True)
class _GroupVariants:
    """Level -> the variant without the least channels of a group."""

    group: ChannelGroup
    dense: Mapping[str, Tensor] = field(repr=False)

    def __call__(self, level: float) -> Variant:
        removed = {self.group.name: self.removed(level)}
        masks = unit_masks(self.dense, ChannelGroups((self.group,), ()), removed)
        return Variant({name: self.dense[name].masked_fill(mask == 0, 0.0) for name, mask in masks.items()})

    def removed(self, level: float) -> tuple[int, ...]:
        """The channels that go, ascending."""
        count = min(self.asked_for(level), self.group.size - 1)
        return tuple(lowest(self._norms, count).nonzero().flatten().tolist())

    def asked_for(self, level: float) -> int:
        """How many channels a level stands for, the last one counted."""
        return int(snap(level * self.group.size))

    @cached_property
    def _norms(self) -> Tensor:
        with naming(self.group.name):
            return unit_l1_norms(self.dense, self.group)


@dataclass(frozen=True, slots=True)
class _GroupNote:
    """Level -> what a thinned network would lack.

    Attributes:
        variants: of the group.
        work: of the layers that the group has a share in.
        parameters: of the whole model.
        macs: of the whole model, for the batch that the groups were found with.
    """

    variants: _GroupVariants
    work: ChannelGroups
    parameters: int
    macs: int

    def __call__(self, level: float) -> str:
        group, units = self.variants.group, self.variants.removed(level)
        macs = self.work.macs() - self.work.macs({group.name: units})
        parameters = _removed_elements(group, self.variants.dense, units)
        layers = dict.fromkeys(owner(member.name) for member in group.filters())
        last = " (one has to stay)" if self.variants.asked_for(level) > len(units) else ""
        return (
            f"{len(units)} of {group.size} channels{last} of {', '.join(layers)}: "
            f"{parameters:,} parameters ({_percent(parameters, self.parameters)}), "
            f"{macs:,} MACs ({_percent(macs, self.macs)})"
        )


def _has_one_of(group: ChannelGroup, names: Collection[str]) -> bool:
    return any(member.role != "input" and member.name in names for member in group.members)


def _work_of(group: ChannelGroup, groups: ChannelGroups) -> ChannelGroups:
    """The group alone, with the work that depends on it: little to pickle."""
    own = tuple(
        share
        for share in groups.work
        if any(unit is not None and unit[0] == group.name for factor in share.factors for unit in factor)
    )
    return ChannelGroups((group,), own)


def _removed_elements(group: ChannelGroup, dense: Mapping[str, Tensor], units: Collection[int]) -> int:
    """How many elements the parameters of a group lose."""
    gone: dict[str, dict[int, int]] = {}
    for (name, dim), indices in group.indices(units).items():
        gone.setdefault(name, {})[dim] = len(set(indices))
    lost = 0
    for name, tensor in dense.items():
        kept = prod(size - gone[name].get(dim, 0) for dim, size in enumerate(tensor.shape))
        lost += tensor.numel() - kept
    return lost


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.1f} %"
