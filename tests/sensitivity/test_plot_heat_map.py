import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from distiller.sensitivity.curves import Score
from distiller.sensitivity.plot import sensitivity_figure
from distiller.sensitivity.plot_heat_map import draw_heat_map
from distiller.sensitivity.plot_labels import find_metric, level_scale
from tests.sensitivity.swept_points import BITS, points_of, tick_labels


def drawn(points, metric="top1", dense=90.0):
    figure = Figure(layout="constrained")
    curves = {}
    for point in points:
        curves.setdefault(point.parameter, []).append(point)
    draw_heat_map(figure, curves, level_scale(points[0].axis), find_metric(metric), dense)
    return figure


def columns(figure):
    return [tick.label1.get_text() for tick in figure.axes[0].xaxis.get_major_ticks()]


def limits(figure):
    """The x of the line of each row."""
    return figure.axes[0].patches[0].get_data().values.tolist()


@pytest.mark.parametrize(
    "metric, dense, label",
    [
        ("top1", 90.0, "Drop of top-1 accuracy from dense (points)"),
        ("top5", 99.0, "Drop of top-5 accuracy from dense (points)"),
        ("loss", 0.3, "Rise of the loss from dense"),
    ],
)
def test_rows_are_parameters_and_columns_levels(metric, dense, label):
    figure = drawn(points_of(4), metric, dense)

    heat_map, colour_bar = figure.axes
    assert tick_labels(heat_map.get_yticklabels()) == ["layer0", "layer1", "layer2", "layer3"]
    assert columns(figure) == ["0", "50", "90"]
    assert heat_map.get_xlabel() == "Share of the elements pruned (%)"
    assert colour_bar.get_ylabel() == label
    change = heat_map.images[0].get_array()
    assert change[3, 2] == pytest.approx(4 * 0.9 if metric == "top1" else 0.9)
    assert change[3, 0] == 0


def test_more_curves_than_lines_can_show_become_a_heat_map():
    figure = sensitivity_figure(points_of(65), "top1", "title", 90.0)

    heat_map, _ = figure.axes
    assert heat_map.images[0].get_array().shape == (65, 3)
    assert figure.get_suptitle() == "title"


def test_bits_run_from_many_to_few_and_the_dense_32_have_no_column():
    figure = drawn(points_of(10, BITS, "weight-bits"), "top1", 90.0)

    heat_map = figure.axes[0]
    assert columns(figure) == ["8", "4", "2"]
    assert heat_map.images[0].get_array()[9].tolist() == pytest.approx([2.0, 6.0, 8.0])


def test_a_line_shows_where_more_than_a_point_is_lost():
    # Row i drops by (i + 1) level: 0.9 and 1.8 points at the last level, 1.5 at the middle one in row 2.
    figure = drawn(points_of(6), "top1", 90.0)

    assert limits(figure)[:4] == [2.5, 1.5, 0.5, 0.5]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "right of it: more than 1 point lost"
    ]


def test_the_line_is_left_of_everything_where_no_level_is_tolerated():
    figure = drawn(points_of(10, BITS, "weight-bits"), "top1", 90.0)

    # Row i drops by 0.2 (i + 1) at 8 bits, 0.6 (i + 1) at 4, 0.8 (i + 1) at 2.
    assert limits(figure)[:6] == [2.5, 0.5, 0.5, 0.5, 0.5, -0.5]
    assert figure.axes[0].get_xlim() == (-0.5, 2.5)


def test_a_loss_has_no_such_line():
    figure = drawn(points_of(6), "loss", 0.3)

    assert not figure.axes[0].patches
    assert not figure.legends


def test_without_a_dense_point_the_best_one_is_compared_to():
    figure = drawn(points_of(6, (0.5, 0.9)), "top1", None)

    heat_map, colour_bar = figure.axes
    assert heat_map.get_title() == "best: top-1 89.50 %"
    assert colour_bar.get_ylabel() == "Drop of top-1 accuracy from best (points)"
    assert heat_map.images[0].get_array()[0, 0] == 0


def test_the_best_loss_is_the_least():
    figure = drawn(points_of(6, (0.5, 0.9)), "loss", None)

    assert figure.axes[0].get_title() == "best: loss 0.8"


def test_the_widest_interval_is_told():
    points = points_of(6, interval=0.25)
    points[3] = replace(points[3], top1_low=88.0, top1_high=89.5)
    exact = drawn(points_of(6), "top1", 90.0)

    assert exact.axes[0].get_title() == "dense: top-1 90.00 %"
    assert drawn(points).axes[0].get_title() == (
        "dense: top-1 90.00 %; 95 % intervals: at most 0.75 points to either side"
    )


def test_what_is_missing_or_not_finite_is_left_white():
    points = points_of(10)
    points[4] = replace(points[4], score=Score(10.0, 50.0, math.nan))
    points[8] = replace(points[8], score=Score(10.0, 50.0, math.inf))
    figure = drawn(points[:-1], "loss", 0.3)
    FigureCanvasAgg(figure).draw()

    white = np.argwhere(np.ma.getmaskarray(np.ma.masked_invalid(figure.axes[0].images[0].get_array())))
    assert white.tolist() == [[1, 1], [2, 2], [9, 2]]


@pytest.mark.parametrize("levels", [(0.5,), (0.0,)])
def test_a_single_level_can_be_drawn(levels):
    FigureCanvasAgg(drawn(points_of(10, levels), "top1", None)).draw()


@pytest.mark.parametrize(
    "name", ["layer{}.weight", "blocks.{}.attention.query_key_value_projection_{}.linear"]
)
def test_nothing_overlaps_and_nothing_is_cut_off(name):
    figure = sensitivity_figure(points_of(70, name=name), "top1", "title", 90.0)
    FigureCanvasAgg(figure).draw()
    heat_map, page = figure.axes[0], figure.bbox

    rows = [text.get_window_extent() for text in heat_map.get_yticklabels()]
    assert all(box.x0 >= page.x0 for box in rows)
    assert not any(above.overlaps(below) for above, below in pairwise(rows))
    legend = figure.legends[0].get_window_extent()
    assert page.y0 <= legend.y0
    assert legend.y1 < heat_map.get_window_extent().y0
    assert heat_map.xaxis.label.get_window_extent().y0 >= legend.y1
