from __future__ import annotations

from itertools import pairwise

import pytest

from distiller.apputils.schedule_preview import stretches_alike
from distiller.interfaces import Policy
from distiller.scheduler import CompressionScheduler


class Counting(Policy):
    """Describes itself anew every `period` epochs."""

    def __init__(self, period: int) -> None:
        self.period = period

    def describe(self, ctx) -> str:
        return str(ctx.epoch // self.period)


@pytest.mark.parametrize(
    "window",
    [
        {"epochs": [0, 3, 4, 7]},
        {"starting_epoch": 2, "ending_epoch": 9, "frequency": 3},
        {"starting_epoch": 990, "ending_epoch": 2005},
    ],
)
@pytest.mark.parametrize("period", [1, 4, 10**6])
def test_the_stretches_are_those_of_a_look_at_every_epoch(tiny_cnn, window, period):
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(Counting(period), **window, name="a")
    scheduler.add_policy(Counting(10**6), starting_epoch=1, ending_epoch=5, name="b")
    found = [
        (epoch, stretch.lines)
        for stretch in stretches_alike(scheduler, 2010)
        for epoch in range(stretch.begin, stretch.last + 1)
    ]
    assert found == [(epoch, scheduler.describe(epoch)) for epoch in range(2010)]
    lines = [stretch.lines for stretch in stretches_alike(scheduler, 2010)]
    assert all(one != other for one, other in pairwise(lines))


def test_a_billion_epochs_in_which_little_changes_are_few_stretches(tiny_cnn):
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(Counting(4 * 10**8), starting_epoch=0, ending_epoch=10**9, name="a")
    assert list(stretches_alike(scheduler, 10**9)) == [
        (0, 4 * 10**8 - 1, ["a: 0"]),
        (4 * 10**8, 8 * 10**8 - 1, ["a: 1"]),
        (8 * 10**8, 10**9 - 1, ["a: 2"]),
    ]
