import csv
import math
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distiller.errors import SensitivityError, UnknownNameError, UsageError
from distiller.sensitivity.curves import Score, SensitivityPoint
from distiller.sensitivity.report import (
    parse_csv,
    points_from_csv,
    points_to_csv,
    sensitivities_from_csv,
    sensitivities_to_csv,
)

DISTILLERS = Path(__file__).resolve().parents[2] / "../shared/compat/sensitivity"
HEADER = "parameter,sparsity,top1,top5,loss\n"
FULL = "parameter,sparsity,top1,top5,loss,axis,level,n,top1_correct,top5_correct,top1_low,top1_high,removed"
SCORE = Score(91.71, 99.63, 0.25)


def test_points_have_a_row_each_in_the_given_order(tmp_path):
    points = [
        SensitivityPoint("weight-bits", "fc.weight", 8.0, SCORE, 10_000, 9171, 9963),
        SensitivityPoint(
            "group", "conv1.weight", 0.15000000000000002, SCORE, 256, 230, 250, 88.5, 92.25, "2, 3"
        ),
        SensitivityPoint("rank", "fc.weight", 0.5, SCORE),
    ]

    path = points_to_csv(iter(points), tmp_path / "sensitivity.csv")

    assert path.read_text().splitlines() == [
        FULL,
        "fc.weight,,91.71,99.63,0.25,weight-bits,8.0,10000,9171,9963,,,",
        'conv1.weight,0.15,91.71,99.63,0.25,group,0.15,256,230,250,88.5,92.25,"2, 3"',
        "fc.weight,,91.71,99.63,0.25,rank,0.5,,,,,,",
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_scores_of_numpy_are_written_as_plain_numbers(tmp_path):
    point = SensitivityPoint(
        "element", "w", np.float64(0.5), Score(np.float32(90.5), 99, np.float64(1.5)), 2, 1, 1
    )

    path = points_to_csv(
        [replace(point, top1_low=np.float64(1.0), top1_high=np.float64(2.0))], tmp_path / "s"
    )

    assert path.read_text().splitlines()[1] == "w,0.5,90.5,99.0,1.5,element,0.5,2,1,1,1.0,2.0,"


LEVELS = {
    "": st.integers(0, 1000).map(lambda level: level / 1000),
    "element": st.integers(0, 1000).map(lambda level: level / 1000),
    "n:m": st.sampled_from([0.0, 0.25, 0.5, 0.75]),
    "weight-bits": st.sampled_from([2.0, 3.0, 8.0, 16.0, 32.0]),
    "rank": st.floats(0, 1).map(lambda level: round(level, 6)),
}
scores = st.builds(Score, st.floats(0, 100), st.floats(0, 100), st.floats(0, allow_nan=False))


@st.composite
def swept_points(draw):
    axis = draw(st.sampled_from(sorted(LEVELS)))
    name = draw(st.sampled_from(["a.weight", "b.c.weight", "d,e.weight"]))
    point = SensitivityPoint(axis, name, draw(LEVELS[axis]), draw(scores))
    if draw(st.booleans()):
        counts = sorted(draw(st.tuples(*[st.integers(0, 10**6)] * 3)))
        point = replace(point, n=counts[2] + 1, top1_correct=counts[0], top5_correct=counts[1])
    if draw(st.booleans()):
        low, high = sorted(draw(st.tuples(st.floats(0, 100), st.floats(0, 100))))
        point = replace(point, top1_low=low, top1_high=high)
    return replace(point, removed=draw(st.sampled_from(["", '3 of 16, "layer1"', "1.2 % of the MACs"])))


@given(points=st.lists(swept_points(), unique_by=lambda point: (point.axis, point.parameter, point.level)))
def test_points_that_are_read_back_are_the_same(tmp_path_factory, points):
    path = tmp_path_factory.mktemp("csv") / "s.csv"

    assert points_from_csv(points_to_csv(points, path)) == points


def test_every_reader_of_csv_finds_the_columns_by_name(tmp_path):
    path = points_to_csv([SensitivityPoint("n:m", "w", 0.5, SCORE, removed="a, b")], tmp_path / "s.csv")

    with path.open(newline="") as file:
        (row,) = csv.DictReader(file)

    assert (row["axis"], row["sparsity"], row["removed"], row["n"]) == ("n:m", "0.5", "a, b", "")


def test_curves_have_distillers_five_columns_without_float_noise(tmp_path):
    curves = {"conv1.weight": {0.0: (91.71, 99.63, 0.25), 0.15000000000000002: (np.float64(90.5), 99.0, 0.5)}}

    path = sensitivities_to_csv(curves, tmp_path / "sensitivity.csv")

    assert path.read_text() == HEADER + "conv1.weight,0.0,91.71,99.63,0.25\nconv1.weight,0.15,90.5,99.0,0.5\n"
    assert list(tmp_path.iterdir()) == [path]


curve = st.dictionaries(st.integers(0, 1000).map(lambda level: level / 1000), scores, min_size=1)


@given(curves=st.dictionaries(st.sampled_from(["a.weight", "b.c.weight", "d,e.weight"]), curve, min_size=1))
def test_curves_that_are_read_back_are_the_same_in_the_same_order(tmp_path_factory, curves):
    path = tmp_path_factory.mktemp("csv") / "s.csv"

    read = sensitivities_from_csv(sensitivities_to_csv(curves, path))

    assert read == curves
    assert list(read) == list(curves)


def test_a_loss_that_is_not_finite_survives(tmp_path):
    path = sensitivities_to_csv(
        {"w": {0.5: (10.0, 50.0, math.nan), 0.9: (10.0, 50.0, math.inf)}}, tmp_path / "s"
    )

    read = sensitivities_from_csv(path)["w"]

    assert math.isnan(read[0.5].loss)
    assert math.isinf(read[0.9].loss)


def test_bits_are_no_sparsities(tmp_path):
    with pytest.raises(UsageError) as error:
        sensitivities_to_csv({"w": {8.0: SCORE}}, tmp_path / "s.csv")

    assert str(error.value) == (
        "sensitivities_to_csv: 'w': the column is for a sparsity 0..1, got 8; "
        "write such levels with points_to_csv"
    )
    assert not list(tmp_path.iterdir())


@pytest.fixture
def two_axes(tmp_path):
    points = [
        SensitivityPoint(axis, name, level, SCORE)
        for axis, levels in (("element", (0.0, 0.5)), ("weight-bits", (32.0, 4.0)))
        for name in ("a.weight", "b.weight")
        for level in levels
    ]
    return points_to_csv(points, tmp_path / "s.csv")


def test_curves_of_one_of_several_axes_are_read_by_its_name(two_axes):
    curves = sensitivities_from_csv(two_axes, axis="Weight-Bits")

    assert list(curves) == ["a.weight", "b.weight"]
    assert curves["a.weight"] == OrderedDict({32.0: SCORE, 4.0: SCORE})


def test_which_of_several_axes_has_to_be_said(two_axes):
    with pytest.raises(SensitivityError) as error:
        sensitivities_from_csv(two_axes)

    assert str(error.value) == f"{two_axes}: has the axes element, weight-bits; say which with 'axis'"


def test_an_axis_that_is_not_in_the_file_is_refused(two_axes):
    with pytest.raises(SensitivityError) as error:
        sensitivities_from_csv(two_axes, axis="rank")

    assert str(error.value) == f"{two_axes}: axis 'rank' is not there, the file has element, weight-bits"


def test_an_axis_cannot_be_had_of_a_file_that_does_not_say_it(tmp_path):
    path = sensitivities_to_csv({"w": {0.5: SCORE}}, tmp_path / "s.csv")

    with pytest.raises(SensitivityError) as error:
        sensitivities_from_csv(path, axis="element")

    assert str(error.value) == (
        f"{path}: axis 'element' is not there, the file does not say its axis; leave 'axis' out"
    )


def test_the_only_axis_of_a_file_need_not_be_said(tmp_path):
    path = points_to_csv([SensitivityPoint("rank", "w", 0.5, SCORE)], tmp_path / "s.csv")

    assert sensitivities_from_csv(path) == {"w": {0.5: SCORE}}


def test_a_point_of_an_unknown_axis_is_not_written(tmp_path):
    with pytest.raises(UnknownNameError, match="unknown axis 'elemnt'.*did you mean 'element'"):
        points_to_csv([SensitivityPoint("elemnt", "w", 0.5, SCORE)], tmp_path / "s.csv")

    assert not list(tmp_path.iterdir())


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


def test_points_of_distillers_files_have_no_axis_and_no_counts():
    (point,) = parse_csv(HEADER + "module.w,0.5,91.71,99.63,0.25\n", "s.csv")

    assert point == SensitivityPoint("", "w", 0.5, SCORE)


def test_names_of_axes_are_read_in_any_case():
    (point,) = parse_csv(f"{FULL}\nw,,91.71,99.63,0.25,Rank,0.5,,,,,,\n", "s.csv")

    assert point.axis == "rank"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", f"s.csv:1: the columns must be {FULL}, or the first five of them, got ''"),
        ("name,level\n", f"s.csv:1: the columns must be {FULL}, or the first five of them, got 'name,level'"),
        (HEADER + "w,0.5,91\n", "s.csv:2: 5 columns expected, got 'w,0.5,91'"),
        (HEADER + "w,0.5,91,99,1\n\n", "s.csv:3: 5 columns expected, got ''"),
        (HEADER + "w,half,91,99,1\n", "s.csv:2: sparsity: a number expected, got 'half'"),
        (HEADER + "w,0.5,91,99,\n", "s.csv:2: loss: a number expected, got ''"),
        (HEADER + "w,0.5,nan,99,1\n", "s.csv:2: top1: a finite number expected, got 'nan'"),
        (HEADER + "w,0.5,91,inf,1\n", "s.csv:2: top5: a finite number expected, got 'inf'"),
        (HEADER + "w,50,91,99,1\n", "s.csv:2: sparsity: a fraction 0..1 expected, got '50'"),
        (HEADER + "w,nan,91,99,1\n", "s.csv:2: sparsity: a fraction 0..1 expected, got 'nan'"),
        (HEADER + ",0.5,91,99,1\n", "s.csv:2: parameter: a name expected, got ''"),
        (
            HEADER + "w,0.15,91,99,1\nmodule.w,0.15000000000000002,91,99,1\n",
            "s.csv:3: 'w' at level 0.15 is there twice; remove one",
        ),
        (HEADER + '"w,0.5,91,99,1\n', "s.csv:2: unexpected end of data"),
    ],
)
def test_malformed_files_are_refused_with_the_line(text, message):
    with pytest.raises(SensitivityError) as error:
        parse_csv(text, "s.csv")

    assert str(error.value) == message


