"""The figures of a layer-wise sweep, or of nn-compress-haiku's: one for each technique, and all together.

    accuracy-TECHNIQUE, latency-TECHNIQUE   by the fraction; from a CSV also by bits, and by stored bytes
    accuracy, latency                       likewise, of all techniques, if there are several

The fraction means another thing for each technique (elements, distinct values, rank); stored bytes can be
compared.
Knows nothing about how points were measured, and nothing of pyplot's global state.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distiller.atomic_file import write_whole
from distiller.layerwise.log import read_points
from distiller.layerwise.points import LayerwisePoint
from distiller.layerwise.source_files import METRICS, read_source_files
from distiller.sensitivity.write_errors import reporting_failed_writes

__all__ = ["Curve", "draw_layerwise", "layerwise_curves", "layerwise_figures"]

_X_LABELS = {
    "fraction": "Fraction, as each technique means it",
    "bits": "Bits of a code",
    "stored": "Stored bytes (% of the dense network)",
}
_Y_LABELS = {"accuracy": "Top-1 accuracy (%)", "latency": "Latency (s)"}
_OWN_FRACTIONS = {
    "prune": "Fraction of the weights that is zero",
    "quant": "Fraction of the distinct values that is gone",
    "kmeans": "Fraction of the distinct values that is gone",
    "svd": "Fraction of the rank that is gone",
}
_SETTLED = ("prune", "quant", "kmeans", "svd")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a figure.

    Attributes:
        metric: `accuracy` or `latency`.
        technique: what it is of.
        axis: what x is: `fraction`, `bits`, or `stored`, percent of the dense bytes.
        x: ascending or not.
        y: percent, or seconds.
        kind: empty; `bits` of points on the axis of bits that are drawn over stored bytes; of latencies also
            `dense` (the uncompressed network, in turns with the others) and `factored`.
        low: first quartiles of latencies; empty: unknown.
        high: third quartiles, likewise.
    """

    metric: str
    technique: str
    axis: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    kind: str = ""
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    @property
    def label(self) -> str:
        """In a legend."""
        kinds = {"": "", "bits": ", by bits", "dense": ": dense", "factored": ", really factored"}
        return f"{self.technique}{kinds[self.kind]}"


def draw_layerwise(folder: str | Path, into: str | Path) -> list[Path]:
    """Draw what a folder holds, as PNG and SVG.

    Args:
        folder: of a sweep, or of JSON files of nn-compress-haiku.
        into: where the figures go; made when it is missing.

    Returns:
        The paths.

    Raises:
        SensitivityError: the folder holds no such files, one is damaged, or a figure cannot be written.
    """
    figures = layerwise_figures(layerwise_curves(folder))
    into = Path(into)
    with reporting_failed_writes(into):
        into.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # it has found its places, which takes as long as all the rest
        for suffix in (".png", ".svg"):
            path = into / f"{name}{suffix}"
            with reporting_failed_writes(path):
                write_whole(path, _encoded(figure, suffix))
            written.append(path)
    return written


def layerwise_curves(folder: str | Path) -> list[Curve]:
    """The curves in a folder: from its CSV, where there is one, else from its JSON files.

    Raises:
        SensitivityError: it holds neither, or one that is damaged.
    """
    points = read_points(folder)
    if points:
        return _curves_of_points(points)
    return [
        Curve(metric, technique, "fraction", tuple(x), tuple(_shown(metric, value) for value in y))
        for metric, of_metric in read_source_files(folder).items()
        for technique, (x, y) in sorted(of_metric.items(), key=lambda item: _rank(item[0]))
    ]


def layerwise_figures(curves: Sequence[Curve]) -> dict[str, Figure]:
    """The figures by their names: a panel for each axis, a line for each curve."""
    figures = {}
    for metric in METRICS:
        own = [curve for curve in curves if curve.metric == metric]
        techniques = list(dict.fromkeys(curve.technique for curve in own))
        styles = _styles(techniques)
        for technique in techniques:
            chosen = [curve for curve in own if curve.technique == technique]
            figures[f"{metric}-{technique}"] = _figure(chosen, styles, metric, technique)
        if len(techniques) > 1:
            figures[metric] = _figure(own, styles, metric, "Layer-wise compression")
    return figures


