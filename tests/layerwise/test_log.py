from __future__ import annotations

import json
from dataclasses import replace

import pytest

from distiller.errors import SensitivityError
from distiller.layerwise.log import LayerwiseLog, LayerwiseSettings, read_points
from distiller.layerwise.points import csv_header, csv_line
from distiller.layerwise.sweep import SweepPlan
from tests.layerwise.test_points import POINT

SETTINGS = LayerwiseSettings(SweepPlan(("prune", "quant"), (0.0, 0.5), (4,)), ("fc1",), "abc", "10 of digits")
REMEDY = "give another folder, or empty this one to start afresh"


def at(technique: str, axis: str, value: float):
    return replace(POINT, technique=technique, axis=axis, value=value)


ALL = [at(*key) for key in SETTINGS.plan.keys]


def test_points_are_on_disk_at_once_and_in_the_order_of_the_plan_at_the_end(tmp_path):
    with LayerwiseLog(tmp_path, SETTINGS) as log:
        for point in reversed(ALL):
            log.append(point)
            assert log.path.read_text().endswith(csv_line(point))
        assert log.complete() == ALL
    assert read_points(tmp_path) == ALL


@pytest.mark.parametrize("torn", ["", "quant,fra"])
def test_an_interrupted_sweep_is_taken_up_without_its_torn_line(tmp_path, torn):
    with LayerwiseLog(tmp_path, SETTINGS) as log:
        log.append(ALL[0])
    with log.path.open("a") as file:
        file.write(torn)
    with LayerwiseLog(tmp_path, SETTINGS) as log:
        assert list(log.finished.values()) == ALL[:1]
        for point in ALL[1:]:
            log.append(point)
        log.complete()
    assert log.path.read_text() == csv_header() + "".join(map(csv_line, ALL))


@pytest.mark.parametrize(
    "change, told",
    [
        ({"weights": "xyz"}, "weights"),
        ({"layers": ("fc2",), "test_images": "5"}, "layers, test_images"),
        ({"plan": SweepPlan(("prune", "quant"), (0.0,), (4, 2))}, "fractions, bits"),
        ({"plan": SweepPlan(("prune", "kmeans"), (0.0, 0.5), (4,))}, "techniques"),
    ],
)
def test_another_sweep_is_refused(tmp_path, change, told):
    LayerwiseLog(tmp_path, SETTINGS).close()
    with pytest.raises(SensitivityError) as error:
        LayerwiseLog(tmp_path, replace(SETTINGS, **change))
    path = tmp_path / "layerwise.json"
    assert str(error.value) == f"{path}: the folder holds another sweep, it differs in {told}; {REMEDY}"


@pytest.mark.parametrize(
    "content, told",
    [
        ("[]", "not the settings of a sweep, got a list"),
        ("{", "not the settings of a sweep, Expecting property"),
    ],
)
def test_damaged_settings_are_refused(tmp_path, content, told):
    (tmp_path / "layerwise.json").write_text(content)
    with pytest.raises(SensitivityError, match=told):
        LayerwiseLog(tmp_path, SETTINGS)


def test_points_without_settings_are_refused(tmp_path):
    (tmp_path / "layerwise.csv").write_text(csv_header())
    with pytest.raises(SensitivityError) as error:
        LayerwiseLog(tmp_path, SETTINGS)
    assert str(error.value) == (
        f"{tmp_path / 'layerwise.csv'}: is there without the layerwise.json of a sweep that could be resumed; "
        "give another folder, or move it away"
    )


def test_points_of_another_sweep_are_refused(tmp_path):
    LayerwiseLog(tmp_path, SETTINGS).close()
    path = tmp_path / "layerwise.csv"
    path.write_text(csv_header() + csv_line(at("svd", "fraction", 0.5)))
    with pytest.raises(SensitivityError) as error:
        LayerwiseLog(tmp_path, SETTINGS)
    assert (
        str(error.value)
        == f"{path}: svd at fraction 0.5 is no point of the sweep in layerwise.json; {REMEDY}"
    )


def test_binary_data_are_refused(tmp_path):
    (tmp_path / "layerwise.csv").write_bytes(b"\xff\xfe\n")
    with pytest.raises(SensitivityError, match="not a CSV file, got binary data"):
        read_points(tmp_path)


def test_where_there_is_no_csv_there_are_no_points(tmp_path):
    assert read_points(tmp_path) == []


def test_the_settings_are_plain_data(tmp_path):
    LayerwiseLog(tmp_path, SETTINGS).close()
    assert json.loads((tmp_path / "layerwise.json").read_text()) == {
        "techniques": ["prune", "quant"], "fractions": [0.0, 0.5], "bits": [4], "layers": ["fc1"],
        "weights": "abc", "test_images": "10 of digits",
    }  # fmt: skip
