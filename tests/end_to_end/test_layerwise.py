"""Layer-wise compression of the program, whole, killed and resumed; and its figures drawn anew."""

from __future__ import annotations

import csv
import signal
from pathlib import Path

import pytest

from tests.end_to_end.conftest import TINY, make_program
from tests.end_to_end.program import refused
from tests.layerwise.test_source_files import SOURCE, needs_source

SWEEP = TINY + "--layerwise kmeans --fractions 0 0.8 0.2 --layerwise-bits 2 --etes 0.1 "
POINTS = 6
LEFT = {"LOG", "layerwise.csv", "layerwise.json"} | {
    f"{metric}-kmeans{suffix}" for metric in ("accuracy", "latency") for suffix in (".json", ".png", ".svg")
}


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "layerwise.csv").read_text().splitlines()))


def untimed(folder: Path) -> list[dict[str, str]]:
    """The rows of the CSV without what takes time."""
    rows = rows_of(folder)
    return [{key: value for key, value in row.items() if "latency" not in key} for row in rows]


@pytest.fixture(scope="module")
def whole_sweep(server, trained, tmp_path_factory) -> list[dict[str, str]]:
    """The rows of a sweep that was not interrupted."""
    program = make_program(server, tmp_path_factory.mktemp("layerwise"))
    done = program.run(SWEEP + f"-o out --exp-load-weights-from {trained}").succeeded()
    assert program.names(program.latest("out")) == LEFT
    assert f"[{POINTS}/{POINTS}] kmeans at bits 2: Top1 " in done.out
    assert len(untimed(program.latest("out"))) == POINTS
    return untimed(program.latest("out"))


@pytest.mark.parametrize(
    "kill, measured_again",
    [
        (("distiller.layerwise.log:LayerwiseLog.append", 1), 6),
        (("distiller.layerwise.log:LayerwiseLog.append", 4), 3),
        (("distiller.layerwise.log:LayerwiseLog.complete", 1), 0),
        (("distiller.apputils.layerwise_job:draw_layerwise", 1), 0),
    ],
)
def test_a_killed_sweep_is_resumed_to_the_same_points(program, trained, whole_sweep, kill, measured_again):
    command = SWEEP + f"--exp-load-weights-from {trained} "
    assert program.run(command + "-o out", kill=kill).status == -signal.SIGKILL
    left = program.latest("out")
    done = program.run(command + f"--layerwise-resume {left}").succeeded()
    assert done.out.count(": Top1 ") == measured_again
    assert untimed(left) == whole_sweep
    assert program.names(left) == LEFT


def test_convolutions_are_swept_when_they_are_named(program, trained):
    command = TINY + "--layerwise svd+prune --fractions 0.8 0.8 1 --etes 0.1 --layerwise-layers conv2 "
    done = program.run(command + f"-o out --exp-load-weights-from {trained}").succeeded()
    assert "--- layer-wise compression of conv2 ---" in done.out
    (row,) = rows_of(program.latest("out"))
    assert float(row["factored_latency_s"]) > 0
    assert int(row["predicted_bytes"]) <= int(row["stored_bytes"]) < int(row["dense_bytes"])


def test_a_sweep_without_trained_weights_is_refused(program):
    assert refused(program, TINY + "--layerwise prune") == (
        "UsageError: --layerwise: needs trained weights: a checkpoint, given with --resume-from or "
        "--exp-load-weights-from, or --pretrained\n"
    )


@needs_source
def test_the_sources_figures_are_drawn_without_a_model(program):
    done = program.run("--layerwise-plot", SOURCE.resolve(), "-o", "figures").succeeded()
    assert len(done.out.splitlines()) == 16
    assert {"accuracy.png", "latency-svd.svg"} < program.names("figures")