def _curves_of_points(points: Sequence[LayerwisePoint]) -> list[Curve]:
    curves = []
    for metric in METRICS:
        for technique in dict.fromkeys(point.technique for point in points):
            for axis in ("fraction", "bits"):
                own = [p for p in points if (p.technique, p.axis) == (technique, axis)]
                kind = "bits" if axis == "bits" else ""
                curves += _over(metric, technique, axis, "", own, [point.value for point in own])
                shares = [100 * point.stored_share for point in own]
                curves += _over(metric, technique, "stored", kind, own, shares)
    return curves


def _over(
    metric: str, technique: str, axis: str, kind: str, points: Sequence[LayerwisePoint], x: Sequence[float]
) -> list[Curve]:
    """The curves of points over an axis: one, of latencies also those of the networks beside them."""
    if metric == "accuracy":
        y = tuple(_shown(metric, point.accuracy) for point in points)
        return [Curve(metric, technique, axis, tuple(x), y, kind)] if points else []
    found = []
    for of, column in ((kind, "latency_s"), ("dense", "dense_latency_s"), ("factored", "factored_latency_s")):
        timed = [
            (at, point) for at, point in zip(x, points, strict=True) if getattr(point, column) is not None
        ]
        if not timed:
            continue
        band = [[getattr(p, name) for _, p in timed] for name in ("latency_q1_s", "latency_q3_s")]
        low, high = band if column == "latency_s" and all(None not in ends for ends in band) else ((), ())
        y = tuple(getattr(point, column) for _, point in timed)
        found.append(
            Curve(metric, technique, axis, tuple(at for at, _ in timed), y, of, tuple(low), tuple(high))
        )
    return found


def _figure(
    curves: Sequence[Curve], styles: Mapping[str, Mapping[str, object]], metric: str, title: str
) -> Figure:
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    panels = [axis for axis in _X_LABELS if any(curve.axis == axis for curve in curves)]
    figure.set_size_inches(5.2 * len(panels) + 0.6, 4.2)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, axis in zip(grid, panels, strict=True):
        own = [curve for curve in curves if curve.axis == axis]
        _draw(axes, own, styles, metric)
        only = {curve.technique for curve in own}
        label = _OWN_FRACTIONS.get(next(iter(only)), "") if axis == "fraction" and len(only) == 1 else ""
        axes.set_xlabel(label or _X_LABELS[axis])
    grid[0].set_ylabel(_Y_LABELS[metric])
    figure.suptitle(title)
    return figure


def _draw(
    axes: Axes, curves: Sequence[Curve], styles: Mapping[str, Mapping[str, object]], metric: str
) -> None:
    for curve in curves:
        colour, marker = styles[curve.technique]["color"], styles[curve.technique]["marker"]
        line = {"": "-", "bits": "--", "dense": ":", "factored": "-."}[curve.kind]
        # The dense network is the reference of the others: without marks, and behind them.
        is_dense = curve.kind == "dense"
        axes.plot(
            curve.x, curve.y, label=curve.label, color=colour, linestyle=line, markersize=4,
            marker="" if is_dense else marker, linewidth=1 if is_dense else 1.5, zorder=1 if is_dense else 2,
        )  # fmt: skip
        if curve.low:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
    if metric == "latency":
        axes.set_ylim(bottom=0)
    axes.grid(visible=True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)


def _styles(techniques: Sequence[str]) -> dict[str, dict[str, object]]:
    """A colour and a mark for each technique; those of the four alone are always the same."""
    order = [*_SETTLED, *(technique for technique in techniques if technique not in _SETTLED)]
    colours = matplotlib.colormaps["tab10"]
    return {
        technique: {"color": colours(index % 10), "marker": _MARKERS[index % len(_MARKERS)]}
        for index, technique in enumerate(order)
    }


def _rank(technique: str) -> tuple[int, str]:
    return (_SETTLED.index(technique) if technique in _SETTLED else len(_SETTLED), technique)


def _shown(metric: str, value: float) -> float:
    return 100 * value if metric == "accuracy" else value


def _encoded(figure: Figure, suffix: str) -> bytes:
    buffer = io.BytesIO()
    # Equal curves give an equal SVG: no random ids.
    with matplotlib.rc_context({"svg.hashsalt": "layerwise"}):
        if suffix == ".svg":
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        else:
            figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
