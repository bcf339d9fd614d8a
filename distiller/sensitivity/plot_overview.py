"""A sweep of several axes at a glance: how far each parameter bears each kind of compression.

Knows nothing about how the scores were measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distiller.sensitivity.curves import SensitivityPoint
from distiller.sensitivity.plot_labels import LevelScale, Metric, level_scale, parameter_labels
from distiller.sensitivity.tolerated_levels import MAX_DROP, Tolerated, tolerated_levels

__all__ = ["draw_overview"]

_NOT_SWEPT = "0.92"
_DARK = 0.65  # of the colours' range; from there on letters are white
_CHARACTER = 0.075  # inches, of a row's label


def draw_overview(
    figure: Figure,
    axes_points: Mapping[str, Mapping[str, Sequence[SensitivityPoint]]],
    metric: Metric,
    dense: float,
) -> None:
    """Draw a table: a row for each parameter, a column for each axis.

    A cell says the strongest level up to which no level costs more than a point; its colour, how many of the
    swept levels that are.

    Args:
        figure: an empty one; its size is set.
        axes_points: by axis and parameter, the points.
        metric: an accuracy.
        dense: its value for the uncompressed model.
    """
    names = _merged(axes_points.values())
    scales = {axis: level_scale(axis) for axis in axes_points}
    share = np.full((len(names), len(axes_points)), math.nan)
    texts: dict[tuple[int, int], str] = {}
    for column, (axis, curves) in enumerate(axes_points.items()):
        for name, curve in curves.items():
            place = names.index(name), column
            found = tolerated_levels(curve, scales[axis], metric, dense)
            if found.swept:
                share[place] = len(found.levels) / found.swept
                texts[place] = _text(found, scales[axis])
    labels = parameter_labels(names)
    longest = max(len(label) for label in labels.values())
    figure.set_size_inches(
        max(6.5, 2.4 + _CHARACTER * longest + 1.15 * len(scales)), max(4.0, 2.0 + 0.2 * len(names))
    )
    table = figure.subplots()
    table.set_facecolor(_NOT_SWEPT)
    image = table.imshow(
        100 * share, aspect="auto", interpolation="nearest", cmap="YlGn", vmin=0.0, vmax=100.0
    )
    for (row, column), text in texts.items():
        colour = "white" if share[row, column] > _DARK else "black"
        table.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    table.set_yticks(range(len(names)), list(labels.values()), fontsize=8)
    headings = [_heading(axis, curves, scales[axis]) for axis, curves in axes_points.items()]
    table.set_xticks(range(len(headings)), headings, fontsize=8)
    table.tick_params(axis="x", top=True, labeltop=True, bottom=False, labelbottom=False)
    _draw_borders(table, *share.shape)
    short = metric.label.removesuffix(" (%)").lower()
    table.set_title(
        f"Strongest level at which each loses no more than {MAX_DROP:g} point of {short} by itself\n"
        f"(dense: {metric.value.format(dense)})",
        fontsize="medium",
    )
    figure.colorbar(image, ax=table, label="Swept levels borne (%)", aspect=40)


def _merged(orders: Iterable[Iterable[str]]) -> list[str]:
    """All names once; what only a later order has comes behind its neighbour there."""
    merged: list[str] = []
    for order in orders:
        place = 0
        for name in order:
            if name not in merged:
                merged.insert(place, name)
            place = merged.index(name) + 1
    return merged


def _text(found: Tolerated, scale: LevelScale) -> str:
    return scale.text(found.levels[-1]) if found.levels else "none"


def _heading(axis: str, curves: Mapping[str, Sequence[SensitivityPoint]], scale: LevelScale) -> str:
    """The axis, and from where to where it was swept."""
    levels = scale.ordered(point.level for curve in curves.values() for point in curve)
    swept = [level for level in levels if level != scale.dense_level]
    ends = dict.fromkeys(scale.text(level) for level in (swept[:1] + swept[-1:]))
    return f"{axis or 'pruned'}\n({' to '.join(ends) or 'dense only'})"


def _draw_borders(table: Axes, rows: int, columns: int) -> None:
    table.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    table.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    table.grid(which="minor", color="white", linewidth=1.5)
    table.tick_params(which="minor", length=0)
