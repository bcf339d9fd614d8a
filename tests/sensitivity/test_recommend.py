from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.errors import SensitivityError, UsageError
from distiller.quantization.search.width_choice import WidthCost, WidthProduct
from distiller.sensitivity.curves import Score, SensitivityPoint
from distiller.sensitivity.recommend import (
    Goal,
    Harm,
    Option,
    Together,
    monotone_curves,
    recommend,
    removed_alone,
    total_harm,
)


def point(parameter, level, top1, loss=0.0, n=None):
    return SensitivityPoint("element", parameter, level, Score(top1, 100.0, loss), n)


def options(*triples):
    """A dense option, then (level, drop, removed)."""
    return [Option(0.0, Harm(0.0, 0.0), 0), *(Option(lv, Harm(d, d / 10), r) for lv, d, r in triples)]


TWO = {
    "a": options((0.5, 0.2, 50), (0.9, 1.5, 90)),
    "b": options((0.5, 0.1, 500), (0.9, 4.0, 900)),
}


@st.composite
def problems(draw):
    """Up to four things of up to four levels; drops in hundredths of a point."""
    things = {}
    for name in "abcd"[: draw(st.integers(1, 4))]:
        count = draw(st.integers(1, 4))
        rising = st.lists(st.integers(0, 300), min_size=count, max_size=count).map(sorted)
        drops, losses, removed = draw(rising), draw(rising), draw(rising)
        things[name] = [
            Option(0.0, Harm(0.0, 0.0), 0),
            *(Option((i + 1) / 10, Harm(drops[i] / 100, losses[i] / 1000), removed[i]) for i in range(count)),
        ]
    return things


def exact_drop(chosen):
    return sum(Fraction(round(option.harm.drop * 100), 100) for option in chosen)


def all_choices(things):
    return list(itertools.product(*things.values()))


@given(problems(), st.integers(0, 900))
@settings(max_examples=20, deadline=None)
def test_within_a_budget_of_drops_nothing_takes_away_more(things, hundredths):
    feasible = [c for c in all_choices(things) if exact_drop(c) <= Fraction(hundredths, 100)]
    best = max(sum(option.removed for option in choice) for choice in feasible)
    goal = Goal("max_drop", hundredths / 100)
    if best == 0:
        with pytest.raises(UsageError, match="not one level costs so little"):
            recommend(things, goal, 1)
        return
    found = recommend(things, goal, 1)
    assert found.removed == best
    assert found.drop <= hundredths / 100 + 1e-9


@given(problems(), st.integers(1, 100))
@settings(max_examples=20, deadline=None)
def test_no_choice_that_reaches_a_target_costs_less(things, percent):
    total = sum(own[-1].removed for own in things.values()) + 7
    needed = math.ceil(Fraction(percent, 100) * total)
    feasible = [c for c in all_choices(things) if sum(option.removed for option in c) >= needed]
    goal = Goal("target_sparsity", percent / 100)
    if not feasible:
        with pytest.raises(UsageError, match="cannot be reached"):
            recommend(things, goal, total)
        return
    found = recommend(things, goal, total)
    least = min(exact_drop(choice) for choice in feasible)
    assert found.removed >= needed
    assert found.drop == pytest.approx(float(least), abs=1e-9)  # drops differ by 0.01, the ties count 0.0001
    rises = [sum(o.harm.loss for o in c) for c in feasible if exact_drop(c) == least]
    chosen = sum(
        next(o for o in things[name] if o.level == level).harm.loss for name, level in found.levels.items()
    )
    assert chosen == pytest.approx(min(rises), abs=1e-6)


@given(problems(), st.integers(1, 100))
@settings(max_examples=10, deadline=None)
def test_it_is_never_worse_than_going_greedily_for_what_costs_least_per_element(things, percent):
    total = sum(own[-1].removed for own in things.values())
    needed = math.ceil(total * percent / 100)
    at, gone = dict.fromkeys(things, 0), 0
    while gone < needed:
        steps = [
            ((own[at[name] + 1].harm.drop - own[at[name]].harm.drop)
             / max(1, own[at[name] + 1].removed - own[at[name]].removed), name)
            for name, own in things.items() if at[name] + 1 < len(own)
        ]  # fmt: skip
        at[min(steps)[1]] += 1
        gone = sum(things[name][index].removed for name, index in at.items())
    greedy = sum(things[name][index].harm.drop for name, index in at.items())
    if total:
        assert recommend(things, Goal("target_sparsity", percent / 100), total).drop <= greedy + 1e-9


