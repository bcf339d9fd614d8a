"""Channel groups as plain data: which channels of a network stand or fall together.

A *unit* is the smallest thing that can be cut out of a network: a filter with its batch norm's
numbers and its channel in everything that reads it; a whole set of filters where they are added.
A *group* is the units that take a share of the same tensors.
Knows nothing about masks, nor about how units are chosen or removed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from distiller.channel_groups.network_ids import Role
from distiller.errors import UnknownNameError, UsageError, did_you_mean


@dataclass(frozen=True, slots=True)
class GroupMember:
    """A dimension of a parameter or buffer that a group has its share of.

    Attributes:
        name: canonical name of the parameter or buffer.
        dim: its dimension.
        role: "output": filters of a layer, or its bias; "through": those of a layer that makes a unit's
            channels of the unit's own (depthwise); "input": the channels that a layer reads; "channel":
            what is held for each channel (norms, scales, embeddings of positions).
        indices: by unit of the group, the indices along the dimension that are the unit's.
    """

    name: str
    dim: int
    role: Role
    indices: tuple[tuple[int, ...], ...]

    def of(self, units: Collection[int]) -> list[int]:
        """The indices of several units, ascending."""
        return sorted(index for unit in units for index in self.indices[unit])


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Units that take a share of the same tensors.

    Attributes:
        name: of the first weight that makes these channels; another group of the same weight has
            its number after it, as in `conv1.weight#2`. Where no layer makes them, of the first member
            and its dimension, as in `conv1.weight:1`.
        size: how many units there are.
        members: the tensors, in the order of execution.
        reason: why no unit can be removed; None when any can, as long as one is left.
        normalized_by: the layer norms that take statistics over these channels. Where one does, a
            network without a channel is not the network with that channel at zero, unless the norm
            goes on counting the zeros.
    """

    name: str
    size: int
    members: tuple[GroupMember, ...]
    reason: str | None
    normalized_by: tuple[str, ...]

    @property
    def is_removable(self) -> bool:
        """Whether units can be removed."""
        return self.reason is None

    def indices(self, units: Collection[int]) -> dict[tuple[str, int], list[int]]:
        """By (parameter or buffer, dimension), the indices that go with these units, ascending."""
        return {(member.name, member.dim): member.of(units) for member in self.members}

    def filters(self) -> tuple[GroupMember, ...]:
        """The weights, and their biases, whose filters make these channels or pass them on."""
        return tuple(member for member in self.members if member.role in ("output", "through"))


@dataclass(frozen=True, slots=True)
class WorkShare:
    """The multiply-accumulates of one call, and the units that they are in proportion to.

    Attributes:
        name: of the weight; of a product without one, where it stands.
        macs: of the dense network, for the batch that it was traced with.
        factors: each a dimension of the work: by index the (group, unit) that it is of, None of
            what stays. Removed indices take their share, each factor for itself.
    """

    name: str
    macs: int
    factors: tuple[tuple[tuple[str, int] | None, ...], ...]

    def without(self, removed: Mapping[str, Collection[int]]) -> int:
        """The multiply-accumulates when units are removed, by group."""
        gone = {name: frozenset(units) for name, units in removed.items()}
        kept = [
            sum(unit is None or unit[1] not in gone.get(unit[0], ()) for unit in factor)
            for factor in self.factors
        ]
        return self.macs * prod(kept) // prod(len(factor) for factor in self.factors)


@dataclass(frozen=True, slots=True)
class ChannelGroups:
    """All channels of a network.

    Attributes:
        groups: in the order of execution of their first member.
        work: of convolutions, linear layers and products of activations, in the order of execution.
    """

    groups: tuple[ChannelGroup, ...]
    work: tuple[WorkShare, ...]

    def __iter__(self) -> Iterator[ChannelGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, name: str) -> ChannelGroup:
        """The group of that name.

        Raises:
            UnknownNameError: there is none.
        """
        by_name = {group.name: group for group in self.groups}
        if name not in by_name:
            raise UnknownNameError(f"no channel group '{name}'{did_you_mean(name, by_name)}", name)
        return by_name[name]

    def removable(self) -> tuple[ChannelGroup, ...]:
        """The groups whose units can be removed."""
        return tuple(group for group in self.groups if group.is_removable)

    def of(self, name: str, dim: int) -> tuple[ChannelGroup, ...]:
        """The groups that have a share of a parameter's or buffer's dimension."""
        return tuple(
            group
            for group in self.groups
            if any(member.name == name and member.dim == dim for member in group.members)
        )

    def macs(self, removed: Mapping[str, Collection[int]] | None = None) -> int:
        """Multiply-accumulates of the network without the removed units; counted as in `distiller.macs`.

        Args:
            removed: by group the units that are removed; None: the dense network.

        Raises:
            UnknownNameError: no such group.
            UsageError: no such unit, or a group that cannot be removed from.
        """
        for name, units in (removed or {}).items():
            group = self[name]
            if units and group.reason is not None:
                raise UsageError(f"channel group '{name}': no unit can be removed, {group.reason}")
            if units and not 0 <= min(units) <= max(units) < group.size:
                raise UsageError(
                    f"channel group '{name}': units are 0..{group.size - 1}, got {sorted(units)}"
                )
        return sum(share.without(removed or {}) for share in self.work)
