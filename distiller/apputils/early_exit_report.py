"""What early exit achieved on the test images, for the results card.

Knows nothing about models, nor how figures are taken.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from distiller.apputils.intervals import wilson_interval
from distiller.early_exit.rules import ExitRule
from distiller.export.latency import Latency

_WORK = (
    "early exit: images that left were not computed further; multiply-accumulates are those of the layers "
    "that ran, branches included, for the images that each layer saw. Figures above are of the whole "
    "network, without exits"
)


@dataclass(frozen=True, slots=True)
class EarlyExitReport:
    """Figures of one test with early exits.

    Attributes:
        rule: by which images left.
        layers: that have an exit.
        chosen_on: how the thresholds were chosen, in words; "" when they were given.
        left: images that left at each exit, and at the end.
        left_correct: those of them that were answered rightly.
        all_correct: images that each exit, and the final output, answers rightly when it is asked for all.
        mean_macs: for an image, with early exits.
        whole_macs: for an image, of the whole network without branches.
        latencies: pairs of (whole network, with early exits) on the same test images; one image first.
    """

    rule: ExitRule
    layers: tuple[str, ...]
    chosen_on: str
    left: tuple[int, ...]
    left_correct: tuple[int, ...]
    all_correct: tuple[int, ...]
    mean_macs: float
    whole_macs: float
    latencies: tuple[tuple[Latency, Latency], ...]

    @property
    def n(self) -> int:
        """Images in all."""
        return sum(self.left)

    @property
    def top1_correct(self) -> int:
        """Images that were answered rightly, wherever they left."""
        return sum(self.left_correct)

    @property
    def saved_macs(self) -> float:
        """The share of the network's multiply-accumulates saved; negative when branches cost more."""
        return 1 - self.mean_macs / self.whole_macs

    def to_text(self) -> str:
        """A table of the exits, with what was gained under it."""
        headers = [
            "early exit",
            self.rule.criterion,
            "images that left",
            "right of these",
            "right of all images",
        ]
        names = [*(f"exit {i} ({name})" for i, name in enumerate(self.layers, start=1)), "final output"]
        thresholds = [*("never" if t is None else f"{t:g}" for t in self.rule.thresholds), ""]
        rows = [
            [name, threshold, _share(left, self.n), _share(right, left), _share(of_all, self.n)]
            for name, threshold, left, right, of_all in zip(
                names, thresholds, self.left, self.left_correct, self.all_correct, strict=True
            )
        ]
        table = tabulate(rows, headers, colalign=["left"] + ["right"] * 4, disable_numparse=True)
        low, high = wilson_interval(self.top1_correct, self.n)
        points = 100 * (self.top1_correct - self.all_correct[-1]) / self.n
        lines = [
            f"top-1 with early exits: {_share(self.top1_correct, self.n)}, {100 * low:.2f} to "
            f"{100 * high:.2f} %; {points:+.2f} points from the final output",
            f"MACs for an image: {self.mean_macs:,.0f} of {self.whole_macs:,.0f} on average, "
            f"{round(100 * self.saved_macs, 1) + 0.0:.1f} % saved",
        ]
        for whole, early in self.latencies:
            threads = "1 thread" if early.threads == 1 else f"{early.threads} threads"
            lines.append(
                f"median latency on test images, batch {early.batch_size} ({early.device}, {threads}): "
                f"{1000 * early.median_s:.3f} ms, without exits {1000 * whole.median_s:.3f} ms "
                f"({whole.median_s / early.median_s:.2f}x)"
            )
        if self.chosen_on:
            lines.append(f"thresholds chosen {self.chosen_on}")
        lines.append(textwrap.fill(_WORK, 100, subsequent_indent="  "))
        return "\n".join([table, *lines])

    def to_json(self) -> dict[str, Any]:
        """The figures as plain data."""
        low, high = wilson_interval(self.top1_correct, self.n)
        shares: Sequence[float] = [left / self.n for left in self.left]
        return {
            "criterion": self.rule.criterion,
            "thresholds": list(self.rule.thresholds),
            "chosen_on": self.chosen_on or None,
            "layers": list(self.layers),
            "n": self.n,
            "left": list(self.left),
            "shares": shares,
            "left_correct": list(self.left_correct),
            "correct_of_all": list(self.all_correct),
            "top1_correct": self.top1_correct,
            "top1_percent": 100 * self.top1_correct / self.n,
            "top1_interval_95_percent": [100 * low, 100 * high],
            "mean_macs": self.mean_macs,
            "whole_macs": self.whole_macs,
            "saved_macs": self.saved_macs,
            "latencies": [
                {"whole": asdict(whole), "early_exit": asdict(early)} for whole, early in self.latencies
            ],
        }


def _share(count: int, of: int) -> str:
    return f"{count:,}/{of:,} = {100 * count / of:.2f} %" if of else "-"
