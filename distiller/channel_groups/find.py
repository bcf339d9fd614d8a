"""From the ids of a network's tensors to its channel groups.

Knows nothing about operations.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distiller.channel_groups.analysis import follow_channels
from distiller.channel_groups.groups import ChannelGroup, ChannelGroups, GroupMember, WorkShare
from distiller.channel_groups.ids import Solution, varying_dims
from distiller.channel_groups.network_ids import NetworkIds
from distiller.names import unwrap

_REMEDY = (
    "use an input the model accepts and control flow that does not depend on the values of tensors, "
    "or do without what needs the groups"
)
_Vectors = dict[tuple[str, int], Tensor]


def find_channel_groups(
    model: nn.Module, dummy_input: Any, purpose: str = "its channel groups", remedy: str = _REMEDY
) -> ChannelGroups:
    """Which channels of a network stand or fall together.

    The channels of every layer's outputs are followed through the operations of the exported graph,
    functional ones included: those that meet element by element belong together, and those that a
    layer reads belong to the ones that made them. The model is traced as in evaluation, and stays
    as it was.

    Args:
        model: the model, or a wrapper (DataParallel, DDP, torch.compile) around it.
        dummy_input: a tensor, or a tuple of the model's positional arguments, on any device; the
            groups do not depend on its values.
        purpose: what the groups are for, named in the error.
        remedy: how to go without, named in the error.

    Raises:
        GraphTraceError: `torch.export` cannot trace the model.
    """
    net = follow_channels(unwrap(model), dummy_input, purpose, remedy)
    solution = net.space.solve()
    vectors = _unit_vectors(net, solution)
    _fix_what_is_all_of_a_tensor(vectors, net, solution)
    groups, place = _groups(vectors, net, solution)
    work = tuple(
        WorkShare(
            share.name,
            share.macs,
            tuple(tuple(place.get(unit) for unit in solution.unit_of[f].tolist()) for f in share.factors),
        )
        for share in net.work
    )
    return ChannelGroups(groups, work)


def _unit_vectors(net: NetworkIds, solution: Solution) -> _Vectors:
    """The unit of each index along the dimensions of parameters and buffers."""
    layers = {name for name, _ in net.vectors}
    vectors = {key: solution.unit_of[ids] for key, ids in net.vectors.items()}
    for name, ids in net.elements.items():
        units = solution.unit_of[ids]
        varying = varying_dims(units)
        if name in layers:
            reason = f"{name} is both a layer's weight and an operand"
            solution.reasons.update(dict.fromkeys(units.unique().tolist(), reason))
            continue
        assert len(varying) <= 1  # of an operand only slices can be cut
        dim = varying[0] if varying else max(range(units.dim()), key=lambda d: units.shape[d])
        for other in range(units.dim()):
            if other != dim:
                units = units.narrow(other, 0, 1)
        vectors[name, dim] = units.reshape(-1)
        net.roles[name, dim] = "channel"
    return vectors


def _fix_what_is_all_of_a_tensor(vectors: _Vectors, net: NetworkIds, solution: Solution) -> None:
    """A unit without which a tensor would be empty stays; so does one that no layer makes."""
    made: set[int] = set()
    for (name, dim), units in vectors.items():
        present = units.unique().tolist()
        if len(present) == 1:
            solution.reasons.setdefault(present[0], f"it is all that {name} has along dimension {dim}")
        if net.roles[name, dim] in ("output", "through"):
            made.update(present)
    for units in vectors.values():
        for unit in set(units.unique().tolist()) - made:
            solution.reasons.setdefault(unit, "no layer makes it")


def _groups(
    vectors: _Vectors, net: NetworkIds, solution: Solution
) -> tuple[tuple[ChannelGroup, ...], dict[int, tuple[str, int]]]:
    """The groups, and where in them each removable unit is."""
    tensors: dict[int, list[tuple[str, int]]] = {}
    indices: dict[tuple[str, int], dict[int, list[int]]] = {}
    for key, units in vectors.items():
        places: dict[int, list[int]] = {}
        for index, unit in enumerate(units.tolist()):
            places.setdefault(unit, []).append(index)
        indices[key] = places
        for unit in places:
            tensors.setdefault(unit, []).append(key)
    alike: dict[Any, list[int]] = {}
    for unit, keys in tensors.items():
        signature = (tuple(keys), solution.reasons.get(unit), solution.notes.get(unit, ()))
        alike.setdefault(signature, []).append(unit)
    groups, place, taken = [], {}, {}
    for (keys, reason, notes), units in alike.items():
        members = tuple(
            GroupMember(name, dim, net.roles[name, dim], tuple(tuple(indices[name, dim][u]) for u in units))
            for name, dim in keys
        )
        maker = next((member.name for member in members if member.role in ("output", "through")), None)
        label = maker or f"{members[0].name}:{members[0].dim}"
        taken[label] = taken.get(label, 0) + 1
        name = label if taken[label] == 1 else f"{label}#{taken[label]}"
        groups.append(ChannelGroup(name, len(units), members, reason, notes))
        if reason is None:
            place.update({unit: (name, i) for i, unit in enumerate(units)})
    return tuple(groups), place
