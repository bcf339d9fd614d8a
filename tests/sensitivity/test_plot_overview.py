from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from distiller.sensitivity.curves import Score
from distiller.sensitivity.plot import overview_figure
from tests.sensitivity.swept_points import BITS, points_of, tick_labels


def cells(figure):
    """{(row, column): text}."""
    return {
        (text.get_position()[1], text.get_position()[0]): text.get_text() for text in figure.axes[0].texts
    }


def test_cells_say_the_strongest_level_that_costs_no_more_than_a_point():
    # Row i drops by (i + 1) level on elements; by 0.2 (i + 1), 0.6 (i + 1), 0.8 (i + 1) at 8, 4, 2 bits.
    figure = overview_figure([*points_of(3), *points_of(3, BITS, "weight-bits")], "top1", "title")

    assert cells(figure) == {
        (0, 0): "90 %", (1, 0): "50 %", (2, 0): "none",
        (0, 1): "2 bits", (1, 1): "8 bits", (2, 1): "8 bits",
    }  # fmt: skip
    share = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(share, [[100, 100], [50, 100 / 3], [0, 100 / 3]])


def test_columns_say_the_axis_and_its_range():
    figure = overview_figure([*points_of(3), *points_of(3, BITS, "activation-bits")], "top1", "title")

    table, colour_bar = figure.axes
    assert tick_labels(table.get_xticklabels()) == [
        "element\n(50 % to 90 %)",
        "activation-bits\n(8 bits to 2 bits)",
    ]
    assert tick_labels(table.get_yticklabels()) == ["layer0", "layer1", "layer2"]
    assert table.get_title() == (
        "Strongest level at which each loses no more than 1 point of top-1 accuracy by itself\n"
        "(dense: top-1 90.00 %)"
    )
    assert colour_bar.get_ylabel() == "Swept levels borne (%)"


def test_accuracy_may_be_top5():
    figure = overview_figure([*points_of(30), *points_of(1, axis="filter")], "top5", "")

    assert set(cells(figure).values()) == {"90 %"}  # top-5 falls by 0.9 at most
    assert "top-5 accuracy" in figure.axes[0].get_title()


def test_what_was_not_swept_on_an_axis_has_an_empty_cell():
    figure = overview_figure([*points_of(3), *points_of(2, axis="filter")], "top1", "")

    assert (2, 1) not in cells(figure)
    share = figure.axes[0].images[0].get_array()
    assert np.argwhere(np.ma.getmaskarray(share)).tolist() == [[2, 1]]


def test_what_only_a_later_axis_has_stands_behind_its_neighbour_there():
    filters = [point for point in points_of(4, axis="filter") if point.parameter != "layer2.weight"]
    figure = overview_figure([*filters, *points_of(5)], "top1", "")

    assert tick_labels(figure.axes[0].get_yticklabels()) == [f"layer{index}" for index in range(5)]


def test_a_parameter_of_which_only_the_dense_point_is_known_has_an_empty_cell():
    figure = overview_figure([*points_of(2)[:4], *points_of(2, BITS, "weight-bits")], "top1", "")

    assert (1, 0) not in cells(figure)


def test_the_dense_point_of_any_axis_is_compared_to():
    points = [*points_of(2, (0.5, 0.9)), *points_of(2, BITS, "weight-bits")]
    points[0] = replace(points[0], score=Score(88.0, 99.0, 1.0))

    assert cells(overview_figure(points, "top1", ""))[0, 0] == "none"


def test_letters_stand_out_from_their_cells():
    figure = overview_figure([*points_of(3), *points_of(3, axis="filter")], "top1", "")

    colours = {text.get_text(): text.get_color() for text in figure.axes[0].texts}
    assert colours == {"90 %": "white", "50 %": "black", "none": "black"}


@pytest.mark.parametrize("count", [2, 30])
def test_nothing_overlaps_and_nothing_is_cut_off(count):
    axes = ["element", "filter", "channel", "group", "n:m", "rank"]
    points = [point for axis in axes for point in points_of(count, (0.0, 0.25, 0.5), axis)]
    points += [point for axis in ("weight-bits", "activation-bits") for point in points_of(count, BITS, axis)]
    figure = overview_figure(points, "top1", "A title")
    FigureCanvasAgg(figure).draw()
    (table, colour_bar), page = figure.axes, figure.bbox

    headings = [text.get_window_extent() for text in table.get_xticklabels()]
    rows = [text.get_window_extent() for text in table.get_yticklabels()]
    for labels in (headings, rows):
        assert not any(one.overlaps(other) for one, other in pairwise(labels))
    title = table.title.get_window_extent()
    assert all(title.y0 >= box.y1 for box in headings)
    texts = [table.title, colour_bar.yaxis.label, figure._suptitle]
    for box in (*headings, *rows, *(text.get_window_extent() for text in texts)):
        assert page.x0 <= box.x0 < box.x1 <= page.x1
        assert page.y0 <= box.y0 < box.y1 <= page.y1
