import math
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distiller.errors import SensitivityError
from distiller.sensitivity.curves import Score
from distiller.sensitivity.report import parse_csv, sensitivities_from_csv, sensitivities_to_csv

DISTILLERS = Path(__file__).resolve().parents[2] / "../shared/compat/sensitivity"
HEADER = "parameter,sparsity,top1,top5,loss\n"


def test_csv_has_a_row_per_point_without_float_noise(tmp_path):
    curves = {"conv1.weight": {0.0: (91.71, 99.63, 0.25), 0.15000000000000002: (np.float64(90.5), 99.0, 0.5)}}

    path = sensitivities_to_csv(curves, tmp_path / "sensitivity.csv")

    assert path.read_text() == HEADER + "conv1.weight,0.0,91.71,99.63,0.25\nconv1.weight,0.15,90.5,99.0,0.5\n"
    assert list(tmp_path.iterdir()) == [path]


scores = st.builds(Score, st.floats(0, 100), st.floats(0, 100), st.floats(0, allow_nan=False))
points = st.dictionaries(st.integers(0, 1000).map(lambda level: level / 1000), scores, min_size=1)


@given(curves=st.dictionaries(st.sampled_from(["a.weight", "b.c.weight", "d,e.weight"]), points, min_size=1))
def test_reading_back_gives_the_same_floats_in_the_same_order(tmp_path_factory, curves):
    path = tmp_path_factory.mktemp("csv") / "s.csv"

    read = sensitivities_from_csv(sensitivities_to_csv(curves, path))

    assert read == curves
    assert list(read) == list(curves)


def test_scores_that_are_not_finite_survive(tmp_path):
    path = sensitivities_to_csv(
        {"w": {0.5: (10.0, 50.0, math.nan), 0.9: (10.0, 50.0, math.inf)}}, tmp_path / "s"
    )

    read = sensitivities_from_csv(path)["w"]

    assert math.isnan(read[0.5].loss)
    assert math.isinf(read[0.9].loss)


@pytest.mark.skipif(not DISTILLERS.is_dir(), reason=f"no files of Distiller at {DISTILLERS}")
@pytest.mark.parametrize(
    "file, parameters, levels, last",
    [
        ("resnet20_cifar_element.csv", 22, 19, "fc.weight"),
        ("resnet20_cifar_filter.csv", 21, 10, "layer3.2.conv2.weight"),
    ],
)
def test_distillers_files_are_read_by_canonical_names(file, parameters, levels, last):
    curves = sensitivities_from_csv(DISTILLERS / file)

    assert len(curves) == parameters
    assert next(iter(curves)) == "conv1.weight"
    assert list(curves)[-1] == last
    expected = [round(0.05 * index, 2) for index in range(levels)]
    assert all(list(points) == expected for points in curves.values())
    assert curves["conv1.weight"][0.0].top1 == 91.71000000000001


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "s.csv:1: the columns must be parameter,sparsity,top1,top5,loss, got ''"),
        ("name,level\n", "s.csv:1: the columns must be parameter,sparsity,top1,top5,loss, got 'name,level'"),
        (HEADER + "w,0.5,91\n", "s.csv:2: 5 columns expected, got 'w,0.5,91'"),
        (HEADER + "w,0.5,91,99,1\n\n", "s.csv:3: 5 columns expected, got ''"),
        (HEADER + "w,half,91,99,1\n", "s.csv:2: sparsity: a number expected, got 'half'"),
        (HEADER + "w,0.5,91,99,\n", "s.csv:2: loss: a number expected, got ''"),
        (HEADER + "w,50,91,99,1\n", "s.csv:2: sparsity: a fraction 0..1 expected, got '50'"),
        (HEADER + "w,nan,91,99,1\n", "s.csv:2: sparsity: a fraction 0..1 expected, got 'nan'"),
        (HEADER + ",0.5,91,99,1\n", "s.csv:2: parameter: a name expected, got ''"),
        (
            HEADER + "w,0.15,91,99,1\nmodule.w,0.15000000000000002,91,99,1\n",
            "s.csv:3: 'w' at sparsity 0.15 is there twice; remove one",
        ),
        (HEADER + '"w,0.5,91,99,1\n', "s.csv:2: unexpected end of data"),
    ],
)
def test_malformed_files_are_refused_with_the_line(text, message):
    with pytest.raises(SensitivityError) as error:
        parse_csv(text, "s.csv")

    assert str(error.value) == message


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(SensitivityError) as error:
        sensitivities_from_csv(tmp_path / "s.csv")

    assert str(error.value) == f"{tmp_path / 's.csv'}: cannot be read, No such file or directory"


def test_a_binary_file_is_reported(tmp_path):
    path = tmp_path / "s.csv"
    path.write_bytes(b"\xff\xfe\x00\x80")

    with pytest.raises(SensitivityError) as error:
        sensitivities_from_csv(path)

    assert str(error.value) == f"{path}: not a CSV file, got binary data"


def test_a_file_that_cannot_be_written_is_reported(tmp_path):
    path = tmp_path / "missing" / "s.csv"

    with pytest.raises(SensitivityError) as error:
        sensitivities_to_csv(OrderedDict(), path)

    assert str(error.value) == f"{path}: cannot be written, No such file or directory"


def test_a_file_with_other_content_stays_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "s.csv"
    path.write_text("before")

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(SensitivityError, match="No space left on device"):
        sensitivities_to_csv({"w": {0.5: (1.0, 1.0, 1.0)}}, path)

    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
