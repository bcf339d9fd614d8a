from __future__ import annotations

import io
import logging

import pytest
import torch

from distiller.apputils.meters import EvalResult
from distiller.apputils.progress import EpochProgress
from distiller.apputils.training_loop import Progress
from distiller.data_loggers.loggers import PythonLogger
from tests.apputils.conftest import RecordingLogger


class Epoch:
    """Reports of an epoch of `steps` mini-batches; counts how often the figures are read."""

    def __init__(self, steps: int, phase: str = "train", epoch: int | None = 3) -> None:
        self.steps, self.phase, self.epoch, self.reads = steps, phase, epoch, 0

    def read(self) -> EvalResult:
        self.reads += 1
        return EvalResult(loss=0.5, top1_correct=3, top5_correct=4, n=4)

    def read_parts(self) -> dict[str, float]:
        return {"Objective Loss": 0.25}

    def report_to(self, report: EpochProgress, until: int | None = None) -> None:
        for step in range(1, (until or self.steps) + 1):
            report(Progress(self.phase, self.epoch, step, self.steps, 2.0 * step, self.read, self.read_parts))


@pytest.fixture
def logger() -> RecordingLogger:
    return RecordingLogger()


@pytest.fixture
def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.125)


def test_figures_go_to_the_loggers_every_print_freq_mini_batches_and_at_the_end(logger, optimizer):
    epoch = Epoch(steps=7)
    with EpochProgress([logger], 3, optimizer, is_terminal=False) as report:
        epoch.report_to(report)
    assert [(number, done, total) for number, done, total, _ in logger.steps] == [
        (3, 3, 7),
        (3, 6, 7),
        (3, 7, 7),
    ]
    assert list(logger.steps[0][3].items()) == [
        ("Overall Loss", 0.5), ("Objective Loss", 0.25), ("Top1", 75.0), ("Top5", 100.0), ("LR", 0.125), ("Time", 2.0),
    ]  # fmt: skip


def test_figures_are_read_from_the_device_only_when_they_are_shown(logger):
    epoch = Epoch(steps=10)
    with EpochProgress([logger], 4, is_terminal=False) as report:
        epoch.report_to(report)
    assert epoch.reads == 3


def test_without_an_optimizer_there_is_no_learning_rate(logger):
    with EpochProgress([logger], 1, is_terminal=False) as report:
        Epoch(steps=1).report_to(report)
    assert "LR" not in logger.steps[0][3]


@pytest.mark.parametrize("phase, epoch", [("validate", 3), ("test", None)])
def test_an_evaluation_in_a_pipe_is_silent(logger, capsys, phase, epoch):
    counted = Epoch(steps=5, phase=phase, epoch=epoch)
    with EpochProgress([logger], 1, is_terminal=False) as report:
        counted.report_to(report)
    assert logger.steps == []
    assert counted.reads == 0
    assert capsys.readouterr() == ("", "")


def python_logger(level: int = logging.INFO) -> tuple[PythonLogger, io.StringIO]:
    """A log with one handler of that level, as the program's console has, or its file (DEBUG)."""
    log, text = logging.getLogger("tests.progress"), io.StringIO()
    log.handlers, log.propagate = [logging.StreamHandler(text)], False
    log.handlers[0].setLevel(level)
    log.setLevel(logging.DEBUG)
    return PythonLogger(log), text


def test_in_a_pipe_there_are_lines_and_no_bar(capsys):
    python, text = python_logger()
    with EpochProgress([python], 2, is_terminal=False) as report:
        Epoch(steps=2).report_to(report)
    assert text.getvalue().startswith(
        "Epoch: [3][    2/    2]    Overall Loss 0.500000    Objective Loss 0.250000 "
    )
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_bar_takes_the_place_of_the_lines_and_other_loggers_go_on(logger, capsys):
    python, text = python_logger()
    with EpochProgress([python, logger], 2, is_terminal=True) as report:
        Epoch(steps=4).report_to(report)
    shown = capsys.readouterr().err
    assert "train 3:" in shown
    assert "loss 0.500, top1 75.00" in shown
    assert text.getvalue() == ""
    assert len(logger.steps) == 2


def test_on_a_terminal_the_log_file_has_the_lines_all_the_same(capsys):
    lines = []
    for is_terminal in (True, False):
        python, text = python_logger(logging.DEBUG)
        with EpochProgress([python], 2, is_terminal=is_terminal) as report:
            Epoch(steps=4).report_to(report)
        lines.append(text.getvalue())
    assert lines[0] == lines[1]
    assert lines[0].count("Epoch: [3]") == 2


def test_a_line_that_reaches_the_terminal_finds_no_bar_in_its_place(capsys):
    python, _ = python_logger()
    python._log.handlers = [logging.StreamHandler()]  # standard error, as the bar
    with EpochProgress([python], 2, is_terminal=True) as report:
        Epoch(steps=4).report_to(report)
    first, second, _ = capsys.readouterr().err.split("Epoch: [3]")
    assert first.endswith("\r")
    assert second.endswith("\r")
    assert "train 3:" in first


def test_on_a_terminal_an_evaluation_has_a_bar_too(capsys):
    with EpochProgress([], 2, is_terminal=True) as report:
        Epoch(steps=4, phase="test", epoch=None).report_to(report)
    assert "test:" in capsys.readouterr().err


def test_a_bar_goes_away_when_the_epoch_fails(capsys):
    report = EpochProgress([], 2, is_terminal=True)
    with pytest.raises(ZeroDivisionError), report:
        Epoch(steps=4).report_to(report, until=2)
        _ = 1 / 0
    assert report._bar is None
    assert capsys.readouterr().err.endswith("\r")


@pytest.mark.parametrize("out, err", [(True, True), (True, False), (False, True), (False, False)])
def test_a_terminal_is_where_both_output_and_errors_are_shown(monkeypatch, capsys, out, err):
    monkeypatch.setattr("sys.stdout.isatty", lambda: out)
    monkeypatch.setattr("sys.stderr.isatty", lambda: err)
    with EpochProgress([], 1) as report:
        Epoch(steps=1).report_to(report)
    assert ("train 3:" in capsys.readouterr().err) == (out and err)
