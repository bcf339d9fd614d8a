"""Trainings with several seeds: what is run, what is not run again, and what is said of several figures."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from docs import seeded_runs
from docs.schedule_headers import Shipped
from docs.seeded_runs import Study, Training, flags_of, spread, top1


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """What is run, in a project's folder of its own; each run leaves a card and a checkpoint."""
    ran: list[list[str]] = []

    def run(command, **_):
        ran.append(command)
        folder = Path(command[command.index("-o") + 1]) / "latest_log_dir"
        folder.mkdir(parents=True)
        card = {"measured": {"top1_correct": 9000 + len(ran), "n": 10_000}}
        (folder / "results.json").write_text(json.dumps(card), encoding="utf-8")
        (folder / f"{command[command.index('-n') + 1]}_checkpoint.pth.tar").touch()

    monkeypatch.setattr(seeded_runs, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    return ran


def a_study() -> Study:
    return Study("study", [Training("dense", ("--lr", "1")), Training("small", ("--resume-from", "{dense}"))])


def test_a_training_is_run_with_its_seed_and_its_card_is_kept(commands):
    study = a_study()
    study.run("dense", 2)
    (command,) = commands
    assert command[1:4] == ["compress_classifier.py", "--lr", "1"]
    assert command[command.index("--seed") + 1] == "2"
    assert study.card("dense", 2) == {"measured": {"top1_correct": 9001, "n": 10_000}}
    assert study.cards("dense") == [study.card("dense", 2)]


def test_what_a_training_starts_from_is_run_first_with_the_same_seed(commands):
    study = a_study()
    study.run("small", 3)
    assert [command[command.index("-n") + 1] for command in commands] == ["dense", "small"]
    assert commands[1][commands[1].index("--resume-from") + 1] == str(study.checkpoint("dense", 3))


def test_a_file_of_the_studys_is_made_when_a_training_is_run(commands, tmp_path):
    made: list[Path] = []

    def teacher() -> Path:
        made.append(tmp_path / "teacher.pth.tar")
        return made[-1]

    study = Study("study", [Training("small", ("--kd-resume", "{teacher}"))], {"teacher": teacher})
    assert not made
    study.run("small", 1)
    assert commands[0][commands[0].index("--kd-resume") + 1] == str(*made)
    study.run("small", 1)
    assert len(made) == 1


@pytest.mark.parametrize(
    "flags, expected",
    [(["--seed", "2"], ["first", "small", "small", "then 2"]), (["--table"], []), (["--sead", "2"], None)],
)
def test_nothing_is_run_before_the_flags_are_read_nor_for_the_page_alone(
    monkeypatch, capsys, flags, expected
):
    done: list[str] = []
    study = Study("study", [Training("small", ()), Training("small again", ())])
    monkeypatch.setattr(study, "run", lambda name, seed: done.append(name.split()[0]))
    monkeypatch.setattr("sys.argv", ["measure", *flags])

    def measured():
        study.measured(
            "A study.", first=lambda: done.append("first"), then=lambda s: done.append(f"then {s}")
        )

    if expected is None:
        with pytest.raises(SystemExit):
            measured()
        assert "unrecognized arguments: --sead" in capsys.readouterr().err
    else:
        measured()
    assert done == (expected or [])


def test_what_has_a_card_is_not_run_again_but_for_a_checkpoint_that_is_needed(commands):
    study = a_study()
    study.run("dense", 1)
    study.run("dense", 1)
    assert len(commands) == 1
    checkpoint = study.checkpoint("dense", 1)
    assert checkpoint is not None
    for path in checkpoint.parent.iterdir():
        path.unlink()
    checkpoint.parent.rmdir()
    study.run("small", 1)
    assert len(commands) == 3


def test_a_failure_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(seeded_runs, "ROOT", tmp_path)
    study = Study("study", [Training("dense", ("--no-such-flag",))])
    with pytest.raises(subprocess.CalledProcessError):
        study.run("dense", 1)
    assert study.cards("dense") == []


def test_flags_of_a_header_are_taken_without_seed_and_name():
    text = "# A.\n#\n#   python compress_classifier.py -n dense --resume-from CHECKPOINT --seed 1 --lr 0.1\n\nversion: 1\n"
    flags = flags_of(Shipped(Path("a.yaml"), text), CHECKPOINT="{dense}")
    assert flags == ("--resume-from", "{dense}", "--lr", "0.1")


def test_the_interval_of_a_mean_is_students():
    figures = [91.2, 91.9, 90.7]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(figures), scale=stats.sem(figures))
    found = spread(figures)
    assert found.mean == pytest.approx(np.mean(figures))
    assert found.half_width == pytest.approx((high - low) / 2)
    assert str(found) == f"{found.mean:.2f} +- {found.half_width:.2f} %"


def test_one_figure_has_no_interval():
    assert str(spread([91.234])) == "91.23 %"


def test_top1_is_in_percent():
    assert top1({"measured": {"top1_correct": 9123, "n": 10_000}}) == 91.23
