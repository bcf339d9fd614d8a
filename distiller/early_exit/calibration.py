"""Thresholds chosen on data: accuracy against work for all thresholds, from one pass over the data.

The pass computes every exit of every image and keeps how sure each answer is and whether it is right; any
thresholds can then be tried without the network. Choose on validation data: on the test set the accuracy of
the chosen ones would be too high.
Knows nothing about files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from distiller.branch_points import every_exit
from distiller.early_exit.executed_macs import ExitCosts
from distiller.early_exit.rules import ExitRule, certainty, check_count, rule_of_bounds
from distiller.errors import DatasetError, UsageError
from distiller.evaluation_mode import evaluating
from distiller.names import unwrap

_CANDIDATES = 100
_CURVE_POINTS = 40
_MOST_SWEEPS = 10
_GRID_POINTS = 2000


@dataclass(frozen=True, slots=True)
class Trade:
    """What a rule gives, on the images of a table.

    Attributes:
        rule: the rule.
        top1: percent.
        mean_macs: for an image.
        shares: of the images that leave at each exit, and at the end; together 1.
    """

    rule: ExitRule
    top1: float
    mean_macs: float
    shares: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ExitTable:
    """How sure each exit is of its answer for each image, and whether it is right.

    Attributes:
        criterion: of the certainties.
        certainties: (exits, images).
        correct: (exits + 1, images), booleans, the final output last.
        costs: of the model.
    """

    criterion: str
    certainties: np.ndarray = field(repr=False)
    correct: np.ndarray = field(repr=False)
    costs: ExitCosts

    @property
    def top1(self) -> tuple[float, ...]:
        """Percent of all images that each exit answers rightly, the final output last."""
        return tuple((100 * self.correct.mean(axis=1)).tolist())

    def trade(self, rule: ExitRule) -> Trade:
        """What a rule would give."""
        bounds = [rule.bound(index) for index in range(len(rule.thresholds))]
        exits, images = self.certainties.shape
        leaves = self.certainties >= np.array(bounds)[:, None]
        where = np.where(leaves.any(axis=0), leaves.argmax(axis=0), exits)
        counts = np.bincount(where, minlength=exits + 1)
        costs = np.array(self.costs.of_leaving([bound != math.inf for bound in bounds]))
        right = int(self.correct[where, np.arange(images)].sum())
        shares = tuple((counts / images).tolist())
        return Trade(rule, 100 * right / images, float(counts @ costs) / images, shares)

    def try_bounds(self, bounds: Sequence[float]) -> Trade:
        """What the rule gives by which images leave from these certainties on; infinite: nothing leaves."""
        return self.trade(rule_of_bounds(self.criterion, bounds))  # by its thresholds as they are shown


def exit_table(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    criterion: str,
    costs: ExitCosts,
    device: torch.device | str = "cpu",
) -> ExitTable:
    """Compute every exit of every image.

    Args:
        model: with exits, on `device`.
        batches: (images, labels).
        criterion: entropy or confidence.
        costs: of the model.
        device: where the batches go.

    Raises:
        DatasetError: there is no image.
    """
    bare = unwrap(model)
    sure: list[Tensor] = []
    right: list[Tensor] = []
    with torch.inference_mode(), evaluating(bare), every_exit(bare):
        for images, labels in batches:
            outputs = bare(images.to(device))
            labels = labels.to(device)
            sure.append(torch.stack([certainty(x, criterion) for x in outputs[:-1]]).cpu())
            right.append(torch.stack([x.argmax(-1) == labels for x in outputs]).cpu())
    if not sure:
        raise DatasetError("early exit: no image to choose thresholds on; give more data")
    certainties = torch.cat(sure, 1).double().numpy()
    return ExitTable(criterion, certainties, torch.cat(right, 1).numpy(), costs)


def thresholds_for_drop(table: ExitTable, max_drop: float) -> Trade:
    """The rule of least work whose accuracy is at most `max_drop` points below that of the final output.

    Tried are a grid of the thresholds of all exits together, and from its best those of each in turn while
    the others stay, until nothing gets better: with several exits a good choice, not always the best one.

    Args:
        table: of validation images.
        max_drop: percentage points, from 0.

    Raises:
        UsageError: `max_drop` is negative.
    """
    if not max_drop >= 0:
        raise UsageError(f"early exit: the drop is a number of points from 0, got {max_drop:g}")
    exits = len(table.certainties)
    closed = table.try_bounds([math.inf] * exits)
    least = closed.top1 - max_drop - 1e-9
    each = max(2, int(_GRID_POINTS ** (1 / exits)) - 2)  # beside the two ends
    bounds = [_candidates(row, table.criterion, each) for row in table.certainties]
    coarse = [table.try_bounds(combined) for combined in product(*bounds)]
    return _refined(table, _best([closed, *coarse], least), least)


def thresholds_for_shares(table: ExitTable, shares: Sequence[float]) -> Trade:
    """The rule by which given shares of the images leave at the exits, those first that are surest.

    Args:
        table: of validation images.
        shares: of all images, one for each exit, together at most 1.

    Raises:
        UsageError: there are more or fewer, or they cannot be.
    """
    exits, images = table.certainties.shape
    check_count("shares", len(shares), exits)
    if any(not 0 <= share <= 1 for share in shares) or sum(shares) > 1 + 1e-9:
        raise UsageError(
            "early exit: shares are numbers from 0 to 1, together at most 1, "
            f"got {' '.join(f'{share:g}' for share in shares)}"
        )
    left = np.ones(images, dtype=bool)
    bounds: list[float] = []
    for index, share in enumerate(shares):
        sure = np.sort(table.certainties[index][left])[::-1]
        count = min(round(share * images), len(sure))
        bounds.append(_bound_between(sure, count, table.criterion))
        left &= ~(table.certainties[index] >= bounds[-1])
    return table.try_bounds(bounds)


def curve(table: ExitTable) -> list[Trade]:
    """Accuracy against work, with one threshold for all exits, from all closed to all images at the first."""
    bounds = _candidates(table.certainties, table.criterion, _CURVE_POINTS)
    return [table.try_bounds([bound] * len(table.certainties)) for bound in reversed(bounds)]


def _best(trades: Sequence[Trade], least: float) -> Trade:
    """The least work among those that are accurate enough; of equal work the more accurate."""
    return min(
        (trade for trade in trades if trade.top1 >= least), key=lambda trade: (trade.mean_macs, -trade.top1)
    )


def _refined(table: ExitTable, beginning: Trade, least: float) -> Trade:
    best = beginning
    for _ in range(_MOST_SWEEPS):
        before = best
        for index in range(len(table.certainties)):
            bounds = [best.rule.bound(other) for other in range(len(table.certainties))]
            tried = [
                table.try_bounds([*bounds[:index], bound, *bounds[index + 1 :]])
                for bound in _candidates(table.certainties[index], table.criterion, _CANDIDATES)
            ]
            best = _best([best, *tried], least)
        if best is before:
            break
    return best


def _candidates(certainties: np.ndarray, criterion: str, count: int) -> list[float]:
    """Bounds worth a try, rising: between two images' certainties, evenly over the images; and infinity."""
    values = np.unique(certainties[np.isfinite(certainties)])
    if len(values) == 0:
        return [math.inf]
    between = (values[1:] + values[:-1]) / 2
    spread = np.unique(np.linspace(0, len(between) - 1, min(count, len(between))).round().astype(int))
    return [_below(float(values[0]), criterion), *between[spread].tolist(), math.inf]


def _below(certainty: float, criterion: str) -> float:
    """A bound that the least certain image reaches too, six digits of a threshold being kept."""
    return 0.0 if criterion == "confidence" else certainty * (1 + 1e-5)


def _bound_between(sure: np.ndarray, count: int, criterion: str) -> float:
    """The bound that the first `count` of certainties in falling order reach, and the next does not."""
    if count == 0:
        return math.inf
    if count == len(sure):
        return _below(float(sure[-1]), criterion)
    return float(sure[count - 1] + sure[count]) / 2
