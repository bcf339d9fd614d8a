"""Zero filters and zero channels: which units of channel groups may go because their weights are zero.

    filters     a unit goes when its filters are zero in every layer that makes it
    channels    a unit goes when its channel is zero in every layer that reads it

Weights that are zero and cannot go are told, with what keeps them. Biases and the shifts of norms do not
count for the choice, as in Distiller: what of them is not zero is told as left over.
Knows nothing about how a unit is removed, nor about masks: masked weights are zero.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from distiller.channel_groups import ChannelGroup, ChannelGroups, GroupMember
from distiller.names import named_modules, named_parameters, owner

ZeroKind = Literal["filters", "channels"]

_FIRST = 8
_NAMES = 4
_NOT_ADDED = ("weight", "running_var", "num_batches_tracked")


@dataclass(frozen=True, slots=True)
class KeptZeros:
    """Filters or channels of one weight that are zero, and stay.

    Attributes:
        name: of the weight, canonical.
        kind: which of them.
        indices: of the zero ones, ascending.
        coupled: by name of a weight that would have to be zero as well, its filters or channels that are
            not; of the same weight too, where several go together.
        reason: in words, where it is not for coupled weights.
    """

    name: str
    kind: ZeroKind
    indices: tuple[int, ...]
    coupled: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    reason: str = ""

    def __str__(self) -> str:
        one = len(self.indices) == 1
        noun, verb = (self.kind.removesuffix("s"), "stays") if one else (self.kind, "stay")
        told = f"{self.name}: {len(self.indices)} zero {noun} {verb} ({_first(self.indices)})"
        if not self.coupled:
            return f"{told}: {self.reason}"
        others = [
            f"{name} ({len(indices)} not zero: {_first(indices)})" for name, indices in self.coupled.items()
        ]
        more = f" and {len(others) - _NAMES} more" if len(others) > _NAMES else ""
        return f"{told}, coupled with {', '.join(others[:_NAMES])}{more}"


@dataclass(frozen=True, slots=True)
class ZeroUnits:
    """What of a network may go for its zeros.

    Attributes:
        removed: by channel group, the units that go; groups without any are left out.
        kept: what is zero and cannot go.
        leftovers: of the removed units: names of biases, shifts and running means that are not zero, and
            of whatever else may be added to them; of channels that nothing reads, the layer norms that
            take statistics over them. With them a network answers otherwise than the same without the units.
    """

    removed: Mapping[str, tuple[int, ...]]
    kept: tuple[KeptZeros, ...]
    leftovers: tuple[str, ...]


def find_zero_units(state: Mapping[str, Tensor], groups: ChannelGroups, kind: ZeroKind) -> ZeroUnits:
    """Which units go because of zeros in the weights.

    Filters of a layer that makes a unit's channels of the unit's own (a depthwise convolution) do not
    count: of a unit that is zero they make nothing else. Of each group at least one unit stays.

    Args:
        state: the network's parameters and buffers by canonical name; masked weights are zero.
        groups: of the network.
        kind: what is zero: "filters" or "channels".
    """
    removed: dict[str, tuple[int, ...]] = {}
    kept: list[KeptZeros] = []
    leftovers: dict[str, None] = {}
    for group in groups:
        weights = [member for member in group.members if state[member.name].dim() >= 2]
        deciding = [m for m in weights if m.role == ("output" if kind == "filters" else "input")]
        passing = [m for m in weights if m.role == "through"] if kind == "filters" else []
        if not deciding and not passing:
            continue
        found = [_Zeros(m, _zero_indices(state[m.name], m.dim)) for m in (*deciding, *passing)]
        makers = found[: len(deciding)]
        units = [u for u in range(group.size) if makers and all(z.has_all_of(u) for z in makers)]
        last = units[:1] if group.is_removable and len(units) == group.size else []
        going = units[len(last) :] if group.is_removable else []
        if going:
            removed[group.name] = tuple(going)
            leftovers.update(dict.fromkeys(_left_over(state, group, going, kind)))
        for zeros in makers if last else ():
            reason = "all of its group are zero, and one has to stay"
            kept.append(KeptZeros(zeros.member.name, kind, tuple(zeros.member.of(last)), reason=reason))
        staying = set(range(group.size)).difference(going, last)
        kept += [told for zeros in found if (told := _kept(group, zeros, kind, makers, staying)) is not None]
    return ZeroUnits(removed, tuple(kept), tuple(leftovers))


@dataclass(frozen=True, slots=True)
class _Zeros:
    """The indices of a member at which all of its weight is zero."""

    member: GroupMember
    indices: frozenset[int]

    def has_all_of(self, unit: int) -> bool:
        return self.indices.issuperset(self.member.indices[unit])

    def has_any_of(self, unit: int) -> bool:
        return not self.indices.isdisjoint(self.member.indices[unit])


def computed_zeros(model: nn.Module, kind: ZeroKind) -> tuple[KeptZeros, ...]:
    """Zero filters or channels of weights that are made of several tensors, as by weight norm: they stay.

    Args:
        model: the network.
        kind: what is zero: "filters" or "channels".
    """
    known = dict(named_parameters(model))
    found = []
    for name, module in named_modules(model):
        for tensor_name in getattr(module, "parametrizations", {}):
            full, tensor = f"{name}.{tensor_name}", getattr(module, tensor_name).detach()
            if full in known or tensor.dim() < 2:
                continue
            indices = _zero_indices(tensor, int(kind == "channels"))
            if indices:
                reason = "a parametrization makes it of other tensors; take that off first"
                found.append(KeptZeros(full, kind, tuple(sorted(indices)), reason=reason))
    return tuple(found)


def _zero_indices(weight: Tensor, dim: int) -> frozenset[int]:
    flat = weight.detach().transpose(0, dim).flatten(1)
    return frozenset((flat == 0).all(1).nonzero().flatten().tolist())


def _kept(
    group: ChannelGroup, zeros: _Zeros, kind: ZeroKind, deciding: Sequence[_Zeros], staying: Collection[int]
) -> KeptZeros | None:
    """What of one weight is zero in units that stay, and why it does; None: nothing."""
    units = [unit for unit in staying if zeros.has_any_of(unit)]
    if not units:
        return None
    coupled: dict[str, tuple[int, ...]] = {}
    for other in deciding if group.is_removable else ():
        nonzero = tuple(index for index in other.member.of(units) if index not in other.indices)
        if nonzero:
            coupled[other.member.name] = nonzero
    indices = tuple(index for index in zeros.member.of(units) if index in zeros.indices)
    reason = "" if coupled else group.reason or "its channels are made of others, which have no filters"
    return KeptZeros(zeros.member.name, kind, indices, coupled, reason)


def _left_over(
    state: Mapping[str, Tensor], group: ChannelGroup, units: Sequence[int], kind: ZeroKind
) -> list[str]:
    """Names of what makes units whose weights are zero something else than zero."""
    if kind == "channels":
        return list(group.normalized_by)
    return [m.name for m in group.members if _is_left_over(state, m, m.of(units))]


def _is_left_over(state: Mapping[str, Tensor], member: GroupMember, indices: Sequence[int]) -> bool:
    tensor, attribute = state[member.name], member.name.rpartition(".")[2]
    is_bias = member.role in ("output", "through") and tensor.dim() < 2
    if not is_bias and (member.role != "channel" or attribute in _NOT_ADDED):
        return False
    values = tensor.detach().transpose(0, member.dim)[list(indices)]
    scale = state.get(f"{owner(member.name)}.weight")
    if attribute == "running_mean" and scale is not None:
        values = values * scale.detach()[list(indices)]
    return bool((values != 0).any())


def _first(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices[:_FIRST])) + (", ..." if len(indices) > _FIRST else "")
