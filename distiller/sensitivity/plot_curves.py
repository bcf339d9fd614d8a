"""Curves of a sweep as lines: score against level, one line for each parameter.

Up to 12 share one panel; more are spread over panels of up to 8, in the order of the model, every panel with
all other curves in grey behind. Within a panel the colours run with the depth, dark (first) to light (last).
Where points have intervals, these are bands.
Knows nothing about how the scores were measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from distiller.sensitivity.curves import SensitivityPoint
from distiller.sensitivity.plot_labels import LevelScale, Metric, parameter_labels

__all__ = ["MOST_AS_LINES", "draw_curves"]

MOST_IN_ONE_PANEL = 12
MOST_PER_SMALL_PANEL = 8
MOST_AS_LINES = 64

_MOST_TICKS_AT_LEVELS = 11
_LINE_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "d")  # one for each curve of a panel
_DENSE_COLOUR = "black"
_BEHIND = "0.87"
_NO_INTERVAL = (math.nan, math.nan)
_BAND = 0.18  # opacity
_CHARACTER = 0.085  # inches, of a legend


@dataclass(frozen=True, slots=True)
class _Curve:
    label: str
    level: np.ndarray  # as shown, from mild to strong
    score: np.ndarray
    low: np.ndarray  # NaN where there is no interval
    high: np.ndarray
    style: Mapping[str, Any]

    @property
    def has_band(self) -> bool:
        return bool(np.isfinite(self.low).any())


def draw_curves(
    figure: Figure,
    curves: Mapping[str, Sequence[SensitivityPoint]],
    scale: LevelScale,
    metric: Metric,
    dense: float | None,
) -> None:
    """Draw the curves of one axis.

    Args:
        figure: an empty one; its size is set.
        curves: the points of each parameter, at most `MOST_AS_LINES`.
        scale: of the axis.
        metric: what is drawn.
        dense: its value for the uncompressed model, if known.
    """
    drawn = _curves(curves, scale, metric)
    per_panel = _per_panel(len(drawn))
    panels = math.ceil(len(drawn) / per_panel)
    columns = min(panels, 2)
    rows = math.ceil(panels / columns)
    legend = 1.3 + _CHARACTER * max(16, *(len(curve.label) for curve in drawn))
    figure.set_size_inches(
        (6.5 + legend, 5.5) if panels == 1 else (columns * (4.9 + legend), 3.7 * rows + 0.6)
    )
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for index, axes in enumerate(grid):
        mine = drawn[index * per_panel : (index + 1) * per_panel]
        if not mine:
            axes.remove()
            continue
        for curve in drawn if panels > 1 else ():
            axes.plot(curve.level, curve.score, color=_BEHIND, linewidth=0.8, zorder=1)
        for curve in mine:
            _draw(axes, curve)
        _dress(axes, mine, dense, metric, has_others=panels > 1)
    _set_levels(grid[0], [point.level for points in curves.values() for point in points], scale)
    figure.supxlabel(scale.label)
    figure.supylabel(metric.label)


def _curves(
    curves: Mapping[str, Sequence[SensitivityPoint]], scale: LevelScale, metric: Metric
) -> list[_Curve]:
    per_panel = _per_panel(len(curves))
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.88, per_panel))
    labels = parameter_labels(tuple(curves))
    drawn = []
    for index, (name, points) in enumerate(curves.items()):
        by_level = {point.level: point for point in points}
        ordered = [by_level[level] for level in scale.ordered(by_level)]
        place = index % per_panel
        style = {
            "color": colours[place],
            "linestyle": _LINE_STYLES[place % len(_LINE_STYLES)],
            "marker": _MARKERS[place],
        }
        levels = [scale.shown(point.level) for point in ordered]
        scores = [metric.of(point.score) for point in ordered]
        ends = [_interval(point) if metric.has_intervals else _NO_INTERVAL for point in ordered]
        low, high = np.array(ends, dtype=float).reshape(-1, 2).T
        drawn.append(_Curve(labels[name], np.array(levels), np.array(scores), low, high, style))
    return drawn


def _interval(point: SensitivityPoint) -> tuple[float, float]:
    if point.top1_low is None or point.top1_high is None:
        return _NO_INTERVAL
    return point.top1_low, point.top1_high


def _draw(axes: Axes, curve: _Curve) -> None:
    axes.plot(curve.level, curve.score, label=curve.label, linewidth=1.4, markersize=4, **curve.style)
    if curve.has_band:
        axes.fill_between(
            curve.level, curve.low, curve.high, color=curve.style["color"], alpha=_BAND, linewidth=0
        )


def _dress(
    axes: Axes, curves: Sequence[_Curve], dense: float | None, metric: Metric, *, has_others: bool
) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if dense is not None:
        line = axes.axhline(dense, color=_DENSE_COLOUR, linewidth=1.0, linestyle=(0, (1, 1)), zorder=2)
        handles.insert(0, line)
        labels.insert(0, f"dense: {metric.value.format(dense)}")
    if any(curve.has_band for curve in curves):
        handles.append(Patch(color="0.5", alpha=2 * _BAND, linewidth=0))
        labels.append("95 % interval")
    if has_others:
        handles.append(Line2D([], [], color=_BEHIND, linewidth=0.8))
        labels.append("in other panels")
    axes.legend(
        handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, handlelength=3.2
    )
    axes.grid(visible=True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelbottom=True, labelleft=True)


def _set_levels(axes: Axes, levels: Sequence[float], scale: LevelScale) -> None:
    """Ticks and direction; the other panels share them."""
    shown = [scale.shown(level) for level in scale.ordered(levels)]
    if len(shown) <= _MOST_TICKS_AT_LEVELS or not scale.is_percent:
        axes.set_xticks(shown, [f"{level:.4g}" for level in shown])
    if not scale.is_percent:
        axes.invert_xaxis()


def _per_panel(count: int) -> int:
    """How many curves a panel takes: spread evenly over one panel, or over rows of two."""
    if count <= MOST_IN_ONE_PANEL:
        return count
    rows = math.ceil(count / (2 * MOST_PER_SMALL_PANEL))
    return math.ceil(count / (2 * rows))
