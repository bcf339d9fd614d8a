"""The flags of the program as its jobs get them, and a run folder."""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compress_classifier import make_parser
from distiller.apputils import measurement
from distiller.apputils.experiment import create_run_folder
from distiller.apputils.image_classifier import Run
from distiller.data_loggers.loggers import EpochRecord, Logger

DIGITS = "--arch lenet_300_100 --dataset digits -b 64 --etrs 0.2 --evs 0.5 --etes 0.2 --seed 7 --lr 0.05 "


@pytest.fixture
def flags() -> Callable[..., Namespace]:
    """`flags("--epochs 2", path)`: settings by the flags' names, of a small network on the digits."""

    def parsed(command: str = "", *more: str | Path) -> Namespace:
        return make_parser().parse_args([*shlex.split(DIGITS + command), *map(str, more)])

    return parsed


class RecordingLogger(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, int, int, dict[str, float]]] = []
        self.validations: list[tuple[int, float, float, float]] = []
        self.sparsities: list[tuple[int, dict[str, float], float]] = []
        self.kernels: list[tuple[int, dict[str, float]]] = []
        self.epochs: list[EpochRecord] = []

    def log_training_step(self, epoch, completed, total, scalars):
        self.steps.append((epoch, completed, total, dict(scalars)))

    def log_validation(self, epoch, loss, top1, top5):
        self.validations.append((epoch, loss, top1, top5))

    def log_weight_sparsity(self, epoch, by_param, total):
        self.sparsities.append((epoch, dict(by_param), total))

    def log_kernel_sparsity(self, epoch, by_param):
        self.kernels.append((epoch, dict(by_param)))

    def log_epoch(self, record):
        self.epochs.append(record)


class RunMaker:
    """An `open_run` that counts its calls."""

    def __init__(self, folder: Path) -> None:
        self.out_dir = folder / "out"
        self.logger = RecordingLogger()
        self.calls = 0
        self.folder = self.out_dir

    def __call__(self) -> Run:
        self.calls += 1
        run_folder = create_run_folder(self.out_dir)
        self.folder = run_folder.path
        return Run(run_folder, (self.logger,))

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


@pytest.fixture
def open_run(tmp_path: Path) -> RunMaker:
    return RunMaker(tmp_path)


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results cards without the second that latencies take."""
    monkeypatch.setattr(
        measurement, "measure_latencies", lambda models, *args, **options: [None] * len(models)
    )


@pytest.fixture
def global_settings_restored():
    """What `set_deterministic` chooses for the whole process."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    yield
    cudnn.deterministic, cudnn.benchmark = before[:2]
    torch.use_deterministic_algorithms(before[2])
