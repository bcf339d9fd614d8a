"""Curves of a sweep as a heat map, for more of them than lines can show: a row for each parameter.

Knows nothing about how the scores were measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from distiller.sensitivity.curves import SensitivityPoint
from distiller.sensitivity.plot_labels import LevelScale, Metric, parameter_labels
from distiller.sensitivity.tolerated_levels import MAX_DROP, tolerated_levels

__all__ = ["draw_heat_map"]

_LIMIT_COLOUR = "red"
_CHARACTER = 0.065  # inches, of a row's label


def draw_heat_map(
    figure: Figure,
    curves: Mapping[str, Sequence[SensitivityPoint]],
    scale: LevelScale,
    metric: Metric,
    dense: float | None,
) -> None:
    """Draw how much worse every level of one axis is; for accuracies, with a line where a point is lost.

    Args:
        figure: an empty one; its size is set.
        curves: the points of each parameter.
        scale: of the axis.
        metric: what is drawn.
        dense: its value for the uncompressed model; None: scores are compared to the best one.
    """
    points = [point for curve in curves.values() for point in curve]
    levels = scale.ordered(point.level for point in points)
    reference, origin = _reference(points, metric, dense)
    harm = np.full((len(curves), len(levels)), math.nan)  # what is missing or not finite is left white
    for row, curve in enumerate(curves.values()):
        for point in curve:
            value = metric.harm(point.score, reference)
            if point.level in levels and math.isfinite(value):
                harm[row, levels.index(point.level)] = max(value, 0.0)
    labels = parameter_labels(tuple(curves))
    longest = max(len(label) for label in labels.values())
    figure.set_size_inches(
        max(8.0, 2.6 + _CHARACTER * longest + 0.36 * len(levels)), max(3.5, 2.2 + 0.17 * len(harm))
    )
    axes = figure.subplots()
    # The square root spreads the small changes, which are what decides how far to prune.
    norm = PowerNorm(0.5, vmin=0.0)
    image = axes.imshow(harm, aspect="auto", interpolation="nearest", cmap="viridis_r", norm=norm)
    axes.set_yticks(range(len(harm)), list(labels.values()), fontsize=7)
    axes.set_xticks(range(len(levels)), [f"{scale.shown(level):.4g}" for level in levels], fontsize=8)
    axes.tick_params(axis="x", top=True, labeltop=True)
    axes.set_xlabel(scale.label)
    axes.set_title(_subtitle(points, metric, origin, reference), fontsize="medium")
    if metric.is_accuracy:
        _draw_limit(axes, curves, levels, scale, metric, reference)
        figure.legend(loc="outside lower center", frameon=False)
    figure.colorbar(image, ax=axes, label=metric.change.format(origin), aspect=40)


def _reference(points: Sequence[SensitivityPoint], metric: Metric, dense: float | None) -> tuple[float, str]:
    """What scores are compared to, and what it is."""
    if dense is not None:
        return dense, "dense"
    finite = [value for point in points if math.isfinite(value := metric.of(point.score))]
    return max(finite, key=lambda value: metric.is_better_when * value, default=0.0), "best"


def _draw_limit(
    axes: Axes,
    curves: Mapping[str, Sequence[SensitivityPoint]],
    levels: Sequence[float],
    scale: LevelScale,
    metric: Metric,
    reference: float,
) -> None:
    """In each row, a line behind the last level up to which no more than a point is lost."""
    limits = []
    for curve in curves.values():
        found = tolerated_levels(curve, scale, metric, reference).levels
        mildest = scale.dense_level if scale.dense_level in levels else None
        last = found[-1] if found else mildest
        limits.append(-0.5 if last is None else levels.index(last) + 0.5)
    edges = np.arange(len(limits) + 1) - 0.5
    axes.stairs(
        limits,
        edges,
        orientation="horizontal",
        baseline=None,
        color=_LIMIT_COLOUR,
        linewidth=1.3,
        label=f"right of it: more than {MAX_DROP:g} point lost",
    )
    axes.set_xlim(-0.5, len(levels) - 0.5)


def _subtitle(points: Sequence[SensitivityPoint], metric: Metric, origin: str, reference: float) -> str:
    told = f"{origin}: {metric.value.format(reference)}"
    widths = [
        point.top1_high - point.top1_low
        for point in points
        if metric.has_intervals and point.top1_low is not None and point.top1_high is not None
    ]
    return f"{told}; 95 % intervals: at most {max(widths) / 2:.2f} points to either side" if widths else told