@pytest.mark.parametrize(
    "line, message",
    [
        ("w,0.5,9,9,1,element,0.5", "13 columns expected, got 'w,0.5,9,9,1,element,0.5'"),
        (
            "w,0.5,9,9,1,elemnt,0.5,,,,,,",
            "axis: unknown axis 'elemnt', not one of element, filter, channel, group, n:m, weight-bits, "
            "activation-bits, rank; did you mean 'element'?",
        ),
        ("w,,9,9,1,weight-bits,,,,,,,", "level: a number expected, got ''"),
        (
            "w,,9,9,1,weight-bits,2.5,,,,,,",
            "level: a level of weight-bits must be a whole number of bits, 2 to 16 (32: dense), got 2.5",
        ),
        (
            "w,,9,9,1,weight-bits,nan,,,,,,",
            "level: a level of weight-bits must be a whole number of bits, 2 to 16 (32: dense), got nan",
        ),
        (
            "w,,9,9,1,rank,1.5,,,,,,",
            "level: a level of rank is the share taken away and must lie in 0..1, got 1.5",
        ),
        ("w,1,9,9,1,n:m,1,,,,,,", "level: a level of n:m must be at least 0 and less than 1, got 1"),
        ("w,5,9,9,1,element,5,,,,,,", "sparsity: a fraction 0..1 expected, got '5'"),
        ("w,,9,9,1,element,0.5,,,,,,", "sparsity: a number expected, got ''"),
        ("w,0.4,9,9,1,element,0.5,,,,,,", "sparsity: the level, '0.5', expected, got '0.4'"),
        ("w,0.4,9,9,1,,0.5,,,,,,", "sparsity: the level, '0.5', expected, got '0.4'"),
        (
            "w,0.5,9,9,1,rank,0.5,,,,,,",
            "sparsity: nothing expected, as axis rank has none, got '0.5'",
        ),
        (
            "w,0.5,9,9,1,element,0.5,10,,,,,",
            "n, top1_correct, top5_correct: all or none expected, got '10,,'",
        ),
        ("w,0.5,9,9,1,element,0.5,10,-1,9,,,", "top1_correct: a number of images expected, got '-1'"),
        ("w,0.5,9,9,1,element,0.5,10.0,1,9,,,", "n: a number of images expected, got '10.0'"),
        (
            "w,0.5,9,9,1,element,0.5,10,9,11,,,",
            "0 <= top1_correct <= top5_correct <= n and n > 0 expected, got 9, 11 and 10",
        ),
        (
            "w,0.5,9,9,1,element,0.5,10,9,8,,,",
            "0 <= top1_correct <= top5_correct <= n and n > 0 expected, got 9, 8 and 10",
        ),
        (
            "w,0.5,9,9,1,element,0.5,0,0,0,,,",
            "0 <= top1_correct <= top5_correct <= n and n > 0 expected, got 0, 0 and 0",
        ),
        ("w,0.5,9,9,1,element,0.5,,,,1,,", "top1_low, top1_high: all or none expected, got '1,'"),
        ("w,0.5,9,9,1,element,0.5,,,,nan,9,", "top1_low: a finite number expected, got 'nan'"),
        ("w,0.5,9,9,1,element,0.5,,,,9,8.5,", "top1_low <= top1_high expected, got 9 and 8.5"),
    ],
)
def test_malformed_points_are_refused_with_the_line(line, message):
    with pytest.raises(SensitivityError) as error:
        parse_csv(f"{FULL}\n{line}\n", "s.csv")

    assert str(error.value) == f"s.csv:2: {message}"


