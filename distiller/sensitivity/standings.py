"""What is known of the points of a sweep after some blocks of images.

Blocks may come in any order; what they say is summed in the order of the images, so that the points do not
depend on it.
Knows nothing about models or files.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from distiller.sensitivity.axes import find_axis
from distiller.sensitivity.block_engine import BlockScores, Place
from distiller.sensitivity.curves import Score, SensitivityPoint
from distiller.sensitivity.decisions import Tally
from distiller.sensitivity.paired_drop import StopRule
from distiller.sensitivity.units import Unit

_NOTHING = Tally(0, 0, 0, 0.0)


@dataclass(frozen=True, slots=True)
class _Known:
    """A point that needs no more images.

    Attributes:
        tally: of the images it took.
        dense: of the dense model on the same ones.
        low: of the drop, in points.
        high: alike.
        blocks: that these images are.
    """

    tally: Tally
    dense: Tally
    low: float
    high: float
    blocks: int


class Standings:
    """Sums over the blocks so far.

    Args:
        units: of the sweep.
        total: images in all.
        block: images of a block.
        error: points that a drop is to be known to; None: all images are looked at.

    Attributes:
        flipped: images that the dense model answers otherwise in bfloat16.

    Raises:
        UsageError: `error` is out of range.
    """

    def __init__(self, units: Sequence[Unit], total: int, block: int, error: float | None) -> None:
        self._units, self._total = units, total
        self._rule = None if error is None else StopRule(total, block, error)
        self._waiting: dict[int, BlockScores] = {}
        self._next = 0
        self._dense = _NOTHING
        self.flipped = 0
        places = [(unit, level) for unit in range(len(units)) for level in range(len(units[unit].levels))]
        self._sums: dict[Place, Tally] = dict.fromkeys(places, _NOTHING)
        self._known: dict[Place, _Known] = {}

    @property
    def count(self) -> int:
        """Points in all, the dense one of each unit included."""
        return len(self._sums) + len(self._units)

    @property
    def finished(self) -> int:
        """Points that need no more images."""
        return len(self._known) + (len(self._units) if self._dense.n == self._total else 0)

    def is_clear(self, index: int, behind: int) -> bool:
        """Whether it is known by now which points a block is run on."""
        return self._rule is None or self._next > index - behind

    def active(self, index: int, behind: int) -> Collection[Place] | None:
        """The points that a block is run on; None: all.

        It is those that were not known after the block that is so many before it, whatever is known by now:
        how a point is run may depend on which others are, in the last digits of the loss.

        Args:
            index: of the block.
            behind: how many blocks, 1 or more.
        """
        known = {place for place, known in self._known.items() if known.blocks <= index + 1 - behind}
        return frozenset(self._sums.keys() - known) if known else None

    def add(self, index: int, scores: BlockScores) -> bool:
        """Take in a block; returns whether points are finished now that were not before."""
        self._waiting[index] = scores
        before = len(self._known)
        while self._next in self._waiting:
            block = self._waiting.pop(self._next)
            self._next += 1
            self._dense += block.dense
            self.flipped += block.flipped
            for place in self._sums.keys() - self._known.keys():
                self._sums[place] += block.points[place]
            self._look()
        return len(self._known) > before

    def points(self, *, finished_only: bool = False) -> list[SensitivityPoint]:
        """The points, axis by axis; all of them are finished, or those that are not are left out."""
        assert finished_only or self.finished == self.count
        found = []
        for at, unit in enumerate(self._units):
            dense_level = find_axis(unit.axis).dense_level
            if self._dense.n == self._total:
                everything = _Known(self._dense, self._dense, 0.0, 0.0, self._next)
                found.append(self._point(unit, dense_level, everything, ""))
            for place, level in enumerate(unit.levels):
                known = self._known.get((at, place))
                if known is not None:
                    found.append(self._point(unit, level, known, unit.note(level)))
        return found

    def _look(self) -> None:
        n = self._dense.n
        active = [place for place in self._sums if place not in self._known]
        if self._rule is None:
            if n == self._total:
                self._known |= {
                    place: _Known(self._sums[place], self._dense, 0.0, 0.0, self._next) for place in active
                }
        elif n in self._rule.looks and active:
            lost, won = ([getattr(self._sums[place], name) for place in active] for name in ("lost", "won"))
            judged = self._rule.judge(n, lost, won)
            for place, low, high, is_known in zip(active, judged.low, judged.high, judged.known, strict=True):
                if is_known:
                    self._known[place] = _Known(
                        self._sums[place], self._dense, float(low), float(high), self._next
                    )

    def _point(self, unit: Unit, level: float, known: _Known, removed: str) -> SensitivityPoint:
        """A point; what some of the images say of the change is taken to hold of all of them."""
        tally, dense, all_images = known.tally, known.dense, self._dense

        def percent(count: str) -> float:
            changed = (getattr(tally, count) - getattr(dense, count)) / tally.n
            return min(100.0, max(0.0, 100 * (getattr(all_images, count) / all_images.n + changed)))

        is_whole = tally.n == self._total
        if is_whole:
            score = Score(100 * tally.top1 / tally.n, 100 * tally.top5 / tally.n, tally.loss / tally.n)
        else:
            loss = all_images.loss / all_images.n + (tally.loss - dense.loss) / tally.n
            score = Score(percent("top1"), percent("top5"), loss)
        top1 = 100 * all_images.top1 / all_images.n
        return SensitivityPoint(
            axis=unit.axis,
            parameter=unit.parameter,
            level=level,
            score=score,
            n=tally.n,
            top1_correct=tally.top1,
            top5_correct=tally.top5,
            top1_low=None if self._rule is None else max(0.0, top1 - known.high),
            top1_high=None if self._rule is None else min(100.0, top1 - known.low),
            removed=removed,
        )