def best_by_hundredths(things, most):
    """By dynamic programming: the most that goes for at most 0, 1, 2, ... hundredths of a point."""
    best = np.full(most + 1, -1)
    best[0] = 0
    for own in things.values():
        wider = np.full(most + 1, -1)
        for option in own:
            drop = round(100 * option.harm.drop)
            if drop <= most:
                before = best[: most + 1 - drop]
                wider[drop:] = np.maximum(wider[drop:], np.where(before >= 0, before + option.removed, -1))
        best = wider
    return np.maximum.accumulate(best)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_sweep_of_22_weights_and_20_levels_is_solved_exactly(seed):
    draw = random.Random(seed)
    things = {}
    for number in range(22):
        size = draw.choice([144, 432, 640, 2304, 4608, 9216, 18432, 36864])
        drops = sorted(int(draw.expovariate(1 / 60)) * draw.choice([0, 1, 1]) for _ in range(19))
        things[f"w{number}"] = options(
            *(((i + 1) / 20, drop / 100, size * (i + 1) // 20) for i, drop in enumerate(drops))
        )
    best = best_by_hundredths(things, 3000)
    assert recommend(things, Goal("max_drop", 2.0), 1).removed == best[200]
    total = sum(own[-1].removed for own in things.values())
    least = int(np.argmax(best >= math.ceil(0.8 * total)))
    assert recommend(things, Goal("target_sparsity", 0.8), total).drop == pytest.approx(least / 100)


def test_the_share_of_macs_that_stays_is_a_target():
    found = recommend(TWO, Goal("target_macs", 0.5), 1000)
    assert found.levels == {"a": 0.0, "b": 0.5}
    assert (found.removed, found.drop) == (500, pytest.approx(0.1))


def test_a_share_that_is_a_whole_number_is_met_by_just_that_many():
    assert recommend({"a": options((0.3, 0.0, 3))}, Goal("target_sparsity", 0.3), 10).removed == 3
    assert recommend({"a": options((0.3, 0.0, 3))}, Goal("target_macs", 0.7), 10).removed == 3


def test_what_goes_together_takes_away_less_and_more_is_asked_for_until_the_target_holds():
    things = {"a": options((0.5, 1.0, 50), (0.6, 1.5, 60)), "b": options((0.5, 1.0, 50), (0.6, 3.0, 60))}

    def removed(levels):
        return 100 - round(100 * (1 - levels["a"]) * (1 - levels["b"]))

    together = Together(removed, None)

    alone = recommend(things, Goal("target_sparsity", 0.8), 100)
    assert removed_alone(things, alone.levels) >= 80
    assert removed(alone.levels) < 80
    found = recommend(things, Goal("target_sparsity", 0.8), 100, together)
    assert found.levels == {"a": 0.6, "b": 0.5}
    assert found.removed == removed(found.levels) == 80
    with pytest.raises(UsageError) as error:
        recommend(things, Goal("target_macs", 0.15), 100, together)
    assert str(error.value) == (
        "target_macs 0.15: cannot be reached with the levels that were swept; 0.16 of the MACs stay at the "
        "least; give that, or sweep higher levels"
    )
    assert recommend(things, Goal("target_macs", 0.16), 100, together).levels == {"a": 0.6, "b": 0.6}


@st.composite
def chains(draw):
    """Up to four groups of channels, each layer's work the product of two neighbours'; levels of a fourth each."""
    names = "abcd"[: draw(st.integers(2, 4))]
    things = {}
    for name in names:
        drops = sorted(draw(st.lists(st.integers(0, 100), min_size=3, max_size=3)))
        things[name] = [
            Option(0.0, Harm(0.0, 0.0), 0, 8),
            *(Option((i + 1) / 4, Harm(drop / 100, 0.0), 100 * i, 6 - 2 * i) for i, drop in enumerate(drops)),
        ]
    products = [WidthProduct(draw(st.integers(1, 9)), a, b) for a, b in itertools.pairwise(names)]
    return things, WidthCost(products=[*products, WidthProduct(3, 1, names[0])], fixed=10)


@given(chains(), st.floats(0.2, 1.0), st.integers(0, 300))
@settings(max_examples=40, deadline=None)
def test_of_neighbouring_groups_no_choice_is_better_either(chain, share, hundredths):
    things, cost = chain
    dense = cost.of(dict.fromkeys(things, 8))

    def stays(options):
        return cost.of({name: option.units for name, option in zip(things, options, strict=True)})

    def removed(levels):
        chosen = [next(o for o in things[name] if o.level == levels[name]) for name in things]
        return dense - stays(chosen)

    together = Together(removed, cost)
    needed = math.ceil((1 - share) * dense - 1e-9 * dense)
    enough = [choice for choice in all_choices(things) if dense - stays(choice) >= needed]
    if enough:
        found = recommend(things, Goal("target_macs", share), dense, together)
        assert found.removed >= needed
        assert found.drop == pytest.approx(float(min(map(exact_drop, enough))), abs=1e-9)
    cheap = [choice for choice in all_choices(things) if exact_drop(choice) <= Fraction(hundredths, 100)]
    best = dense - min(map(stays, cheap))
    if best:
        found = recommend(things, Goal("max_drop", hundredths / 100), dense, together)
        assert found.removed == best
        assert found.drop <= hundredths / 100 + 1e-9


def test_of_levels_that_cost_the_same_no_more_is_taken_than_was_asked_for():
    things = {"a": options((0.3, 0.0, 30), (0.6, 0.0, 60), (0.9, 0.0, 90))}
    assert recommend(things, Goal("target_sparsity", 0.5), 100).levels == {"a": 0.6}
    assert recommend(things, Goal("max_drop", 0.5), 100).levels == {"a": 0.9}


def test_a_sparsity_that_cannot_be_reached_is_refused_with_the_most_that_can():
    with pytest.raises(UsageError) as error:
        recommend(TWO, Goal("target_sparsity", 0.97), 1030)
    assert str(error.value) == (
        "target_sparsity 0.97: cannot be reached with the levels that were swept; 0.9611 is the most; give that, "
        "or sweep higher levels"
    )
    assert recommend(TWO, Goal("target_sparsity", 0.9611), 1030).levels == {"a": 0.9, "b": 0.9}


def test_a_budget_that_no_level_keeps_within_is_refused_with_the_least_drop():
    with pytest.raises(UsageError) as error:
        recommend(TWO, Goal("max_drop", 0.05), 1)
    assert str(error.value) == (
        "max_drop 0.05: not one level costs so little, the least drop is 0.1000 points; allow more"
    )


def test_curves_begin_with_the_dense_point_and_only_rise():
    points = [
        point("w", 0.0, 90.0, 0.3),
        point("w", 0.2, 90.5, 0.25),  # better by chance
        point("w", 0.4, 88.0, 0.5),
        point("w", 0.6, 89.0, 0.4),  # out of order with the one before
        point("w", 0.8, 70.0, 1.3),
    ]
    curve = monotone_curves(points, 0.0)["w"]
    assert list(curve) == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert [harm.drop for harm in curve.values()] == pytest.approx([0, 0, 1.5, 1.5, 20])
    assert [harm.loss for harm in curve.values()] == pytest.approx([0, 0, 0.15, 0.15, 1.0])


def test_a_point_that_more_images_were_looked_at_for_counts_more():
    points = [
        point("w", 0.0, 90.0),
        point("w", 0.2, 86.0, n=300),
        point("w", 0.4, 90.0, n=100),
    ]
    assert [harm.drop for harm in monotone_curves(points, 0.0)["w"].values()] == pytest.approx([0, 3, 3])


def test_fewer_bits_are_the_stronger_level():
    points = [point("w", 2.0, 50.0), point("w", 32.0, 90.0), point("w", 8.0, 89.5)]
    curve = monotone_curves(points, 32.0)["w"]
    assert {bits: harm.drop for bits, harm in curve.items()} == {32.0: 0.0, 8.0: 0.5, 2.0: 40.0}
    assert list(curve) == [32.0, 8.0, 2.0]


def test_the_dense_point_of_one_parameter_is_that_of_all():
    points = [point("v", 0.0, 90.0), point("v", 0.5, 89.0), point("w", 0.5, 88.0)]
    assert monotone_curves(points, 0.0)["w"] == {0.0: Harm(0, 0), 0.5: Harm(2.0, 0)}


def test_a_loss_that_is_no_number_is_a_large_one():
    points = [point("w", 0.0, 90.0, 0.1), point("w", 0.5, 10.0, math.nan), point("w", 0.9, 10.0, math.inf)]
    assert all(math.isfinite(harm.loss) for harm in monotone_curves(points, 0.0)["w"].values())


def test_a_sweep_without_its_dense_point_or_with_holes_is_refused():
    with pytest.raises(SensitivityError) as error:
        monotone_curves([point("w", 0.5, 90.0)], 0.0)
    assert str(error.value) == (
        "sweep: the point of the dense model, level 0, is missing; sweep again with it"
    )
    points = [point("v", lv, 90.0) for lv in (0.0, 0.3, 0.6, 0.9)] + [point("w", 0.3, 90.0)]
    with pytest.raises(SensitivityError) as error:
        monotone_curves(points, 0.0)
    assert str(error.value) == ("sweep: 'w' lacks 2 of 3 levels (first: 0.6); finish it with --sense-resume")


def test_harms_of_what_goes_together_add_up():
    assert total_harm([Harm(1.0, 0.5), Harm(2.0, 0.25)]) == Harm(3.0, 0.75)
