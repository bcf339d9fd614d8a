"""A quantization report as a picture: a line for each layer, and beside each other its figures.

Layers are in the order of their calls, from above. Knows nothing about how the figures were measured, and
nothing of pyplot's global state.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distiller.quantization.report_rows import LayerRow, TensorFigures

__all__ = ["encoded", "report_figure"]

_PLACES = {"weight": ("s", "#3b528b"), "input": ("^", "#5ec962"), "output": ("o", "#c2501c")}
_BAR, _WORST_BAR = "0.72", "#c2501c"
_HIGHLIGHTED = 3
_LONGEST_NAME = 56
_INCHES_PER_LAYER, _INCHES_AROUND, _INCHES_PER_PANEL, _INCHES_PER_LETTER = 0.2, 1.7, 2.9, 0.065


def report_figure(rows: Sequence[LayerRow], float_score: tuple[float, float] | None, title: str) -> Figure:
    """The picture of a report.

    Args:
        rows: the layers, at least one.
        float_score: (top-1 in percent, loss) of the model in floating point; None leaves the panels of drops
            out.
        title: the title.
    """
    panels = 3 if float_score is None else 5
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    labels = [_label(row) for row in rows]
    figure.set_size_inches(
        _INCHES_PER_LETTER * max(map(len, labels)) + _INCHES_PER_PANEL * panels,
        _INCHES_AROUND + _INCHES_PER_LAYER * max(len(rows), 6),
    )
    grid = figure.subplots(1, panels, sharey=True)
    shares = [100 * row.error_share for row in rows]
    _draw_bars(grid[0], shares, "Share of the sum of the errors\nat the model's output (%)")
    _draw_ratios(grid[1], rows)
    _draw_clipped(grid[2], rows)
    if float_score is not None:
        top1, loss = float_score
        drops = [math.nan if row.top1 is None else top1 - row.top1 for row in rows]
        rises = [math.nan if row.loss is None else row.loss - loss for row in rows]
        _draw_bars(grid[3], drops, f"Drop of top-1 accuracy\nfrom {top1:.2f} % (points)")
        _draw_bars(grid[4], rises, f"Rise of the loss\nfrom {loss:.4g}")
    for axes in grid:
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(visible=True, axis="both", color="0.92", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=8)
    grid[0].set_yticks(range(len(rows)), labels, fontsize=7.5)
    figure.suptitle(title, fontsize="large")
    return figure


def encoded(figure: Figure, suffix: str) -> bytes:
    """The figure as a file; equal figures give equal files.

    Args:
        figure: the figure.
        suffix: `.png` or `.svg`.
    """
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "quantization report"}):
        if suffix == ".svg":
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        else:
            figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _draw_bars(axes: Axes, values: Sequence[float], label: str) -> None:
    """Bars, the largest ones highlighted."""
    known = [value for value in values if math.isfinite(value)]
    bound = sorted(known, reverse=True)[:_HIGHLIGHTED][-1] if known else math.inf
    colours = [_WORST_BAR if value >= bound and value > 0 else _BAR for value in values]
    axes.barh(range(len(values)), values, height=0.7, color=colours)
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_xlabel(label, fontsize=8.5)


def _draw_ratios(axes: Axes, rows: Sequence[LayerRow]) -> None:
    found = {place: [_or_nan(getattr(row, place).sqnr_db) for row in rows] for place in _PLACES}
    finite = [value for values in found.values() for value in values if math.isfinite(value)]
    right = max(finite, default=0.0) + 0.08 * max(np.ptp(finite) if finite else 0.0, 10.0)
    for place, values in found.items():
        _draw_marks(axes, place, values)
        # Where nothing is lost the ratio is infinite: an open mark at the right end.
        exact = [right if value == math.inf else math.nan for value in values]
        marker, colour = _PLACES[place]
        axes.plot(
            exact, range(len(rows)), marker, markerfacecolor="none", markeredgecolor=colour, markersize=4.5
        )
    has_exact = any(value == math.inf for values in found.values() for value in values)
    axes.set_xlabel(
        f"Signal to quantization noise (dB)\n{'open mark: nothing is lost' if has_exact else ''}",
        fontsize=8.5,
    )
    _legend(axes)


def _draw_clipped(axes: Axes, rows: Sequence[LayerRow]) -> None:
    for place in _PLACES:
        figures: list[TensorFigures] = [getattr(row, place) for row in rows]
        shares = [_or_nan(None if each.clipped is None else 100 * each.clipped) for each in figures]
        _draw_marks(axes, place, shares)
    # Small shares matter: evenly up to a hundredth of a percent, by powers of ten beyond.
    axes.set_xscale("symlog", linthresh=0.01)
    axes.xaxis.set_major_formatter(lambda value, _position: f"{value:g}")
    axes.set_xlim(left=-0.002, right=max(axes.get_xlim()[1], 0.1))
    axes.set_xlabel("Values beyond the ends\nof the grid (%)", fontsize=8.5)
    _legend(axes)


def _draw_marks(axes: Axes, place: str, values: Sequence[float]) -> None:
    marker, colour = _PLACES[place]
    finite = [value if math.isfinite(value) else math.nan for value in values]
    if any(map(math.isfinite, values)) or any(value == math.inf for value in values):
        axes.plot(finite, range(len(values)), marker, color=colour, markersize=4.5, alpha=0.85, label=place)


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        axes.legend(
            handles,
            labels,
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=len(handles),
            frameon=False,
            fontsize=7.5,
            handletextpad=0.1,
            columnspacing=0.8,
        )


def _label(row: LayerRow) -> str:
    """The layer's name, and the widths of its weight and of what it puts out, or reads."""
    name = row.name
    if len(name) > _LONGEST_NAME:
        name = f"…{name[1 - _LONGEST_NAME :]}"  # names differ behind
    activations = row.output.bits or row.input.bits
    weight = f"W{row.weight.bits}" if row.weight.bits else ""
    widths = weight + (f"A{activations}" if activations else "")
    return f"{name}  {widths}".rstrip()


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
