"""Sensitivity curves as a picture: score against sparsity, one line per parameter.

Up to 12 parameters share one panel; more are spread over panels of up to 8, in the order of
the model, every panel with all other curves in grey behind; beyond 64 they are the rows of a
heat map. Within a panel the colours run with the depth, dark (first) to light (last).
Knows nothing about how the scores were measured, and nothing of pyplot's global state.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from distiller.atomic_file import write_whole
from distiller.errors import UsageError, did_you_mean
from distiller.sensitivity.curves import Score, dense_score
from distiller.sensitivity.write_errors import reporting_failed_writes

MOST_IN_ONE_PANEL = 12
MOST_PER_SMALL_PANEL = 8
MOST_AS_LINES = 64

_METRICS = {"top1": "Top-1 accuracy (%)", "top5": "Top-5 accuracy (%)", "loss": "Loss"}
_SHORT_METRICS = {"top1": "top-1 {:.2f} %", "top5": "top-5 {:.2f} %", "loss": "loss {:.4g}"}
_LINE_STYLES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "d")  # one for each curve of a panel
_CHANGES = {
    "top1": "Drop of top-1 accuracy from {} (points)",
    "top5": "Drop of top-5 accuracy from {} (points)",
    "loss": "Rise of the loss from {}",
}
_X_LABEL = "Sparsity of the one pruned parameter (%)"
_DENSE_COLOUR = "black"
_BEHIND = "0.87"
_SUFFIX = ".weight"


@dataclass(frozen=True, slots=True)
class _Curve:
    name: str
    sparsity: np.ndarray  # percent, ascending
    score: np.ndarray
    style: Mapping[str, object]


def sensitivities_to_png(
    sensitivities: Mapping[str, Mapping[float, tuple[float, float, float]]],
    fname: str | Path,
    metric: str = "top1",
    title: str = "Pruning sensitivity",
) -> Path:
    """Draw `{parameter: {sparsity: (top1, top5, loss)}}`.

    (Distiller drew top-5 only, with the legend over the curves.)

    Args:
        sensitivities: what `perform_sensitivity_analysis` returns.
        fname: the picture, `.png` or `.svg`; written whole or not at all.
        metric: what is drawn over sparsity: `top1` or `top5` (percent), or `loss`.
        title: the title.

    Returns:
        The path of the picture.

    Raises:
        UsageError: an unknown metric or suffix, or nothing to draw.
        SensitivityError: the file cannot be written.
    """
    path = Path(fname)
    if metric not in _METRICS:
        raise UsageError(
            f"sensitivity plot: unknown metric '{metric}', not one of {', '.join(_METRICS)}"
            f"{did_you_mean(metric, _METRICS)}"
        )
    if path.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"sensitivity plot: the file must end in .png or .svg, got '{path.name}'")
    if not any(sensitivities.values()):
        raise UsageError("sensitivity plot: at least one point is needed, got none")
    # Equal curves give an equal SVG: no random ids.
    with matplotlib.rc_context({"svg.hashsalt": "sensitivity"}):
        picture = _encode(sensitivity_figure(sensitivities, metric, title), path.suffix.lower())
    with reporting_failed_writes(path):
        write_whole(path, picture)
    return path


def sensitivity_figure(
    sensitivities: Mapping[str, Mapping[float, tuple[float, float, float]]], metric: str, title: str
) -> Figure:
    """The figure that `sensitivities_to_png` writes; arguments as there."""
    column = Score._fields.index(metric)
    reference = dense_score(sensitivities)
    dense = None if reference is None else reference[column]
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    if len(sensitivities) > MOST_AS_LINES:
        _draw_heat_map(figure, sensitivities, column, dense, metric)
    else:
        _draw_panels(figure, _curves(sensitivities, column), dense, metric)
    figure.suptitle(title, fontsize="x-large")
    return figure


def _curves(
    sensitivities: Mapping[str, Mapping[float, tuple[float, float, float]]], column: int
) -> list[_Curve]:
    per_panel = _per_panel(len(sensitivities))
    colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.92, per_panel))
    curves = []
    for index, (name, points) in enumerate(sensitivities.items()):
        levels = sorted(points)
        place = index % per_panel
        style = {
            "color": colours[place],
            "linestyle": _LINE_STYLES[place % len(_LINE_STYLES)],
            "marker": _MARKERS[place],
        }
        scores = np.array([points[level][column] for level in levels], dtype=float)
        curves.append(_Curve(_label(name), 100 * np.array(levels, dtype=float), scores, style))
    return curves


def _draw_panels(figure: Figure, curves: Sequence[_Curve], dense: float | None, metric: str) -> None:
    per_panel = _per_panel(len(curves))
    panels = math.ceil(len(curves) / per_panel)
    columns = min(panels, 2)
    rows = math.ceil(panels / columns)
    figure.set_size_inches((9.5, 5.5) if panels == 1 else (7.5 * columns, 3.7 * rows + 0.6))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for index, axes in enumerate(grid):
        mine = curves[index * per_panel : (index + 1) * per_panel]
        if not mine:
            axes.remove()
            continue
        for curve in curves if panels > 1 else ():
            axes.plot(curve.sparsity, curve.score, color=_BEHIND, linewidth=0.8, zorder=1)
        for curve in mine:
            axes.plot(
                curve.sparsity, curve.score, label=curve.name, linewidth=1.4, markersize=4, **curve.style
            )
        _dress(axes, dense, metric)
    figure.supxlabel(_X_LABEL)
    figure.supylabel(_METRICS[metric])


def _dress(axes: Axes, dense: float | None, metric: str) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if dense is not None:
        line = axes.axhline(dense, color=_DENSE_COLOUR, linewidth=1.0, linestyle=(0, (1, 1)), zorder=2)
        handles.insert(0, line)
        labels.insert(0, f"dense: {_SHORT_METRICS[metric].format(dense)}")
    axes.legend(
        handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, handlelength=3.2
    )
    axes.grid(visible=True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelbottom=True, labelleft=True)


def _draw_heat_map(
    figure: Figure,
    sensitivities: Mapping[str, Mapping[float, tuple[float, float, float]]],
    column: int,
    dense: float | None,
    metric: str,
) -> None:
    levels = sorted({level for points in sensitivities.values() for level in points})
    missing = (math.nan,) * len(Score._fields)
    scores = np.array(
        [[points.get(level, missing)[column] for level in levels] for points in sensitivities.values()]
    )
    sign = 1.0 if metric == "loss" else -1.0
    reference = sign * min(sign * scores[np.isfinite(scores)], default=0.0) if dense is None else dense
    change = np.maximum(sign * (scores - reference), 0.0)
    change[~np.isfinite(change)] = math.nan  # left white
    figure.set_size_inches(max(8.0, 3.5 + 0.33 * len(levels)), 1.8 + 0.17 * len(scores))
    axes = figure.subplots()
    # The square root spreads the small changes, which are what decides how far to prune.
    norm = PowerNorm(0.5, vmin=0.0)
    image = axes.imshow(change, aspect="auto", interpolation="nearest", cmap="viridis_r", norm=norm)
    axes.set_yticks(range(len(scores)), [_label(name) for name in sensitivities], fontsize=7)
    axes.set_xticks(range(len(levels)), [f"{100 * level:g}" for level in levels], fontsize=8)
    axes.set_xlabel(_X_LABEL)
    origin = "best" if dense is None else "dense"
    axes.set_title(f"{origin}: {_SHORT_METRICS[metric].format(reference)}", fontsize="medium")
    figure.colorbar(image, ax=axes, label=_CHANGES[metric].format(origin), aspect=40)


def _per_panel(count: int) -> int:
    """How many curves a panel takes: spread evenly over one panel, or over rows of two."""
    if count <= MOST_IN_ONE_PANEL:
        return count
    rows = math.ceil(count / (2 * MOST_PER_SMALL_PANEL))
    return math.ceil(count / (2 * rows))


def _label(name: str) -> str:
    return name.removesuffix(_SUFFIX)


def _encode(figure: Figure, suffix: str) -> bytes:
    buffer = io.BytesIO()
    if suffix == ".svg":
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    else:
        figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
