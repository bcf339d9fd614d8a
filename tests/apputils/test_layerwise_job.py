from __future__ import annotations

import csv
import json
import logging

import pytest
import torch

from distiller.apputils import classifier_jobs as jobs
from distiller.apputils import layerwise_job
from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.errors import SensitivityError, UnknownNameError, UsageError
from distiller.layerwise.timing import Timing

pytestmark = pytest.mark.usefixtures("untimed", "global_settings_restored")

COMMAND = "--layerwise prune,svd --fractions 0 0.8 0.4 "
FILES = {"layerwise.csv", "layerwise.json"} | {
    f"{metric}-{technique}{suffix}"
    for metric in ("accuracy", "latency")
    for technique in ("prune", "svd")
    for suffix in (".json", ".png", ".svg")
} | {f"{metric}{suffix}" for metric in ("accuracy", "latency") for suffix in (".png", ".svg")}  # fmt: skip


def rows_of(run) -> list[dict[str, str]]:
    return list(csv.DictReader((run.folder / "layerwise.csv").read_text().splitlines()))


@pytest.fixture(autouse=True)
def without_clock(monkeypatch):
    monkeypatch.setattr(
        layerwise_job,
        "time_in_turns",
        lambda models, shape, batch, device: [Timing(0.5, 0.4, 0.6, 3, batch, 1, "cpu") for _ in models],
    )


@pytest.fixture
def undrawn(monkeypatch):
    """Without the seconds that figures take."""
    monkeypatch.setattr(layerwise_job, "draw_layerwise", lambda folder, into: [])


@pytest.mark.parametrize("command", ["", " -e", " --qe-bits-acts 4"])
def test_the_flag_chooses_the_job(flags, command):
    args = flags(COMMAND + command)
    assert jobs.choose_job(args) is layerwise_job.compress_layerwise
    assert args.layerwise == ("prune", "svd")


def test_a_sweep_leaves_its_points_the_sources_files_and_figures(flags, open_run, caplog):
    with caplog.at_level(logging.INFO, logger="distiller"):
        assert jobs.run_job(flags(COMMAND), open_run) is None
    assert open_run.names() == FILES
    rows = rows_of(open_run)
    assert [(row["technique"], row["value"]) for row in rows] == [
        (technique, value) for technique in ("prune", "svd") for value in ("0.0", "0.4", "0.8")
    ]
    content = json.loads((open_run.folder / "accuracy-prune.json").read_text())
    assert content["fraction"] == [0.0, 0.4, 0.8]
    assert content["accuracy"] == [int(row["top1_correct"]) / int(row["n"]) for row in rows[:3]]
    assert "[6/6] svd at fraction 0.80: Top1 " in caplog.text
    assert "--- layer-wise compression of fc1, fc2, fc3 ---" in caplog.text
    assert "latency: 64 images, cpu, threads: 1; median (quartiles)" in caplog.text
    assert "The weights stay dense, as in the original, so that the latency does not change" in caplog.text


@pytest.mark.usefixtures("undrawn")
def test_fraction_zero_is_the_evaluation(flags, open_run):
    jobs.run_job(flags("--layerwise quant --fractions 0 0 0.1"), open_run)
    (row,) = rows_of(open_run)
    result = ClassifierCompressor(flags("-e")).test()
    assert (int(row["top1_correct"]), int(row["n"])) == (result.top1_correct, result.n)
    assert float(row["loss"]) == pytest.approx(result.loss)
    assert row["stored_bytes"] == row["dense_bytes"] == str(4 * 266_610)


@pytest.mark.usefixtures("undrawn")
def test_layers_and_bits_are_those_asked_for(flags, open_run, caplog):
    with caplog.at_level(logging.INFO, logger="distiller"):
        jobs.run_job(
            flags("--layerwise kmeans --fractions 0 0 1 --layerwise-bits 4 2 4 --layerwise-layers fc1"),
            open_run,
        )
    assert "layer-wise compression of fc1 ---" in caplog.text
    rows = rows_of(open_run)
    assert [(row["axis"], row["value"]) for row in rows] == [
        ("fraction", "0.0"),
        ("bits", "4.0"),
        ("bits", "2.0"),
    ]
    assert int(rows[2]["stored_bytes"]) == 4 * (266_610 - 784 * 300) + 784 * 300 // 4 + 16


