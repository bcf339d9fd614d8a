"""What a schedule can prune of a model that was swept, and how much of it goes at each level.

    element, channel, n:m, weight-bits, rank   each weight by itself
    filter, group                              the filters of all weights that make the same channels: they
                                               go with the biases, norms and readers (`distiller.thinning`)

Knows nothing about curves, nor about how levels are chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from distiller.channel_groups import ChannelGroup, ChannelGroups
from distiller.errors import SensitivityError, UsageError
from distiller.factorization.forms import LayerShape
from distiller.factorization.ranks import rank_without
from distiller.macs import count_macs
from distiller.names import named_modules, named_parameters, owner
from distiller.pruning.criteria import snap
from distiller.pruning.n_to_m import n_to_m_sparsity
from distiller.pruning.ranking import number_to_prune
from distiller.sensitivity.group_work import with_elements_as_work

__all__ = ["Amount", "Prunable", "coupled_prunables", "macs_by_weight", "removed_work", "single_prunables"]

DENSE_BITS = 32
_NOISE = 1e-4
_QAT_BITS = range(2, 17)


@dataclass(frozen=True, slots=True)
class Amount:
    """What a level takes away.

    Attributes:
        elements: that become zero; of bits, how many bits fewer are stored; of a rank, how many elements
            fewer the factors have.
        macs: multiply-accumulates, of this alone.
        units: filters, channels or ranks; 0 where there are none.
    """

    elements: int
    macs: int
    units: int = 0


@dataclass(frozen=True, slots=True)
class Prunable:
    """What has a level of its own.

    Attributes:
        name: of the group, or the weight.
        weights: what is pruned; of a group, those whose filters go together.
        curves: the parameters of the sweep whose drops it costs.
        elements: of the weights.
        amounts: by level that takes something away, the weakest first.
        size: units there are; 0 where there are none.
    """

    name: str
    weights: tuple[str, ...]
    curves: tuple[str, ...]
    elements: int
    amounts: Mapping[float, Amount]
    size: int = 0


def single_prunables(
    axis: str,
    shapes: Mapping[str, Sequence[int]],
    macs: Mapping[str, int],
    levels: Iterable[float],
    block: int,
) -> tuple[Prunable, ...]:
    """Each weight by itself.

    Args:
        axis: `element`, `channel`, `n:m`, `weight-bits` or `rank`.
        shapes: of the swept weights, by name.
        macs: of weights, by name (`macs_by_weight`); those that are missing have none.
        levels: that were swept.
        block: M of N:M.

    Raises:
        UsageError: no schedule is made of this axis.
    """
    counted = _COUNTS.get(axis)
    if counted is None:
        raise UsageError(
            f"axis '{axis}': no schedule is made of it, only of {', '.join([*_COUNTS, 'filter', 'group'])}"
        )
    found = []
    for name, shape in shapes.items():
        elements = math.prod(shape)
        amounts = {}
        for level in _weakest_first(axis, levels):
            gone, units = counted(shape, level, block)
            share_of = DENSE_BITS * elements if axis == "weight-bits" else elements
            if gone:
                amounts[level] = Amount(gone, macs.get(name, 0) * gone // share_of, units)
        size = shape[1] if axis == "channel" else _full_rank(shape) if axis == "rank" else 0
        found.append(Prunable(name, (name,), (name,), elements, amounts, size))
    return tuple(found)


def coupled_prunables(
    axis: str,
    groups: ChannelGroups,
    shapes: Mapping[str, Sequence[int]],
    swept: Sequence[str],
    levels: Iterable[float],
) -> tuple[tuple[Prunable, ...], dict[str, str], ChannelGroups]:
    """The channel groups that were swept, whole or by the weights that make them.

    Args:
        axis: `filter` (the sweep is of weights) or `group` (it is of groups).
        groups: of the model.
        shapes: of the model's parameters, by name.
        swept: the parameters of the sweep.
        levels: that were swept.

    Returns:
        What can be pruned; why the rest of what was swept stays whole, by name; and the groups with what
        elements are counted of as their work: the weights that were swept, or that make groups that were.

    Raises:
        SensitivityError: a group that the model does not have.
    """
    by_name = {group.name: group for group in groups}
    chosen: list[tuple[ChannelGroup, tuple[str, ...], tuple[str, ...]]] = []
    reasons: dict[str, str] = {}
    if axis == "group" and (unknown := [name for name in swept if name not in by_name]):
        raise SensitivityError(
            f"sweep: the model has no channel group '{unknown[0]}'; it is of another model"
        )
    for group in groups:
        makers = _makers(group, shapes)
        curves = (group.name,) if axis == "group" else tuple(name for name in makers if name in swept)
        if not set(curves).intersection(swept):
            continue
        reason = _hindrance(axis, group, makers, shapes)
        if reason is None:
            makers, reason = _own_first(group, makers, groups)
        if reason is None and axis == "filter" and (others := [name for name in makers if name not in swept]):
            reason = f"{others[0]} goes with it and was not swept"
        if reason is not None:
            reasons.update(dict.fromkeys(curves, reason))
            continue
        chosen.append((group, makers, curves))
    made = dict.fromkeys(name for _, makers, _ in chosen for name in makers)
    elements = with_elements_as_work(groups, shapes, swept if axis == "filter" else made)
    found = []
    for group, makers, curves in chosen:
        amounts = {}
        for level in _weakest_first(axis, levels):
            units = number_to_prune(level, group.size)
            if 0 < units < group.size:
                gone = {group.name: range(units)}
                amounts[level] = Amount(
                    elements.macs() - elements.macs(gone), groups.macs() - groups.macs(gone), units
                )
        size = sum(math.prod(shapes[name]) for name in makers)
        found.append(Prunable(group.name, makers, curves, size, amounts, group.size))
    taken = {name for prunable in found for name in prunable.curves}
    for name in swept:
        if name not in taken:
            reasons.setdefault(name, "its filters follow those of other layers")
    return tuple(found), {name: why for name, why in reasons.items() if name not in taken}, elements


def removed_work(groups: ChannelGroups, prunables: Iterable[Prunable], levels: Mapping[str, float]) -> int:
    """The work that goes when groups lose their share of units, all together.

    Args:
        groups: of the model, with multiply-accumulates or something else as their work.
        prunables: of these groups.
        levels: by name; of those that are left out, or at a level that takes nothing, nothing goes.
    """
    removed = {
        own.name: range(own.amounts[levels[own.name]].units)
        for own in prunables
        if levels.get(own.name) in own.amounts
    }
    return groups.macs() - groups.macs(removed)


def macs_by_weight(model: nn.Module, dummy_input: Any) -> tuple[dict[str, int], int]:
    """The multiply-accumulates of each weight, and of the whole model.

    Those of a layer that has several weights are shared out by their elements; a weight that several layers
    have does the work of all of them.

    Args:
        model: any model.
        dummy_input: as for `count_macs`.
    """
    costs = {cost.name: cost.macs for cost in count_macs(model, dummy_input)}
    names = {id(param): name for name, param in named_parameters(model) if param.dim() >= 2}
    read: dict[str, list[nn.Parameter]] = {}
    for module_name, module in named_modules(model):
        layer = module_name
        while layer and layer not in costs:
            layer = owner(layer)
        if layer in costs:
            read.setdefault(layer, []).extend(param for param in _own(module) if id(param) in names)
    found: dict[str, int] = {}
    for layer, params in read.items():
        elements = sum(param.numel() for param in params)
        for param in params:
            name = names[id(param)]
            found[name] = found.get(name, 0) + costs[layer] * param.numel() // elements
    return found, sum(costs.values())


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    """Its parameters, not those of submodules; of what is parametrized, what it is made of."""
    yield from module.parameters(recurse=False)
    if is_parametrized(module):
        yield from module.get_submodule("parametrizations").parameters()


def _elements(shape: Sequence[int], level: float, block: int) -> tuple[int, int]:
    return (int(snap(level * math.prod(shape))) if level < 1 else 0), 0


def _channels(shape: Sequence[int], level: float, block: int) -> tuple[int, int]:
    units = number_to_prune(level, shape[1]) if level < 1 else 0
    return math.prod(shape) // shape[1] * units, units


def _of_each_m(shape: Sequence[int], level: float, block: int) -> tuple[int, int]:
    n = block - round(level * block)
    if abs(level * block - (block - n)) > _NOISE:
        raise UsageError(
            f"axis 'n:m': level {level:g} is not of blocks of {block}, as the sweep says they are"
        )
    return (round(n_to_m_sparsity(shape[1], n, block) * math.prod(shape)) if 0 < n < block else 0), 0


def _bits(shape: Sequence[int], level: float, block: int) -> tuple[int, int]:
    return (DENSE_BITS - int(level)) * math.prod(shape) if level in _QAT_BITS else 0, 0


def _rank(shape: Sequence[int], level: float, block: int) -> tuple[int, int]:
    whole, full = LayerShape(tuple(shape)), _full_rank(shape)
    rank = rank_without(full, level)
    saved = whole.parameters - whole.factored_parameters(whole.default_form, (rank,))
    return max(0, saved), full - rank


def _full_rank(shape: Sequence[int]) -> int:
    whole = LayerShape(tuple(shape))
    return whole.most(whole.default_form)[0]


_COUNTS: dict[str, Callable[[Sequence[int], float, int], tuple[int, int]]] = {
    "element": _elements,
    "channel": _channels,
    "n:m": _of_each_m,
    "weight-bits": _bits,
    "rank": _rank,
}
"""(shape, level, M) -> elements that become zero (bits, parameters that are saved), and channels or ranks."""


def _weakest_first(axis: str, levels: Iterable[float]) -> list[float]:
    return sorted(set(levels), reverse=axis == "weight-bits")


def _makers(group: ChannelGroup, shapes: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """The weights whose filters have to be zero for a unit to go."""
    return tuple(
        member.name for member in group.members if member.role == "output" and len(shapes[member.name]) >= 2
    )


def _own_first(
    group: ChannelGroup, makers: Sequence[str], groups: Iterable[ChannelGroup]
) -> tuple[tuple[str, ...], str | None]:
    """The weights of a group, those first that no other has which can be pruned; or why there are none.

    A schedule says by the name of a weight what is pruned, and a layer can make units of several groups.
    """
    shared: dict[str, str] = {}
    for other in groups:
        if other is not group and other.reason is None:
            shared.update({member.name: other.name for member in other.members if member.role != "input"})
    own = [name for name in makers if name not in shared]
    if not own:
        others = ", ".join(f"'{other}'" for other in dict.fromkeys(shared[name] for name in makers))
        return tuple(makers), f"all layers that make its units make those of groups {others} too"
    return (*own, *(name for name in makers if name in shared)), None


def _hindrance(
    axis: str, group: ChannelGroup, makers: Sequence[str], shapes: Mapping[str, Sequence[int]]
) -> str | None:
    """Why levels of an axis say nothing of a group's units; None: they do."""
    if group.reason is not None:
        return group.reason
    if not makers:
        return "no weight makes its channels"
    one_each = tuple((unit,) for unit in range(group.size))
    for member in group.members:
        if axis == "group" or member.role != "output" or member.name not in makers:
            continue
        if member.dim != 0 or member.indices != one_each or shapes[member.name][0] != group.size:
            return f"its units are not the filters of {member.name} one by one"
    return None
