from __future__ import annotations

import itertools

import pytest
import torch

from distiller.errors import UsageError
from distiller.replay import Variant
from distiller.sensitivity.block_engine import BlockScores
from distiller.sensitivity.decisions import Tally
from distiller.sensitivity.paired_drop import StopRule
from distiller.sensitivity.standings import Standings
from distiller.sensitivity.units import Unit

UNITS = [
    Unit("element", "a.weight", (0.5, 0.9), Variant),
    Unit("weight-bits", "a.weight", (4.0,), Variant, note=lambda level: f"{level:g} bits"),
]
PLACES = [(0, 0), (0, 1), (1, 0)]


def block(n, dense, *points):
    """Top-1 of the dense model and of each point; who is lost is as many as can be."""
    tallies = {
        place: Tally(n, top1, n, 0.1 * n, max(0, dense - top1), max(0, top1 - dense))
        for place, top1 in zip(PLACES, points, strict=True)
    }
    return BlockScores(Tally(n, dense, n, 0.5 * n), tallies, flipped=1)


BLOCKS = [block(10, 9, 8, 5, 9), block(10, 10, 9, 2, 10), block(5, 4, 4, 0, 5)]


def points_of(order):
    standings = Standings(UNITS, 25, 10, None)
    for index in order:
        standings.add(index, BLOCKS[index])
    return standings.points()


def test_points_are_sums_of_all_blocks_axis_by_axis_the_dense_one_first():
    points = points_of(range(3))
    assert [(p.axis, p.parameter, p.level, p.top1_correct, p.n) for p in points] == [
        ("element", "a.weight", 0.0, 23, 25),
        ("element", "a.weight", 0.5, 21, 25),
        ("element", "a.weight", 0.9, 7, 25),
        ("weight-bits", "a.weight", 32.0, 23, 25),
        ("weight-bits", "a.weight", 4.0, 24, 25),
    ]
    assert [p.score.top1 for p in points] == [92.0, 84.0, 28.0, 92.0, 96.0]
    assert points[0].score.loss == pytest.approx(0.5)
    assert points[1].score.loss == pytest.approx(0.1)
    assert [p.removed for p in points] == ["", "", "", "", "4 bits"]
    assert {(p.top1_low, p.top1_high) for p in points} == {(None, None)}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_points_do_not_depend_on_the_order_in_which_blocks_are_done(order):
    assert points_of(order) == points_of(range(3))


def test_nothing_is_finished_before_the_last_block():
    standings = Standings(UNITS, 25, 10, None)
    assert (standings.count, standings.finished, standings.active(0, 1)) == (5, 0, None)
    assert standings.is_clear(9, 1)
    assert not standings.add(0, BLOCKS[0])
    assert not standings.add(2, BLOCKS[2])
    assert standings.points(finished_only=True) == []
    assert standings.add(1, BLOCKS[1])
    assert (standings.finished, standings.flipped) == (5, 3)


def simulated(n, block_size, rates, error):
    """A sweep with an error over n images, points with so many of them lost; who is looked at, and what is said."""
    generator = torch.Generator().manual_seed(4)
    dense = torch.rand(n, generator=generator) < 0.9
    own = [dense & (torch.rand(n, generator=generator) >= rate) for rate in rates]
    unit = Unit("element", "a.weight", tuple(0.1 * (i + 1) for i in range(len(rates))), Variant)
    standings = Standings([unit], n, block_size, error)
    seen = []
    for index, part in enumerate(torch.arange(n).split(block_size)):
        active = standings.active(index, 1)
        wanted = [p for p in range(len(rates)) if active is None or (0, p) in active]
        seen.append(len(wanted))
        tallies = {
            (0, p): Tally(
                len(part), int(own[p][part].sum()), len(part), 0.0,
                int((dense & ~own[p])[part].sum()), int((~dense & own[p])[part].sum()),
            )
            for p in wanted
        }  # fmt: skip
        standings.add(index, BlockScores(Tally(len(part), int(dense[part].sum()), len(part), 0.0), tallies))
    return (
        standings.points(),
        seen,
        [100 * float(o.float().mean()) for o in own],
        100 * float(dense.float().mean()),
    )


def test_with_an_error_points_end_when_they_are_known_and_their_intervals_hold():
    points, seen, exact, dense = simulated(10_000, 256, [0.0, 0.005, 0.02, 0.3, 0.9], 0.5)
    assert points[0].score.top1 == pytest.approx(dense)
    assert seen[0] == 5
    assert seen[-1] == 0  # all are known before the last block
    assert points[1].n < 2000 < points[3].n
    assert points[5].n < 1000
    for point, true in zip(points[1:], exact, strict=True):
        assert point.top1_low <= true <= point.top1_high
        assert point.top1_low <= point.score.top1 <= point.top1_high
        width = max(0.5, 0.1 * (dense - point.score.top1))
        assert max(point.top1_high - point.score.top1, point.score.top1 - point.top1_low) <= width + 1e-9


def test_a_point_is_known_at_a_look_of_the_rule_and_not_between():
    points, _, _, _ = simulated(4_000, 64, [0.01, 0.1, 0.4], 1.0)
    assert {point.n for point in points[1:]} <= set(StopRule(4_000, 64, 1.0).looks)


def test_which_points_a_block_is_run_on_does_not_depend_on_what_is_known_by_then():
    """Two points, the first of which is known after a block, the other one after four."""
    count, size = 400, 50
    unit = Unit("element", "a.weight", (0.1, 0.2), Variant)
    lost = [0, size]
    blocks = [
        BlockScores(
            Tally(size, size, size, 0.0),
            {(0, p): Tally(size, size - lost[p] * (i % 2), size, 0.0, lost[p] * (i % 2)) for p in (0, 1)},
        )
        for i in range(count // size)
    ]
    straight = Standings([unit], count, size, 5.0)
    wanted = []
    for index, scores in enumerate(blocks):
        assert straight.is_clear(index, 1)
        wanted.append(straight.active(index, 1))
        straight.add(index, scores)
    begin = next(index for index, active in enumerate(wanted) if active is not None)
    assert wanted[begin] == {(0, 1)}
    for behind in (1, 3):
        assert [straight.active(index, behind) for index in range(len(blocks))] == (
            [None] * (behind - 1) + wanted
        )[: len(blocks)]
    early = Standings([unit], count, size, 5.0)
    assert [early.is_clear(index, 3) for index in range(5)] == [True, True, True, False, False]
    early.add(1, blocks[1])
    assert not early.is_clear(3, 3)
    early.add(0, blocks[0])
    assert [early.is_clear(index, 3) for index in range(3, 6)] == [True, True, False]


def test_an_error_out_of_range_is_refused():
    with pytest.raises(
        UsageError, match="--sense-error: must be above 0 and below 100 percentage points, got 0"
    ):
        Standings(UNITS, 25, 10, 0.0)
