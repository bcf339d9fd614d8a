import math
from dataclasses import replace
from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from distiller.sensitivity.curves import Score, SensitivityPoint
from distiller.sensitivity.plot import sensitivity_figure
from tests.sensitivity.swept_points import BITS, legend_labels, points_of, tick_labels

LONG = "encoder.layers.{}.self_attention.query_key_value_projection{}.weight"


@pytest.mark.parametrize("count, name", [(1, "w{}"), (5, LONG), (22, LONG), (60, "layer{}.weight")])
def test_nothing_overlaps_and_nothing_is_cut_off(count, name):
    figure = sensitivity_figure(points_of(count, interval=2.0, name=name), "top1", "title", 90.0)
    FigureCanvasAgg(figure).draw()
    panels = [axes.get_window_extent() for axes in figure.axes]
    legends = [axes.get_legend().get_window_extent() for axes in figure.axes]
    page = figure.bbox

    assert all(legend.x0 > panel.x1 for panel, legend in zip(panels, legends, strict=True))
    assert all(box.x0 >= page.x0 and box.x1 <= page.x1 for box in (*panels, *legends))
    assert not any(one.overlaps(other) for one, other in combinations((*panels, *legends), 2))
    assert all(panel.width > 0.25 * page.width for panel in panels)


@pytest.mark.parametrize("count, panels", [(1, 1), (12, 1), (13, 2), (22, 4), (60, 8), (64, 8)])
def test_many_curves_are_spread_over_panels(count, panels):
    figure = sensitivity_figure(points_of(count), "top1", "", 90.0)

    assert len(figure.axes) == panels
    others = ["in other panels"] if panels > 1 else []
    assert all(
        legend_labels(axes)[len(legend_labels(axes)) - len(others) :] == others for axes in figure.axes
    )
    names = [label for axes in figure.axes for label in legend_labels(axes)[1:] if label not in others]
    assert names == [f"layer{index}" for index in range(count)]


@pytest.mark.parametrize("count", [5, 12, 22, 60])
def test_curves_of_one_panel_differ_in_colour_and_marker(count):
    for axes in sensitivity_figure(points_of(count), "top1", "", None).axes:
        looks = [
            (tuple(line.get_color()), line.get_marker())
            for line in axes.get_lines()
            if line.get_label().startswith("layer")
        ]
        assert len({colour for colour, _ in looks}) == len(looks)
        assert len({marker for _, marker in looks}) == len(looks)


@pytest.mark.parametrize(
    "metric, dense, label, axis_label",
    [
        ("top1", 90.0, "dense: top-1 90.00 %", "Top-1 accuracy (%)"),
        ("top5", 99.0, "dense: top-5 99.00 %", "Top-5 accuracy (%)"),
        ("loss", 0.3, "dense: loss 0.3", "Loss"),
    ],
)
def test_dense_score_is_marked_by_a_line_and_its_value(metric, dense, label, axis_label):
    figure = sensitivity_figure(points_of(5), metric, "", dense)

    (axes,) = figure.axes
    assert legend_labels(axes)[0] == label
    assert set(axes.get_lines()[-1].get_ydata()) == {dense}
    assert figure.get_supylabel() == axis_label


def test_curves_are_drawn_in_percent_by_ascending_sparsity():
    points = [
        SensitivityPoint("", "w", level, score)
        for level, score in {0.9: Score(50, 60, 2), 0.0: Score(90, 99, 1)}.items()
    ]
    figure = sensitivity_figure(points, "top1", "", 90.0)

    (axes,) = figure.axes
    line = axes.get_lines()[0]
    assert line.get_xdata().tolist() == [0, 90]
    assert line.get_ydata().tolist() == [90, 50]
    assert figure.get_supxlabel() == "Sparsity of the one pruned parameter (%)"
    assert axes.get_xlim()[0] < axes.get_xlim()[1]


def test_bits_run_from_many_to_few_and_the_dense_32_are_only_the_line():
    figure = sensitivity_figure(points_of(2, BITS[::-1], "weight-bits"), "top1", "", 90.0)

    (axes,) = figure.axes
    left, right = axes.get_xlim()
    assert 8 < left < 32
    assert right < 2
    assert tick_labels(axes.get_xticklabels()) == ["8", "4", "2"]
    assert axes.get_lines()[0].get_xdata().tolist() == [8, 4, 2]
    assert legend_labels(axes)[0] == "dense: top-1 90.00 %"
    assert figure.get_supxlabel() == "Bits of the weight"


def test_all_panels_of_bits_run_from_many_to_few():
    figure = sensitivity_figure(points_of(22, BITS, "activation-bits"), "top1", "", 90.0)

    assert len(figure.axes) == 4
    assert {axes.xaxis_inverted() for axes in figure.axes} == {True}


def test_few_levels_are_ticks_of_their_own():
    figure = sensitivity_figure(points_of(2, (0.0, 0.25, 0.5, 0.75), "n:m"), "top1", "", 90.0)

    assert tick_labels(figure.axes[0].get_xticklabels()) == ["0", "25", "50", "75"]


def test_curves_without_a_dense_point_have_no_dense_line():
    figure = sensitivity_figure(points_of(3, (0.5, 0.9)), "top1", "", None)

    assert legend_labels(figure.axes[0]) == ["layer0", "layer1", "layer2"]


def test_intervals_are_bands_between_their_ends():
    points = points_of(2, interval=2.0)
    (axes,) = sensitivity_figure(points, "top1", "", 90.0).axes

    band = axes.collections[0].get_paths()[0].vertices
    assert len(axes.collections) == 2
    for x, middle in ((0, 90.0), (50, 89.5), (90, 89.1)):
        ends = {round(y, 6) for at, y in band if at == x}
        assert ends == {middle - 2, middle + 2}
    assert legend_labels(axes) == ["dense: top-1 90.00 %", "layer0", "layer1", "95 % interval"]


def test_points_without_an_interval_have_no_band():
    points = points_of(2, interval=2.0)
    whole = [replace(point, top1_low=None, top1_high=None) for point in points]
    (axes,) = sensitivity_figure([*points[:3], *whole[3:]], "top1", "", 90.0).axes

    assert len(axes.collections) == 1
    (axes,) = sensitivity_figure(whole, "top1", "", 90.0).axes
    assert not axes.collections
    assert "95 % interval" not in legend_labels(axes)


@pytest.mark.parametrize("metric", ["top5", "loss"])
def test_only_top1_has_bands(metric):
    (axes,) = sensitivity_figure(points_of(2, interval=2.0), metric, "", 90.0).axes

    assert not axes.collections


def test_scores_that_are_not_finite_can_be_drawn():
    points = points_of(3)
    points[1] = replace(points[1], score=Score(10.0, 50.0, math.inf))
    points[4] = replace(points[4], score=Score(10.0, 50.0, math.nan))

    FigureCanvasAgg(sensitivity_figure(points, "loss", "", 0.3)).draw()


@pytest.mark.parametrize("levels", [(0.5,), (0.0,)])
def test_a_single_level_can_be_drawn(levels):
    FigureCanvasAgg(sensitivity_figure(points_of(1, levels), "top1", "", None)).draw()


def test_a_curve_of_which_only_the_dense_point_is_known_is_empty():
    points = [*points_of(1, (32.0,), "weight-bits"), *points_of(2, BITS, "weight-bits")[len(BITS) :]]
    figure = sensitivity_figure(points, "top1", "", 90.0)
    FigureCanvasAgg(figure).draw()

    assert [len(line.get_xdata()) for line in figure.axes[0].get_lines()[:2]] == [0, 3]