@pytest.mark.usefixtures("undrawn")
def test_the_model_is_afterwards_as_it_was(flags, open_run):
    compressor = ClassifierCompressor(
        flags("--layerwise svd+prune+kmeans,quant --fractions 0.5 0.5 1"), open_run
    )
    before = {name: value.clone() for name, value in compressor.model.state_dict().items()}
    layerwise_job.compress_layerwise(compressor)
    assert all(torch.equal(value, before[name]) for name, value in compressor.model.state_dict().items())


@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_sweep_goes_on_where_it_was(flags, open_run, monkeypatch):
    seed = COMMAND + "--seed 3 "
    jobs.run_job(flags(seed), open_run)
    whole = (open_run.folder / "layerwise.csv").read_bytes()
    real, calls = layerwise_job.evaluate, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(layerwise_job, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jobs.run_job(flags(seed), open_run)
    left, opened = open_run.folder, open_run.calls
    assert jobs.how_to_go_on(flags(seed), left) == f"--layerwise-resume {left}"
    jobs.run_job(flags(f"{seed}--layerwise-resume", left), open_run)
    assert len(calls) == 4 + 3
    assert open_run.calls == opened
    assert (left / "layerwise.csv").read_bytes() == whole


@pytest.mark.parametrize(
    "command, error, told",
    [
        ("--layerwise prun", UsageError,
         "layerwise: unknown technique 'prun', not one of prune, quant, kmeans, svd; did you mean 'prune'?"),
        ("--layerwise prune --fractions 0 2 1", UsageError, "layerwise: fractions are given as START STOP STEP with 0 <= START <= "
         "STOP <= 1 and a step of 1e-6 to 1, as in '0 0.9 0.1', got 0 2 1"),
        ("--layerwise prune --layerwise-bits 4", UsageError,
         "layerwise: bits are of quant and kmeans, got 'prune'; add one, or leave them out"),
        ("--layerwise prune --layerwise-layers fc9", UnknownNameError,
         "no layer with a weight of two or more dimensions 'fc9' in the model; did you mean 'fc3'?"),
        ("--layerwise prune --layerwise-resume none", UsageError, "--layerwise-resume none: no sweep to go on with, there is no "
         "layerwise.json; give the run folder of a --layerwise, or leave the flag out"),
    ],
)  # fmt: skip
def test_what_cannot_be_swept_is_refused_before_anything_is_written(flags, open_run, command, error, told):
    with pytest.raises(error) as caught:
        jobs.run_job(flags(command), open_run)
    assert str(caught.value) == told
    assert open_run.calls == 0


@pytest.mark.usefixtures("undrawn")
def test_a_sweep_of_another_model_is_not_gone_on_with(flags, open_run):
    jobs.run_job(flags(COMMAND), open_run)
    with pytest.raises(
        SensitivityError, match="layerwise.json: the folder holds another sweep, it differs in weights"
    ):
        jobs.run_job(flags(f"{COMMAND} --seed 8 --layerwise-resume", open_run.folder), open_run)


def test_figures_are_drawn_anew_from_a_folder_into_another(flags, tmp_path):
    (tmp_path / "accuracy-svd.json").write_text('{"fraction": [0.0, 0.5], "accuracy": [0.9, 0.8]}')
    text = layerwise_job.redraw_layerwise(flags("--layerwise-plot", tmp_path, "-o", tmp_path / "made"))
    names = ["accuracy-svd.png", "accuracy-svd.svg"]
    assert text.splitlines() == [f"Saved {tmp_path / 'made' / name}" for name in names]
    assert {path.name for path in (tmp_path / "made").iterdir()} == set(names)
