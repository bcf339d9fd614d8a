from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from distiller.errors import SensitivityError
from distiller.layerwise.plot import draw_layerwise, layerwise_curves, layerwise_figures
from distiller.layerwise.points import csv_header, csv_line
from tests.layerwise.test_points import POINT
from tests.layerwise.test_source_files import SOURCE, needs_source


def lines(axes) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


@needs_source
def test_the_sources_files_are_redrawn_number_by_number():
    figures = layerwise_figures(layerwise_curves(SOURCE))
    techniques = ("prune", "quant", "svd")
    assert set(figures) == {"accuracy", "latency"} | {
        f"{m}-{t}" for m in ("accuracy", "latency") for t in techniques
    }
    for metric, scale, label in (("accuracy", 100, "Top-1 accuracy (%)"), ("latency", 1, "Latency (s)")):
        (together,) = figures[metric].axes
        assert together.get_ylabel() == label
        assert list(lines(together)) == list(techniques)
        for technique in techniques:
            theirs = json.loads((SOURCE / f"{metric}-{technique}.json").read_text())
            (alone,) = figures[f"{metric}-{technique}"].axes
            for axes in (together, alone):
                x, y = lines(axes)[technique]
                assert x == theirs["fraction"]
                assert y == pytest.approx([scale * value for value in theirs[metric]])


@needs_source
def test_the_sources_files_become_pictures(tmp_path):
    shutil.copy(SOURCE / "accuracy-svd.json", tmp_path)
    drawn = draw_layerwise(tmp_path, tmp_path / "made")
    assert drawn == [tmp_path / "made" / name for name in ("accuracy-svd.png", "accuracy-svd.svg")]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml")


POINTS = [
    replace(POINT, technique="quant", value=0.0, stored_bytes=100),
    replace(POINT, technique="quant", value=0.5, stored_bytes=60, top1_correct=50, latency_s=0.15),
    replace(POINT, technique="quant", axis="bits", value=4.0, stored_bytes=20, top1_correct=40),
    replace(POINT, technique="svd", value=0.0, stored_bytes=100),
    replace(POINT, technique="svd", value=0.5, stored_bytes=50, factored_latency_s=0.07),
]


@pytest.fixture
def swept(tmp_path):
    (tmp_path / "layerwise.csv").write_text(csv_header() + "".join(map(csv_line, POINTS)))
    return tmp_path


def test_a_sweep_has_panels_by_fraction_by_bits_and_by_stored_bytes(swept):
    figures = layerwise_figures(layerwise_curves(swept))
    fraction, bits, stored = figures["accuracy"].axes
    assert lines(fraction) == {"quant": ([0.0, 0.5], [62, 50]), "svd": ([0.0, 0.5], [62, 62])}
    assert lines(bits) == {"quant": ([4.0], [40])}
    assert lines(stored) == {
        "quant": ([100, 60], [62, 50]), "quant, by bits": ([20], [40]), "svd": ([100, 50], [62, 62]),
    }  # fmt: skip
    assert stored.get_xlabel() == "Stored bytes (% of the dense network)"
    assert fraction.get_xlabel() == "Fraction, as each technique means it"


def test_a_figure_of_one_technique_says_what_its_fraction_is(swept):
    fraction, stored = layerwise_figures(layerwise_curves(swept))["accuracy-svd"].axes
    assert fraction.get_xlabel() == "Fraction of the rank that is gone"
    assert lines(stored) == {"svd": ([100, 50], [62, 62])}


def test_latencies_have_the_dense_network_really_factored_layers_and_quartiles_beside_them(swept):
    fraction, _ = layerwise_figures(layerwise_curves(swept))["latency-svd"].axes
    assert lines(fraction) == {
        "svd": ([0.0, 0.5], [0.1, 0.1]),
        "svd: dense": ([0.0, 0.5], [0.3, 0.3]),
        "svd, really factored": ([0.5], [0.07]),
    }
    (band,) = fraction.collections
    heights = np.asarray(band.get_paths()[0].vertices)[:, 1]
    assert (heights.min(), heights.max()) == (0.05, 0.2)


def test_equal_files_give_equal_pictures(tmp_path):
    (tmp_path / "accuracy-prune.json").write_text('{"fraction": [0.0, 0.5], "accuracy": [0.9, 0.8]}')
    first, second = (draw_layerwise(tmp_path, tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_folder_with_neither_is_refused(tmp_path):
    with pytest.raises(
        SensitivityError, match="no files accuracy-TECHNIQUE.json or latency-TECHNIQUE.json there"
    ):
        draw_layerwise(tmp_path, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_place_that_cannot_be_written_is_told(swept):
    (swept / "taken").write_text("")
    with pytest.raises(SensitivityError, match="taken: cannot be written"):
        draw_layerwise(swept, swept / "taken")
