import functools
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from distiller.errors import UsageError
from distiller.sensitivity.curves import Score
from distiller.sensitivity.plot import sensitivities_to_png, sensitivity_figure
from distiller.sensitivity.report import sensitivities_from_csv

DISTILLERS = Path(__file__).resolve().parents[2] / "../shared/compat/sensitivity"


def curves_of(count, levels=(0.0, 0.5, 0.9)):
    return {
        f"layer{index}.weight": {
            level: Score(90 - (index + 1) * level, 99 - level, 0.3 + level) for level in levels
        }
        for index in range(count)
    }


@functools.cache
def drawn(count, metric="top1"):
    figure = sensitivity_figure(curves_of(count), metric, "title")
    FigureCanvasAgg(figure).draw()
    return figure


def legend_labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("count", [1, 5, 12, 22, 60])
def test_legend_does_not_cover_the_curves(count):
    for axes in drawn(count).axes:
        legend = axes.get_legend().get_window_extent()
        assert legend.x0 > axes.get_window_extent().x1


@pytest.mark.parametrize("count", [5, 22, 60])
def test_nothing_overlaps_and_nothing_is_cut_off(count):
    figure = drawn(count)
    boxes = [
        box
        for axes in figure.axes
        for box in (axes.get_window_extent(), axes.get_legend().get_window_extent())
    ]
    page = figure.bbox

    assert all(box.x0 >= page.x0 and box.x1 <= page.x1 for box in boxes)
    assert not any(a.overlaps(b) for index, a in enumerate(boxes) for b in boxes[:index])


@pytest.mark.parametrize("count, panels", [(1, 1), (12, 1), (13, 2), (22, 4), (60, 8), (64, 8)])
def test_many_curves_are_spread_over_panels(count, panels):
    figure = drawn(count)

    assert len(figure.axes) == panels
    names = [label for axes in figure.axes for label in legend_labels(axes)[1:]]
    assert names == [f"layer{index}" for index in range(count)]


@pytest.mark.parametrize("count", [5, 12, 22, 60])
def test_curves_of_one_panel_differ_in_colour_and_marker(count):
    for axes in drawn(count).axes:
        looks = [
            (tuple(line.get_color()), line.get_marker())
            for line in axes.get_lines()
            if line.get_label().startswith("layer")
        ]
        assert len({colour for colour, _ in looks}) == len(looks)
        assert len({marker for _, marker in looks}) == len(looks)


@pytest.mark.parametrize(
    "metric, label, axis_label",
    [
        ("top1", "dense: top-1 90.00 %", "Top-1 accuracy (%)"),
        ("top5", "dense: top-5 99.00 %", "Top-5 accuracy (%)"),
        ("loss", "dense: loss 0.3", "Loss"),
    ],
)
def test_dense_score_is_marked_by_a_line_and_its_value(metric, label, axis_label):
    figure = drawn(5, metric)

    (axes,) = figure.axes
    assert legend_labels(axes)[0] == label
    dense = axes.get_lines()[-1]
    assert set(dense.get_ydata()) == {getattr(curves_of(1)["layer0.weight"][0.0], metric)}
    assert figure.get_supylabel() == axis_label
    assert figure.get_supxlabel() == "Sparsity of the one pruned parameter (%)"


def test_curves_are_drawn_in_percent_by_ascending_sparsity():
    figure = sensitivity_figure({"w": {0.9: Score(50, 60, 2), 0.0: Score(90, 99, 1)}}, "top1", "")

    line = figure.axes[0].get_lines()[0]
    assert line.get_xdata().tolist() == [0, 90]
    assert line.get_ydata().tolist() == [90, 50]


def test_curves_without_a_dense_point_have_no_dense_line():
    figure = sensitivity_figure(curves_of(3, levels=(0.5, 0.9)), "top1", "")

    assert legend_labels(figure.axes[0]) == ["layer0", "layer1", "layer2"]


@pytest.mark.parametrize(
    "metric, label",
    [("top1", "Drop of top-1 accuracy from dense (points)"), ("loss", "Rise of the loss from dense")],
)
def test_more_curves_than_lines_can_show_become_a_heat_map(metric, label):
    figure = drawn(65, metric)

    heat_map, colour_bar = figure.axes
    assert [text.get_text() for text in heat_map.get_yticklabels()] == [
        f"layer{index}" for index in range(65)
    ]
    assert [text.get_text() for text in heat_map.get_xticklabels()] == ["0", "50", "90"]
    assert colour_bar.get_ylabel() == label
    change = heat_map.images[0].get_array()
    assert change[64, 2] == pytest.approx(65 * 0.9 if metric == "top1" else 0.9)


@pytest.mark.parametrize("count", [3, 70])
def test_scores_that_are_not_finite_are_left_out(tmp_path, count):
    curves = curves_of(count)
    curves["layer1.weight"][0.9] = Score(10.0, 50.0, math.inf)
    curves["layer2.weight"][0.9] = Score(10.0, 50.0, math.nan)

    assert sensitivities_to_png(curves, tmp_path / "s.png", metric="loss").is_file()


@pytest.mark.parametrize("levels", [(0.5,), (0.0,)])
@pytest.mark.parametrize("count", [1, 70])
def test_a_single_level_can_be_drawn(tmp_path, count, levels):
    assert sensitivities_to_png(curves_of(count, levels), tmp_path / "s.png").is_file()


def test_png_and_svg_are_written_by_suffix(tmp_path):
    png = sensitivities_to_png(curves_of(2), tmp_path / "s.png")
    svg = sensitivities_to_png(curves_of(2), tmp_path / "s.SVG", title="Ours")

    assert png.read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert sorted(tmp_path.iterdir()) == [svg, png]


def test_equal_curves_give_equal_files(tmp_path):
    first, second = (
        sensitivities_to_png(curves_of(2), tmp_path / name).read_bytes() for name in ("a.svg", "b.svg")
    )

    assert first == second


@pytest.mark.parametrize(
    "curves, name, metric, message",
    [
        (
            curves_of(1),
            "s.png",
            "tap1",
            "unknown metric 'tap1', not one of top1, top5, loss; did you mean 'top1'?",
        ),
        (curves_of(1), "s.jpeg", "top1", "the file must end in .png or .svg, got 's.jpeg'"),
        ({}, "s.png", "top1", "at least one point is needed, got none"),
        ({"w": {}}, "s.png", "top1", "at least one point is needed, got none"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, curves, name, metric, message):
    with pytest.raises(UsageError) as error:
        sensitivities_to_png(curves, tmp_path / name, metric=metric)

    assert str(error.value) == f"sensitivity plot: {message}"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not DISTILLERS.is_dir(), reason=f"no files of Distiller at {DISTILLERS}")
def test_distillers_curves_can_be_drawn(tmp_path):
    curves = sensitivities_from_csv(DISTILLERS / "resnet20_cifar_element.csv")

    assert sensitivities_to_png(curves, tmp_path / "s.png").is_file()
