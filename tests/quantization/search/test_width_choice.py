from __future__ import annotations

import itertools
import math
import random

import pytest

from distiller.errors import QuantizationError
from distiller.quantization.search.width_choice import (
    WidthCost,
    WidthProduct,
    cheapest_widths,
    check_budget,
    choose_widths,
)

WIDTHS = (2, 4, 8)


def best_by_enumeration(sensitivities, cost, budget):
    things = list(sensitivities)
    choices = [
        dict(zip(things, widths, strict=True)) for widths in itertools.product(*sensitivities.values())
    ]
    within = [choice for choice in choices if cost.of(choice) <= budget]
    return min(total(sensitivities, choice) for choice in within)


def total(sensitivities, widths):
    return sum(sensitivities[thing][width] for thing, width in widths.items())


def random_sensitivities(rng, things):
    return {thing: {width: rng.gauss(0, 1) / width for width in WIDTHS} for thing in things}


@pytest.mark.parametrize("seed", range(8))
def test_sizes_within_a_budget_are_chosen_as_by_enumeration(seed):
    rng = random.Random(seed)
    sensitivities = random_sensitivities(rng, "abcde")
    numel = {thing: rng.randint(1, 3000) for thing in "abcde"}
    cost = WidthCost(
        {t: {w: -(-n * w // 8) for w in WIDTHS} for t, n in numel.items()}, fixed=rng.randint(0, 99)
    )
    smallest = cost.of(dict.fromkeys("abcde", 2))
    for factor in (1, 1.3, 2, 3.1, 10):
        budget = smallest * factor
        found = choose_widths(sensitivities, cost, budget)
        assert cost.of(found) <= budget
        assert total(sensitivities, found) == pytest.approx(
            best_by_enumeration(sensitivities, cost, budget), abs=1e-12
        )


@pytest.mark.parametrize("seed", range(8))
def test_products_of_two_chosen_widths_are_chosen_as_by_enumeration(seed):
    rng = random.Random(seed)
    weights, acts = ("w1", "w2", "w3"), ("a1", "a2")
    sensitivities = random_sensitivities(rng, (*weights, *acts))
    products = [WidthProduct(rng.randint(1, 10**9), w, rng.choice(acts)) for w in weights]
    products.append(WidthProduct(rng.randint(1, 10**9), "w1", 8))  # what it reads has a width that is given
    products.append(WidthProduct(rng.randint(1, 10**9), "a1", "a2"))  # activations by activations
    products.append(WidthProduct(rng.randint(1, 10**9), "a1", "a1"))
    products.append(WidthProduct(rng.randint(1, 10**6), 32, 32))
    cost = WidthCost(products=products)
    smallest = cost.of(dict.fromkeys(sensitivities, 2))
    for factor in (1, 1.5, 3, 6, 20):
        found = choose_widths(sensitivities, cost, smallest * factor)
        assert cost.of(found) <= smallest * factor
        assert total(sensitivities, found) == pytest.approx(
            best_by_enumeration(sensitivities, cost, smallest * factor), abs=1e-12
        )


def test_a_cost_is_the_sum_of_its_parts():
    cost = WidthCost({"a": {2: 10, 4: 20}}, [WidthProduct(3, "a", 8), WidthProduct(5, "a", "b")], fixed=7)
    assert cost.of({"a": 4, "b": 2}) == 7 + 20 + 3 * 4 * 8 + 5 * 4 * 2


def test_a_budget_that_is_met_exactly_is_kept_and_one_less_is_not():
    """One unit in 10^12 is far below the solver's tolerance."""
    cost = WidthCost({"a": {2: 10**12, 4: 2 * 10**12}, "b": {2: 10**12, 4: 2 * 10**12 + 1}})
    sensitivities = {"a": {2: 1.0, 4: 0.5}, "b": {2: 1.0, 4: 0.0}}
    assert choose_widths(sensitivities, cost, 3 * 10**12 + 1) == {"a": 2, "b": 4}
    assert choose_widths(sensitivities, cost, 3 * 10**12) == {"a": 4, "b": 2}


def test_small_differences_of_sensitivity_count_beside_large_ones():
    sensitivities = {"a": {2: 1e3, 4: 0.0}, "b": {2: 2e-6, 4: 1e-6}}
    cost = WidthCost({"a": {2: 1, 4: 2}, "b": {2: 1, 4: 2}})
    assert choose_widths(sensitivities, cost, 4) == {"a": 4, "b": 4}


def test_the_cheapest_widths_are_not_taken_for_their_own_sake():
    assert choose_widths({"a": {2: 0.5, 8: 0.1}}, WidthCost({"a": {2: 1, 8: 4}}), 100) == {"a": 8}


def test_equal_sensitivities_are_no_trouble():
    assert choose_widths({"a": {4: 0.0}, "b": {4: 0.0}}, WidthCost(), 1) == {"a": 4, "b": 4}


def test_widths_without_a_finite_sensitivity_are_not_chosen():
    sensitivities = {"a": {2: math.nan, 4: 3.0, 8: math.inf}}
    assert choose_widths(sensitivities, WidthCost({"a": {2: 1, 4: 2, 8: 4}}), 4) == {"a": 4}


def test_a_thing_that_is_finite_nowhere_is_named():
    with pytest.raises(QuantizationError, match="^sensitivities: none of a is finite$"):
        choose_widths({"a": {2: math.nan}}, WidthCost({"a": {2: 1}}), 4)


def test_a_budget_out_of_reach_names_the_smallest():
    cost = WidthCost({"a": {2: 10, 4: 20}}, fixed=5)
    with pytest.raises(QuantizationError) as caught:
        check_budget({"a": (2, 4)}, cost, 14)
    assert str(caught.value) == (
        "budget: 14 cannot be reached, the smallest widths cost 15; "
        "give at least that, or smaller widths to choose from"
    )
    check_budget({"a": (2, 4)}, cost, 15)
    with pytest.raises(QuantizationError, match="the smallest widths cost 25"):
        choose_widths({"a": {2: math.nan, 4: 0.0}}, cost, 20)


@pytest.mark.parametrize("seed", range(8))
def test_the_cheapest_widths_are_those_of_enumeration(seed):
    rng = random.Random(seed)
    sensitivities = {thing: {width: rng.randint(0, 50) for width in WIDTHS} for thing in "abcd"}
    products = [WidthProduct(rng.randint(1, 1000), "a", "b"), WidthProduct(rng.randint(1, 1000), "b", "c")]
    cost = WidthCost({"d": {2: 100, 4: 900, 8: 1500}}, [*products, WidthProduct(7, "c", 8)], fixed=5)
    choices = [dict(zip("abcd", widths, strict=True)) for widths in itertools.product(WIDTHS, repeat=4)]
    ties = {thing: {width: rng.random() / 4 for width in WIDTHS} for thing in "abcd"}
    least = min(total(sensitivities, choice) for choice in choices)
    for limit in (least, least + 1, least + 20, least + 60, 200):
        found = cheapest_widths(sensitivities, cost, limit, ties)
        assert total(sensitivities, found) <= limit
        within = [choice for choice in choices if total(sensitivities, choice) <= limit]
        assert cost.of(found) == min(cost.of(choice) for choice in within)


def test_of_equal_costs_ties_decide():
    cost = WidthCost({thing: {2: 1, 4: 2} for thing in "ab"})
    sensitivities = {thing: {2: 1.0, 4: 0.0} for thing in "ab"}
    for first, second in (("a", "b"), ("b", "a")):
        ties = {first: {2: 0.0, 4: 0.0}, second: {2: 0.5, 4: 0.0}}
        assert cheapest_widths(sensitivities, cost, 1.0, ties) == {first: 2, second: 4}


def test_a_limit_of_sensitivities_that_cannot_be_kept_is_refused():
    with pytest.raises(QuantizationError) as error:
        cheapest_widths({"a": {2: 3.0, 4: 1.5}}, WidthCost({"a": {2: 1, 4: 2}}), 1, {"a": {2: 0, 4: 0}})
    assert str(error.value) == (
        "limit: 1 cannot be kept, the least sum of sensitivities is 1.5; give at least that"
    )
