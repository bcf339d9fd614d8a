"""What a recommended schedule says of itself: where its levels come from, what they cost, how to run it.

Knows nothing about how levels are chosen, nor about YAML.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distiller.apputils.meters import EvalResult
from distiller.sensitivity.curves import SensitivityPoint
from distiller.sensitivity.prunables import Prunable
from distiller.sensitivity.recommend import Goal
from distiller.sensitivity.schedule_text import pruning_epochs

__all__ = ["Choice", "Sources", "header", "table", "verified"]

_LONGEST = 98
_ESTIMATE = (
    "That sum is an estimate: each drop was measured with all else dense, and together they may cost more, "
    "or less. It counts 0 for what was better than dense, and curves that were made monotone; the drops in "
    "the table are as measured. Training regains some of it."
)
_HOW = {
    "element": "The smallest elements of each weight become zero over epochs 0 to {last}, gradually.",
    "sensitivity": "What is not larger than sensitivity * standard deviation of the dense weights goes from "
    "the first epoch on, and more of it until epoch {last}, as training makes weights small: the levels are "
    "where it begins.",
    "channel": "The weakest input channels of each weight become zero over epochs 0 to {last}, gradually, in "
    "each weight by itself; they are not removed.",
    "filter": "The weakest filters become zero over epochs 0 to {last}, gradually, with their biases, norms "
    "and readers; where filters of several layers go together, the sum of their magnitudes decides. Then "
    "they are removed.",
    "n:m": "Pruned once, before the first epoch.",
    "weight-bits": "Weights are rounded in training to so many bits, symmetrically, with a scale for each "
    "output channel; simulated in floating point.",
    "rank": "Before the first epoch each layer becomes two smaller ones, whose product is the nearest of the "
    "rank that stays (SVD); they are trained on.",
}


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the levels come from.

    Attributes:
        file: of the sweep, its name only.
        axis: of the sweep.
        arch: of the model.
        dataset: it was swept on.
        points: of the axis.
        dense: the dense model's point.
    """

    file: str
    axis: str
    arch: str
    dataset: str
    points: Sequence[SensitivityPoint]
    dense: SensitivityPoint


@dataclass(frozen=True, slots=True)
class Choice:
    """What was recommended.

    Attributes:
        goal: that was asked for.
        prunables: that have levels.
        reasons: why the rest of what was swept stays whole, by name.
        levels: by name of a prunable.
        drop: the sum of the drops that were counted, in points of top-1.
        reached: what the levels come to, in words.
    """

    goal: Goal
    prunables: Sequence[Prunable]
    reasons: Mapping[str, str]
    levels: Mapping[str, float]
    drop: float
    reached: str


def header(sources: Sources, choice: Choice, epochs: int, pruner: str, command: str) -> list[str]:
    """The comments of a schedule, a paragraph each.

    Args:
        sources: of the levels.
        choice: the levels.
        epochs: of the training.
        pruner: `agp` or `sensitivity`.
        command: that trains.
    """
    axis, dense = sources.axis, sources.dense
    how = _HOW["sensitivity" if pruner == "sensitivity" else "filter" if axis == "group" else axis]
    counts = f" ({dense.top1_correct:,} of {dense.n:,})" if dense.n and dense.top1_correct is not None else ""
    paragraphs = [
        f"Levels of axis '{axis}', recommended from a sensitivity sweep: {sources.arch}, {sources.dataset}.",
        f"From {sources.file}: the dense model has a top-1 of {dense.score.top1:.2f} %{counts}. "
        f"Asked for: {choice.goal}. {choice.reached}",
        table(sources, choice.prunables, choice.levels),
        f"Sum of the drops, as counted: {choice.drop:.2f} points of top-1. {_ESTIMATE}",
        f"{how.format(last=pruning_epochs(epochs) - 1)} Put in the paths of this schedule.yaml and of the "
        "CHECKPOINT that was swept:",
        _continued(command),
    ]
    if choice.reasons:
        kept = "\n".join(f"  {name}: {reason}" for name, reason in choice.reasons.items())
        paragraphs.insert(3, f"Swept, and left whole:\n{kept}")
    return paragraphs


def _continued(command: str) -> str:
    """A command line over several lines, as a shell takes it."""
    lines = textwrap.wrap(command, _LONGEST, break_long_words=False, break_on_hyphens=False)
    return " \\\n".join(("  " if index == 0 else "      ") + line for index, line in enumerate(lines))


def table(sources: Sources, prunables: Sequence[Prunable], levels: Mapping[str, float]) -> str:
    """Each level with the drop that was measured, and the interval of its top-1 where there is one."""
    by_key = {(point.parameter, point.level): point for point in sources.points}
    lines = ["    level    drop  top-1 (95 % interval)"]
    for own in prunables:
        level = levels[own.name]
        found = [by_key[name, level] for name in own.curves if (name, level) in by_key]
        drop = sum(sources.dense.score.top1 - point.score.top1 for point in found)
        first = found[0] if len(found) == 1 else None
        score = f"{first.score.top1:.2f}" if first is not None else ""
        if first is not None and first.top1_low is not None and first.top1_high is not None:
            score += f" ({first.top1_low:.2f} to {first.top1_high:.2f})"
        amount = own.amounts.get(level)
        units = f", {amount.units} of {own.size}" if amount is not None and own.size else ""
        more = f" and {len(own.weights) - 1} more" if len(own.weights) > 1 else ""
        lines.append(f"  {level:>7g} {drop:>7.2f}  {score:<22} {own.name}{more}{units}")
    return "\n".join(lines)


def verified(predicted: float, dense: EvalResult, compressed: EvalResult) -> str:
    """What the levels cost all together, without training, beside what the sweep let expect."""
    drop = dense.top1 - compressed.top1
    return (
        f"In one shot, without training (--verify): top-1 {compressed.top1:.2f} % "
        f"({compressed.top1_correct:,} of {compressed.n:,}), dense {dense.top1:.2f} % "
        f"({dense.top1_correct:,}), of the test images: a drop of {drop:.2f} points, {predicted:.2f} were "
        "predicted by the images of the sweep."
    )
