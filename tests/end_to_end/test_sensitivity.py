"""The sensitivity sweep of the program."""

from __future__ import annotations

import csv
import json
import re

import pytest

from tests.end_to_end.conftest import TINY

SWEPT = {"LOG", "sensitivity.csv", "sensitivity.json", "sensitivity.png", "sensitivity.svg"}
COLUMNS = (
    "parameter sparsity top1 top5 loss axis level n top1_correct top5_correct top1_low top1_high removed"
)


def rows(folder):
    with (folder / "sensitivity.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "axis, parameters",
    [
        ("element", ["conv1.weight", "conv2.weight", "fc.weight"]),
        ("filter", ["conv1.weight", "conv2.weight"]),
        ("channel", ["conv2.weight"]),
    ],
)
def test_a_sweep_writes_a_row_for_every_parameter_and_level_both_ends_included(
    program, trained, axis, parameters
):
    done = program.run(
        TINY + f"--sense {axis} --sense-range 0 0.9 0.45 --etes 0.3 -o out --exp-load-weights-from {trained}"
    ).succeeded()
    folder = program.latest("out")
    assert program.names() == {"nets.py", "out"}
    assert program.names(folder) == SWEPT
    assert (folder / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    points = rows(folder)
    assert list(points[0]) == COLUMNS.split()
    assert [(row["parameter"], float(row["sparsity"])) for row in points] == [
        (name, level) for name in parameters for level in (0.0, 0.45, 0.9)
    ]
    dense = [row for row in points if row["sparsity"] == "0.0"]
    assert len({(row["top1"], row["loss"]) for row in dense}) == 1
    count = len(points)
    assert re.search(rf"\b{count} points on \d+ images: making ready\n", done.out)
    assert f"blocks of images, {count}/{count} points known]  about 0 s left" in done.out


def test_the_dense_point_of_a_sweep_is_the_evaluation(program, trained):
    load = f"--exp-load-weights-from {trained}"
    program.run(TINY + f"--sense element --sense-range 0.5 0.5 0.1 -o sweep {load}").succeeded()
    program.run(TINY + f"-e -o out {load}").succeeded()
    dense = rows(program.latest("sweep"))[0]
    card = json.loads((program.latest("out") / "results.json").read_text())["measured"]
    assert (float(dense["sparsity"]), float(dense["top1"])) == (0.0, pytest.approx(card["top1_percent"]))
    assert float(dense["loss"]) == pytest.approx(card["loss"])


def test_resuming_a_finished_sweep_changes_nothing_and_measures_nothing(program, trained):
    command = (
        TINY + f"--sense filter --sense-range 0 0.8 0.4 --etes 0.2 -o out --exp-load-weights-from {trained}"
    )
    program.run(command).succeeded()
    folder = program.latest("out")
    before = (folder / "sensitivity.csv").read_bytes()
    done = program.run(f"{command} --sense-resume {folder}").succeeded()
    assert (folder / "sensitivity.csv").read_bytes() == before
    assert "blocks of images" not in done.out
    assert program.names("out") == {"latest_log_dir", "latest_log_file", folder.name}


def test_several_axes_share_a_run_and_have_an_overview(program, trained):
    program.run(
        TINY
        + "--sense weight-bits,activation-bits,group,n:m,rank --sense-range weight-bits 8 2 3 --etes 0.3 "
        f"--sense-range rank 0 0.5 0.25 --sense-params conv* fc* -o out --exp-load-weights-from {trained}"
    ).succeeded()
    folder = program.latest("out")
    points = rows(folder)
    assert list(dict.fromkeys(row["axis"] for row in points)) == [
        "weight-bits", "activation-bits", "group", "n:m", "rank",
    ]  # fmt: skip
    levels = {
        axis: {float(row["level"]) for row in points if row["axis"] == axis}
        for axis in ("weight-bits", "rank")
    }
    assert levels == {"weight-bits": {32, 8, 5, 2}, "rank": {0, 0.25, 0.5}}
    assert {row["sparsity"] for row in points if row["axis"] == "rank"} == {""}
    assert all(
        " channels of " in row["removed"]
        for row in points
        if row["axis"] == "group" and row["level"] != "0.0"
    )
    for axis in ("weight-bits", "activation-bits", "group", "n-m", "rank"):
        assert (folder / f"sensitivity_{axis}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"sensitivity_{axis}.svg").read_text().startswith("<?xml")
    assert (folder / "sensitivity.png").exists()


def test_activation_bits_alone_are_an_axis(program, trained):
    command = TINY + f"--sense activation-bits --etes 0.2 --exp-load-weights-from {trained} -o out "
    program.run(command + "--sense-range 8 2 3 --sense-params conv2* fc*").succeeded()
    points = rows(program.latest("out"))
    assert [(row["parameter"], row["level"]) for row in points] == [
        (name, level) for name in ("conv2.weight", "fc.weight") for level in ("32.0", "8.0", "5.0", "2.0")
    ]
    done = program.run(command + "--sense-params cnv*")
    assert done.status == 2
    assert done.err.startswith("UnknownNameError: --sense-params: ")


def test_with_an_error_points_have_intervals(program, trained):
    program.run(
        TINY
        + f"--sense element --sense-range 0 0.9 0.45 --sense-error 20 -o out --exp-load-weights-from {trained}"
    ).succeeded()
    points = rows(program.latest("out"))
    assert all(float(row["top1_low"]) <= float(row["top1"]) <= float(row["top1_high"]) for row in points)
    assert any(int(row["n"]) < int(points[0]["n"]) for row in points)


def test_validation_images_are_swept_where_they_are_asked_for(program, trained):
    command = TINY + f"--sense element --sense-range 0.5 0.5 0.1 --exp-load-weights-from {trained} "
    program.run(command + "--sense-valid --validation-split 0.2 -o out").succeeded()
    folder = program.latest("out")
    assert "(validation)" in json.loads((folder / "sensitivity.json").read_text())["test_images"]
    assert int(rows(folder)[0]["n"]) == 287  # a fifth of 1,437
    done = program.run(command + "--sense-valid --validation-split 0")
    assert done.status == 2
    assert done.err == (
        "UsageError: --sense-valid: there are no validation images; give a --validation-split above 0, or leave the "
        "flag out\n"
    )


def test_two_processes_write_the_same_file(program, trained):
    command = TINY + f"--sense element --sense-range 0 0.8 0.4 --exp-load-weights-from {trained} "
    program.run(command + "--sense-jobs 1 -o one").succeeded()
    program.run(command + "--sense-jobs 2 -o two").succeeded()
    one, two = ((program.latest(name) / "sensitivity.csv").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--sense elements", "UnknownNameError: sensitivity: unknown axis 'elements', not one of element, "),
        (
            "--sense element,rank --sense-range 0 0.5 0.1",
            "UsageError: --sense-range: of several axes, say which is meant, as in '--sense-range element 0 0.5 0.1'",
        ),
        (
            "--sense element --sense-range rank 0 0.5 0.1",
            "UsageError: --sense-range rank: is not among the axes of --sense element",
        ),
        (
            "--sense element --sense-error 0",
            "UsageError: --sense-error: must be above 0 and below 100 percentage ",
        ),
        (
            "--sense element --sense-params conv9 fc",
            "UnknownNameError: --sense-params: no parameter 'conv9' in the model; no parameter 'fc' in the model; "
            "'--summary sparsity' lists all of them\n",
        ),
        ("--sense-error 1", "UsageError: --sense-error: goes with --sense"),
        (
            "--sense element --sense-block 8",
            "UsageError: --sense-block: goes with the axis n:m, which --sense ",
        ),
        ("-e --sense-jobs 2", "UsageError: --sense-jobs: goes with --sense"),
    ],
)
def test_what_cannot_be_swept_is_refused_and_leaves_nothing(program, flags, told):
    done = program.run(TINY + f"{flags} -o out")
    assert done.status == 2
    assert told in done.err
    assert "out" not in program.names()
