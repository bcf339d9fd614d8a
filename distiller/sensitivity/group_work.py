"""What a network has of something as a cost of the units that stay in its channel groups.

The multiply-accumulates of a layer, or the elements of its weight, are a number times the units of what it
reads times those of what it makes: sums of products of two.
Knows nothing about levels, nor about how they are chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

from distiller.channel_groups import ChannelGroups, WorkShare
from distiller.quantization.search.width_choice import WidthCost, WidthProduct

__all__ = ["cost_of_units", "with_elements_as_work"]

_Terms = Counter[tuple[str, ...]]
"""A polynomial: by the groups that are multiplied, the factor."""


def cost_of_units(groups: ChannelGroups, names: Collection[str]) -> WidthCost[str] | None:
    """What `ChannelGroups.macs` counts, by the units of some groups that stay; all of the others stay.

    Args:
        groups: of the model.
        names: of those groups.

    Returns:
        The cost, whose widths are numbers of units; None where it is no sum of products of two (attention,
        say, multiplies three), or where the units of a group are not worth the same.
    """
    sizes = {group.name: group.size for group in groups if group.name in names}
    total: _Terms = Counter()
    for share in groups.work:
        terms = _terms(share, sizes)
        if terms is None:
            return None
        total.update(terms)
    if any(len(term) > 2 for term in total):
        return None
    products: list[WidthProduct[str]] = []
    for term, factor in total.items():
        if term:
            first, second = term if len(term) == 2 else (1, *term)
            products.append(WidthProduct(factor, first, second))
    return WidthCost(products=products, fixed=total[()])


def with_elements_as_work(
    groups: ChannelGroups, shapes: Mapping[str, Sequence[int]], weights: Iterable[str]
) -> ChannelGroups:
    """The same groups, with the elements of some weights as their work: that is what `macs` counts then.

    A unit that is gone takes its filters, and its channels in what reads them: an element that is both is
    gone once.

    Args:
        groups: of the model.
        shapes: of the model's parameters, by name.
        weights: whose elements are counted.
    """
    places: dict[tuple[str, int], dict[int, tuple[str, int]]] = {}
    for group in groups:
        for member in group.members:
            own = places.setdefault((member.name, member.dim), {})
            for unit, indices in enumerate(member.indices):
                own.update(dict.fromkeys(indices, (group.name, unit)))
    work = []
    for name in weights:
        factors = tuple(
            tuple(places.get((name, dim), {}).get(index) for index in range(size))
            for dim, size in enumerate(shapes[name])
        )
        work.append(WorkShare(name, prod(shapes[name]), factors))
    return replace(groups, work=tuple(work))


def _terms(share: WorkShare, sizes: dict[str, int]) -> _Terms | None:
    """Of one layer."""
    unit, rest = divmod(share.macs, prod(len(factor) for factor in share.factors))
    if rest:
        return None
    terms: _Terms = Counter({(): unit})
    for factor in share.factors:
        linear = _linear(factor, sizes)
        if linear is None:
            return None
        product: _Terms = Counter()
        for term, value in terms.items():
            for name, per_unit in linear.items():
                product[tuple(sorted((*term, *name)))] += value * per_unit
        terms = product
    return terms


def _linear(factor: Sequence[tuple[str, int] | None], sizes: dict[str, int]) -> _Terms | None:
    """How many indices stay, by the units that stay: a number, and of each group how many a unit has."""
    counted = Counter(index if index is not None and index[0] in sizes else None for index in factor)
    linear: _Terms = Counter()
    for name, size in sizes.items():
        of_units = {counted[name, unit] for unit in range(size)}
        if len(of_units) > 1:
            return None
        if per_unit := of_units.pop():
            linear[(name,)] = per_unit
    if counted[None]:
        linear[()] = counted[None]
    return linear
