"""The sensitivity sweep of the program."""

from __future__ import annotations

import csv
import json

import pytest

from tests.end_to_end.conftest import TINY

SWEPT = {"LOG", "sensitivity.csv", "sensitivity.json", "sensitivity.png"}


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
    assert list(points[0]) == ["parameter", "sparsity", "top1", "top5", "loss"]
    assert [(row["parameter"], float(row["sparsity"])) for row in points] == [
        (name, level) for name in parameters for level in (0.0, 0.45, 0.9)
    ]
    dense = [row for row in points if row["sparsity"] == "0.0"]
    assert len({(row["top1"], row["loss"]) for row in dense}) == 1
    count = len(points)
    assert f"[{count}/{count}] {parameters[-1]} at sparsity 0.90: Top1 " in done.out


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
    assert "at sparsity" not in done.out
    assert program.names("out") == {"latest_log_dir", "latest_log_file", folder.name}
