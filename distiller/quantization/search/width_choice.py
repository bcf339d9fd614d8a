"""A width for each of several things: the sum of their sensitivities least, their cost within a budget.

    minimise     sum_i s_i(b_i)
    subject to   fixed + sum_i size_i(b_i) + sum_k factor_k * b_i(k) * b_j(k) <= budget

Or the other way round: the cost least, the sum of the sensitivities within a limit. Either is
minimised exactly, by integer programming: a binary variable for each thing and width, and for each product
of two widths variables whose sums over either are those of the widths themselves.
Knows nothing about models: a thing is any hashable value but a number.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import coo_array

from distiller.errors import QuantizationError

K = TypeVar("K", bound=Hashable)
_TIE = 1e-6


@dataclass(frozen=True, slots=True)
class WidthProduct(Generic[K]):
    """A cost of `factor` times two widths.

    Attributes:
        factor: as multiply-accumulate operations.
        first: whose width; a number is a width that does not vary.
        second: alike.
    """

    factor: int
    first: K | int
    second: K | int


@dataclass(frozen=True, slots=True)
class WidthCost(Generic[K]):
    """What widths cost.

    Attributes:
        sizes: of a thing at each width.
        products: of two widths.
        fixed: what is to be paid whatever the widths.
    """

    sizes: Mapping[K, Mapping[int, int]] = field(default_factory=dict)
    products: Sequence[WidthProduct[K]] = ()
    fixed: int = 0

    def of(self, widths: Mapping[K, int]) -> int:
        """The cost of a choice."""
        sizes = sum(by_width[widths[thing]] for thing, by_width in self.sizes.items())
        return (
            self.fixed
            + sizes
            + sum(
                product.factor * _width(product.first, widths) * _width(product.second, widths)
                for product in self.products
            )
        )


def choose_widths(
    sensitivities: Mapping[K, Mapping[int, float]], cost: WidthCost[K], budget: float
) -> dict[K, int]:
    """The widths of least total sensitivity that keep within a budget.

    Args:
        sensitivities: by thing and width; widths of infinite sensitivity, or NaN, are not chosen.
        cost: grows with each width.
        budget: the most that the widths may cost.

    Raises:
        QuantizationError: the smallest widths cost more, or a thing has no finite sensitivity.
    """
    finite = _finite(sensitivities)
    check_budget(finite, cost, budget)
    programme = _Programme(finite, cost)
    while True:
        widths = programme.least_sensitivity(budget)
        if cost.of(widths) <= budget:
            return widths
        programme.exclude(widths)  # within the solver's tolerance only


def cheapest_widths(
    sensitivities: Mapping[K, Mapping[int, float]],
    cost: WidthCost[K],
    limit: float,
    ties: Mapping[K, Mapping[int, float]],
) -> dict[K, int]:
    """The widths of least cost whose sensitivities come to no more than a limit.

    Args:
        sensitivities: by thing and width; widths of infinite sensitivity, or NaN, are not chosen.
        cost: of a choice.
        limit: the most that the sensitivities may sum up to.
        ties: by thing and width, what decides between choices of equal cost: the least sum, which is to be
            1 at most. It counts a millionth of the largest cost, so that it can outweigh a difference below.

    Raises:
        QuantizationError: no widths keep within the limit, or a thing has no finite sensitivity.
    """
    finite = _finite(sensitivities)
    least = sum(min(by_width.values()) for by_width in finite.values())
    if not least <= limit:
        raise QuantizationError(
            f"limit: {limit} cannot be kept, the least sum of sensitivities is {least}; give at least that"
        )
    programme = _Programme(finite, cost)
    while True:
        widths = programme.least_cost(limit, ties)
        if sum(finite[thing][width] for thing, width in widths.items()) <= limit:
            return widths
        programme.exclude(widths)  # within the solver's tolerance only


def _finite(sensitivities: Mapping[K, Mapping[int, float]]) -> dict[K, dict[int, float]]:
    finite = {
        thing: {width: value for width, value in by_width.items() if math.isfinite(value)}
        for thing, by_width in sensitivities.items()
    }
    for thing, by_width in finite.items():
        if not by_width:
            raise QuantizationError(f"sensitivities: none of {thing} is finite")
    return finite


def check_budget(things: Mapping[K, Collection[int]], cost: WidthCost[K], budget: float) -> None:
    """Refuse a budget that no widths keep within.

    Args:
        things: by thing, its widths.
        cost: as in `choose_widths`.
        budget: as in `choose_widths`.

    Raises:
        QuantizationError: naming the smallest cost that can be reached.
    """
    smallest = cost.of({thing: min(widths) for thing, widths in things.items()})
    if not smallest <= budget:
        raise QuantizationError(
            f"budget: {budget} cannot be reached, the smallest widths cost {smallest}; "
            "give at least that, or smaller widths to choose from"
        )


class _Programme(Generic[K]):
    """The variables and constraints."""

    def __init__(self, sensitivities: Mapping[K, Mapping[int, float]], cost: WidthCost[K]) -> None:
        self._fixed = cost.fixed
        self._sensitivities: list[float] = []
        self._costs: list[float] = []
        self._rows: list[dict[int, float]] = []
        self._bounds: list[tuple[float, float]] = []
        self._chosen: dict[K, dict[int, int]] = {}
        for thing, by_width in sensitivities.items():
            sizes = cost.sizes.get(thing, {})
            columns = {width: self._variable(s, sizes.get(width, 0)) for width, s in by_width.items()}
            self._chosen[thing] = columns
            self._constrain(dict.fromkeys(columns.values(), 1.0), 1, 1)
        self._binary = len(self._sensitivities)
        for product in cost.products:
            self._add_product(product)

    def least_sensitivity(self, budget: float) -> dict[K, int]:
        """The choice of least sensitivity, within the solver's tolerance of the budget."""
        return self._solve(np.asarray(self._sensitivities), self._costs, budget - self._fixed)

    def least_cost(self, limit: float, ties: Mapping[K, Mapping[int, float]]) -> dict[K, int]:
        """The choice of least cost, within the solver's tolerance of the limit of sensitivities."""
        costs = np.asarray(self._costs)
        largest = max(costs.max(), 1.0)
        for thing, columns in self._chosen.items():
            for width, column in columns.items():
                costs[column] += _TIE * largest * ties[thing][width]
        return self._solve(costs, self._sensitivities, limit)

    def _solve(self, objective: Any, limited: Sequence[float], limit: float) -> dict[K, int]:
        unit = max(1.0, abs(limit))
        rows = [*self._rows, {i: value / unit for i, value in enumerate(limited) if value}]
        bounds = [*self._bounds, (-np.inf, limit / unit)]
        entries = [(value, r, c) for r, row in enumerate(rows) for c, value in row.items()]
        values, at_rows, at_columns = (list(part) for part in zip(*entries, strict=True))
        size = len(objective)
        matrix = coo_array((values, (at_rows, at_columns)), shape=(len(rows), size)).tocsr()
        lower, upper = zip(*bounds, strict=True)
        largest = np.abs(objective).max()
        # The solver takes what is within 1e-6 of the best for the best.
        objective = objective / largest * 1e4 if largest > 0 else objective
        found = milp(
            objective,
            integrality=(np.arange(size) < self._binary).astype(int),
            bounds=(0, 1),
            constraints=LinearConstraint(matrix, np.asarray(lower), np.asarray(upper)),  # type: ignore[arg-type]
            options={"mip_rel_gap": 0.0},
        )
        assert found.x is not None, f"the limit can be kept: {found.message}"
        return {
            thing: max(columns, key=lambda width: found.x[columns[width]])
            for thing, columns in self._chosen.items()
        }

    def exclude(self, widths: Mapping[K, int]) -> None:
        """This choice is not to be made."""
        columns = [self._chosen[thing][width] for thing, width in widths.items()]
        self._constrain(dict.fromkeys(columns, 1.0), -np.inf, len(columns) - 1)

    def _add_product(self, product: WidthProduct[K]) -> None:
        first, second = product.first, product.second
        if isinstance(first, int) and isinstance(second, int):
            self._fixed += product.factor * first * second
        elif isinstance(first, int) or isinstance(second, int):
            known, thing = (first, second) if isinstance(first, int) else (second, first)
            for width, column in self._chosen[thing].items():  # type: ignore[index]
                self._costs[column] += product.factor * known * width  # type: ignore[operator]
        elif first == second:
            for width, column in self._chosen[first].items():
                self._costs[column] += product.factor * width * width
        else:
            rows, columns = self._chosen[first], self._chosen[second]
            both = {(a, b): self._variable(0.0, product.factor * a * b) for a in rows for b in columns}
            for a, column in rows.items():
                self._constrain({column: -1.0, **{both[a, b]: 1.0 for b in columns}}, 0, 0)
            for b, column in columns.items():
                self._constrain({column: -1.0, **{both[a, b]: 1.0 for a in rows}}, 0, 0)

    def _variable(self, sensitivity: float, cost: float) -> int:
        self._sensitivities.append(sensitivity)
        self._costs.append(float(cost))
        return len(self._sensitivities) - 1

    def _constrain(self, row: dict[int, float], lower: float, upper: float) -> None:
        self._rows.append(row)
        self._bounds.append((lower, upper))


def _width(thing: Any, widths: Mapping[Any, int]) -> int:
    return thing if isinstance(thing, int) else widths[thing]
