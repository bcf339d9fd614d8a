import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from distiller.errors import SensitivityError, UnknownNameError, UsageError
from distiller.sensitivity import plot
from distiller.sensitivity.curves import curves_by_axis
from distiller.sensitivity.plot import plot_points, sensitivities_to_png
from distiller.sensitivity.report import sensitivities_from_csv
from tests.sensitivity.swept_points import BITS, points_of

DISTILLERS = Path(__file__).resolve().parents[2] / "../shared/compat/sensitivity"


def curves_of(count, levels=(0.0, 0.5, 0.9)):
    return curves_by_axis(points_of(count, levels))["element"]


@pytest.fixture
def drawn(monkeypatch):
    """Instead of being written, figures are collected: {file name: figure}."""
    figures = {}
    monkeypatch.setattr(plot, "_save", lambda figure, path: figures.setdefault(path.name, figure) and path)
    return figures


def test_a_sweep_of_one_axis_is_one_picture_as_png_and_svg(tmp_path):
    pictures = plot_points(points_of(2), tmp_path)

    assert pictures == [tmp_path / "sensitivity.png", tmp_path / "sensitivity.svg"]
    assert pictures[0].read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(pictures[1]).getroot().tag.endswith("svg")
    assert sorted(tmp_path.iterdir()) == pictures


def test_a_sweep_of_several_axes_is_a_picture_each_and_an_overview(drawn, tmp_path):
    points = [*points_of(2), *points_of(2, (0.0, 0.5), "n:m"), *points_of(2, BITS, "weight-bits")]

    pictures = plot_points(points, tmp_path, title="LeNet")

    stems = ["sensitivity", "sensitivity_element", "sensitivity_n-m", "sensitivity_weight-bits"]
    assert [path.name for path in pictures] == [
        f"{stem}{suffix}" for stem in stems for suffix in (".png", ".svg")
    ]
    assert [drawn[f"{stem}.png"].get_suptitle() for stem in stems] == [
        "LeNet",
        "LeNet: element",
        "LeNet: n:m",
        "LeNet: weight-bits",
    ]
    assert drawn["sensitivity.png"].axes[0].get_title().startswith("Strongest level")


def test_there_is_no_overview_without_a_dense_point(drawn, tmp_path):
    plot_points([*points_of(2, (0.5,)), *points_of(2, (0.5,), "rank")], tmp_path)

    assert {Path(name).stem for name in drawn} == {"sensitivity_element", "sensitivity_rank"}


def test_the_dense_point_of_one_axis_serves_all(drawn, tmp_path):
    plot_points([*points_of(2, (0.5,)), *points_of(2, BITS, "weight-bits")], tmp_path)

    legend = drawn["sensitivity_element.png"].axes[0].get_legend()
    assert legend.get_texts()[0].get_text() == "dense: top-1 90.00 %"


def test_points_that_do_not_say_their_axis_are_sparsities(drawn, tmp_path):
    plot_points([*points_of(2, axis=""), *points_of(2)], tmp_path)

    assert "sensitivity_unknown.png" in drawn
    assert drawn["sensitivity_unknown.png"].get_suptitle() == "Sensitivity"
    assert drawn["sensitivity_unknown.png"].get_supxlabel() == "Sparsity of the one pruned parameter (%)"


def test_beside_pictures_of_the_loss_the_overview_is_of_top1(drawn, tmp_path):
    plot_points([*points_of(2), *points_of(2, axis="rank")], tmp_path, metric="loss")

    assert drawn["sensitivity_rank.png"].get_supylabel() == "Loss"
    assert "top-1 accuracy" in drawn["sensitivity.png"].axes[0].get_title()


def test_equal_points_give_equal_files(tmp_path):
    points = points_of(2, interval=1.0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()

    first, second = (
        [path.read_bytes() for path in plot_points(points, tmp_path / name)] for name in ("a", "b")
    )

    assert first == second


@pytest.mark.parametrize(
    "points, metric, message",
    [
        ([], "top1", "at least one point is needed, got none"),
        (points_of(1), "tap1", "unknown metric 'tap1', not one of top1, top5, loss; did you mean 'top1'?"),
        (
            [*points_of(1), *points_of(1, (32.0,), "weight-bits")],
            "top1",
            "axis 'weight-bits': at least one point besides the dense one is needed",
        ),
    ],
)
def test_points_that_cannot_be_drawn_are_refused(tmp_path, points, metric, message):
    with pytest.raises(UsageError) as error:
        plot_points(points, tmp_path, metric)

    assert str(error.value) == f"sensitivity plot: {message}"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_reported(tmp_path):
    with pytest.raises(SensitivityError) as error:
        plot_points(points_of(1), tmp_path / "missing")

    picture = tmp_path / "missing" / "sensitivity.png"
    assert str(error.value) == f"{picture}: cannot be written, No such file or directory"


def test_curves_are_written_as_png_or_svg_by_suffix(tmp_path):
    png = sensitivities_to_png(curves_of(2), tmp_path / "s.png")
    svg = sensitivities_to_png(curves_of(2), tmp_path / "s.SVG", title="Ours")

    assert png.read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert sorted(tmp_path.iterdir()) == [svg, png]


def test_curves_of_bits_are_drawn_by_the_name_of_their_axis(drawn, tmp_path):
    curves = curves_by_axis(points_of(2, BITS, "weight-bits"))["weight-bits"]

    sensitivities_to_png(curves, tmp_path / "s.png", axis="weight-bits")

    assert drawn["s.png"].get_supxlabel() == "Bits of the weight"
    assert drawn["s.png"].get_suptitle() == "Pruning sensitivity"


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
        (
            {"w": {8.0: (90.0, 99.0, 0.1)}},
            "s.png",
            "top1",
            "'w': a sparsity 0..1 expected, got 8; say with 'axis' what the levels are",
        ),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, curves, name, metric, message):
    with pytest.raises(UsageError) as error:
        sensitivities_to_png(curves, tmp_path / name, metric=metric)

    assert str(error.value) == f"sensitivity plot: {message}"
    assert not list(tmp_path.iterdir())


def test_an_unknown_axis_is_refused(tmp_path):
    with pytest.raises(UnknownNameError, match="unknown axis 'elemnt'"):
        sensitivities_to_png(curves_of(1), tmp_path / "s.png", axis="elemnt")


@pytest.mark.skipif(not DISTILLERS.is_dir(), reason=f"no files of Distiller at {DISTILLERS}")
def test_distillers_curves_can_be_drawn(tmp_path):
    curves = sensitivities_from_csv(DISTILLERS / "resnet20_cifar_element.csv")

    assert sensitivities_to_png(curves, tmp_path / "s.png").is_file()
