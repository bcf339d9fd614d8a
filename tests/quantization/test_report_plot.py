"""The picture of a quantization report: readable for few and for many layers."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distiller.quantization.report_plot import report_figure
from distiller.quantization.report_rows import LayerRow, TensorFigures


def row(index: int, error_share: float = 0.0, name: str | None = None, **figures: TensorFigures) -> LayerRow:
    places = {
        "weight": TensorFigures(),
        "input": TensorFigures(),
        "output": TensorFigures(8, sqnr_db=20.0 + index % 9),
    }
    return LayerRow(
        name or f"layer{index}.conv", "Conv2d", **{**places, **figures}, error=error_share,
        error_share=error_share, top1=90.0 - error_share, loss=0.5,
    )  # fmt: skip


def rows_of(count: int) -> list[LayerRow]:
    weight = TensorFigures(4, -1, 1, -1, 1, 0.1, 0.1, 0.02, 31.0)
    return [row(index, (index + 1) / count, weight=weight) for index in range(count)]


@functools.cache
def drawn(count: int, has_scores: bool = True) -> Figure:
    figure = report_figure(rows_of(count), (91.0, 0.4) if has_scores else None, "title")
    FigureCanvasAgg(figure).draw()
    return figure


@pytest.mark.parametrize("count", [1, 5, 60])
def test_nothing_overlaps_and_nothing_is_cut_off(count) -> None:
    figure = drawn(count)
    boxes = [axes.get_window_extent() for axes in figure.axes]
    boxes += [axes.xaxis.label.get_window_extent() for axes in figure.axes]
    boxes += [axes.get_legend().get_window_extent() for axes in figure.axes if axes.get_legend()]
    names = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    page = figure.bbox
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 for box in boxes + names)
    assert all(page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes + names)
    assert not any(a.overlaps(b) for index, a in enumerate(boxes) for b in boxes[:index])
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(names))


@pytest.mark.parametrize("count", [5, 60])
def test_layers_are_named_from_above_with_their_widths(count) -> None:
    axes = drawn(count).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"layer{index}.conv  W4A8" for index in range(count)
    ]
    bottom, top = axes.get_ylim()
    assert bottom > count - 1 > 0 > top


def test_without_scores_there_are_no_panels_of_them() -> None:
    assert [len(drawn(5, has_scores).axes) for has_scores in (True, False)] == [5, 3]
    assert drawn(5).axes[3].get_xlabel() == "Drop of top-1 accuracy\nfrom 91.00 % (points)"


def test_bars_are_the_shares_and_the_largest_stand_out() -> None:
    bars = drawn(5).axes[0].patches
    assert [bar.get_width() for bar in bars] == pytest.approx([20, 40, 60, 80, 100])
    colours = [bar.get_facecolor() for bar in bars]
    assert colours[0] == colours[1]
    assert colours[1] != colours[2] == colours[3] == colours[4]


def test_an_infinite_ratio_is_an_open_mark_at_the_right_end() -> None:
    exact = TensorFigures(4, sqnr_db=math.inf)
    figure = report_figure([row(0, weight=exact), row(1)], None, "title")
    lines = [line for line in figure.axes[1].get_lines() if line.get_markerfacecolor() == "none"]
    ends = [x for line in lines for x in line.get_xdata() if math.isfinite(x)]
    assert len(ends) == 1
    assert ends[0] > 21.0
    assert "open mark: nothing is lost" in figure.axes[1].get_xlabel()
    assert "open mark" not in drawn(5).axes[1].get_xlabel()


def test_what_is_not_known_is_not_drawn() -> None:
    figure = report_figure([row(0, output=TensorFigures())], None, "title")
    FigureCanvasAgg(figure).draw()
    assert figure.axes[1].get_legend() is None
    assert figure.axes[0].get_yticklabels()[0].get_text() == "layer0.conv"


def test_long_names_keep_their_ends() -> None:
    name = ".".join(["encoder"] * 12)
    figure = report_figure([row(0, name=f"{name}.q"), row(1, name=f"{name}.k")], None, "title")
    labels = [label.get_text().split("  ")[0] for label in figure.axes[0].get_yticklabels()]
    assert labels[0] != labels[1]
    assert all(len(label) == 56 and label.startswith("…") for label in labels)


def test_pyplot_knows_nothing_of_it() -> None:
    before = pyplot.get_fignums()
    report_figure(rows_of(2), None, "title")
    assert pyplot.get_fignums() == before