def test_a_point_is_there_twice_where_axis_parameter_and_level_are_the_same():
    lines = ["w,0.5,9,9,1,element,0.5,,,,,,", "w,,9,9,1,rank,0.5,,,,,,", "w,0.5,9,9,1,filter,0.5,,,,,,"]
    assert len(parse_csv("\n".join([FULL, *lines]), "s.csv")) == 3

    with pytest.raises(SensitivityError) as error:
        parse_csv("\n".join([FULL, *lines, lines[1]]), "s.csv")

    assert str(error.value) == "s.csv:5: 'w' at level 0.5 of axis rank is there twice; remove one"


def test_a_missing_file_is_reported(tmp_path):
    with pytest.raises(SensitivityError) as error:
        sensitivities_from_csv(tmp_path / "s.csv")

    assert str(error.value) == f"{tmp_path / 's.csv'}: cannot be read, No such file or directory"


def test_a_binary_file_is_reported(tmp_path):
    path = tmp_path / "s.csv"
    path.write_bytes(b"\xff\xfe\x00\x80")

    with pytest.raises(SensitivityError) as error:
        points_from_csv(path)

    assert str(error.value) == f"{path}: not a CSV file, got binary data"


@pytest.mark.parametrize("write", [points_to_csv, lambda points, path: sensitivities_to_csv({}, path)])
def test_a_file_that_cannot_be_written_is_reported(tmp_path, write):
    path = tmp_path / "missing" / "s.csv"

    with pytest.raises(SensitivityError) as error:
        write([], path)

    assert str(error.value) == f"{path}: cannot be written, No such file or directory"


def test_a_file_with_other_content_stays_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "s.csv"
    path.write_text("before")

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(SensitivityError, match="No space left on device"):
        points_to_csv([SensitivityPoint("element", "w", 0.5, SCORE)], path)

    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
