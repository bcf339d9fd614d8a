"""Pictures of a sweep, as PNG and SVG: one for each axis, and one of all axes together.

Equal points give equal files. Nothing of pyplot's global state is used.
Knows nothing about how the scores were measured.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distiller.atomic_file import write_whole
from distiller.errors import UsageError
from distiller.sensitivity.curves import Score, SensitivityPoint
from distiller.sensitivity.plot_curves import MOST_AS_LINES, draw_curves
from distiller.sensitivity.plot_heat_map import draw_heat_map
from distiller.sensitivity.plot_labels import dense_value, find_metric, level_scale
from distiller.sensitivity.plot_overview import draw_overview
from distiller.sensitivity.write_errors import reporting_failed_writes

__all__ = ["overview_figure", "plot_points", "sensitivities_to_png", "sensitivity_figure"]

_STEM = "sensitivity"
_SUFFIXES = (".png", ".svg")


def plot_points(
    points: Iterable[SensitivityPoint],
    folder: str | Path,
    metric: str = "top1",
    title: str = "Sensitivity",
) -> list[Path]:
    """Draw a sweep, everything as PNG and as SVG.

    Of one axis that is `sensitivity.png` and `.svg`. Of several it is `sensitivity_AXIS.png` and `.svg` for
    each (`:` becomes `-`), and `sensitivity.png` and `.svg` are an overview; there is none without a point of
    the dense model.

    Args:
        points: of one axis or several.
        folder: where the pictures go; each is written whole or not at all.
        metric: what is drawn: `top1` or `top5` (percent), or `loss`; an overview is of top-1 then.
        title: the first words of each title.

    Returns:
        The paths of the pictures, the overview first.

    Raises:
        UsageError: an unknown metric, or nothing to draw.
        UnknownNameError: a point of an unknown axis.
        SensitivityError: a file cannot be written.
    """
    points = list(points)
    find_metric(metric)
    by_axis: dict[str, list[SensitivityPoint]] = {}
    for point in points:
        by_axis.setdefault(point.axis, []).append(point)
    for own in by_axis.values() or [points]:
        _require_some(own)
    accuracy = "top1" if metric == "loss" else metric
    dense = {name: dense_value(points, find_metric(name)) for name in (metric, accuracy)}
    figures = {}
    if len(by_axis) > 1 and dense[accuracy] is not None:
        figures[_STEM] = overview_figure(points, accuracy, title)
    for axis, own in by_axis.items():
        stem = _STEM if len(by_axis) == 1 else f"{_STEM}_{axis.replace(':', '-') or 'unknown'}"
        heading = f"{title}: {axis}" if axis else title
        figures[stem] = sensitivity_figure(own, metric, heading, dense[metric])
    return [
        _save(figure, Path(folder) / f"{stem}{suffix}")
        for stem, figure in figures.items()
        for suffix in _SUFFIXES
    ]


def sensitivities_to_png(
    sensitivities: Mapping[str, Mapping[float, tuple[float, float, float]]],
    fname: str | Path,
    metric: str = "top1",
    title: str = "Pruning sensitivity",
    axis: str = "",
) -> Path:
    """Draw `{parameter: {level: (top1, top5, loss)}}`.

    (Distiller drew top-5 only, with the legend over the curves.)

    Args:
        sensitivities: what `perform_sensitivity_analysis` returns.
        fname: the picture, `.png` or `.svg`; written whole or not at all.
        metric: what is drawn: `top1` or `top5` (percent), or `loss`.
        title: the title.
        axis: that the levels are of; "": they are sparsities.

    Returns:
        The path of the picture.

    Raises:
        UsageError: an unknown metric or suffix, nothing to draw, or levels that are none of the axis.
        UnknownNameError: an unknown axis.
        SensitivityError: the file cannot be written.
    """
    path = Path(fname)
    find_metric(metric)
    if path.suffix.lower() not in _SUFFIXES:
        raise UsageError(f"sensitivity plot: the file must end in .png or .svg, got '{path.name}'")
    points = [
        SensitivityPoint(axis, name, level, Score(*score))
        for name, curve in sensitivities.items()
        for level, score in curve.items()
    ]
    _require_some(points)
    if not axis:
        _require_sparsities(points)
    return _save(sensitivity_figure(points, metric, title, dense_value(points, find_metric(metric))), path)


def sensitivity_figure(
    points: Sequence[SensitivityPoint], metric: str, title: str, dense: float | None
) -> Figure:
    """The figure of one axis.

    Args:
        points: at least one, all of the same axis.
        metric: as of `plot_points`.
        title: the title.
        dense: the metric of the uncompressed model, if known.
    """
    curves = _by_parameter(points)
    draw = draw_heat_map if len(curves) > MOST_AS_LINES else draw_curves
    figure = _figure(title)
    draw(figure, curves, level_scale(points[0].axis), find_metric(metric), dense)
    return figure


def overview_figure(points: Sequence[SensitivityPoint], metric: str, title: str) -> Figure:
    """The figure of all axes together.

    Args:
        points: the dense one among them.
        metric: `top1` or `top5`.
        title: the title.
    """
    found = find_metric(metric)
    dense = dense_value(points, found)
    assert dense is not None
    by_axis = {
        axis: _by_parameter([point for point in points if point.axis == axis])
        for axis in dict.fromkeys(point.axis for point in points)
    }
    figure = _figure(title)
    draw_overview(figure, by_axis, found, dense)
    return figure


def _by_parameter(points: Iterable[SensitivityPoint]) -> dict[str, list[SensitivityPoint]]:
    curves: dict[str, list[SensitivityPoint]] = {}
    for point in points:
        curves.setdefault(point.parameter, []).append(point)
    return curves


def _require_some(points: Sequence[SensitivityPoint]) -> None:
    """Refuse an axis without a point that can be drawn."""
    if not points:
        raise UsageError("sensitivity plot: at least one point is needed, got none")
    axis = points[0].axis
    if not level_scale(axis).ordered(point.level for point in points):
        raise UsageError(
            f"sensitivity plot: axis '{axis}': at least one point besides the dense one is needed"
        )


def _require_sparsities(points: Iterable[SensitivityPoint]) -> None:
    for point in points:
        if not 0 <= point.level <= 1:
            raise UsageError(
                f"sensitivity plot: '{point.parameter}': a sparsity 0..1 expected, got {point.level:g}; "
                "say with 'axis' what the levels are"
            )


def _figure(title: str) -> Figure:
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize="x-large")
    return figure


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    if path.suffix.lower() == ".svg":
        # Neither a date nor random ids.
        with matplotlib.rc_context({"svg.hashsalt": _STEM}):
            figure.savefig(buffer, format="svg", metadata={"Date": None})
    else:
        figure.savefig(buffer, format="png", dpi=130)
    with reporting_failed_writes(path):
        write_whole(path, buffer.getvalue())
    return path
