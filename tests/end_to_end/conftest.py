"""Each job of the program as a process of its own, on the embedded digits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.program import ForkServer, Program

NETS = '''
"""A user's own network, for 8x8 images."""

from torch import nn


class Tiny(nn.Sequential):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(32, num_classes)
'''
TINY = "--arch nets:Tiny --dataset digits -b 32 "


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.close()


def make_program(server: ForkServer, folder: Path) -> Program:
    """A program in a folder that holds the user's `nets.py` and nothing else."""
    for name in ("here", "printed"):
        (folder / name).mkdir()
    program = Program(server, folder / "here", folder / "printed")
    program.write("nets.py", NETS)
    return program


@pytest.fixture
def program(server: ForkServer, tmp_path: Path) -> Program:
    return make_program(server, tmp_path)


@pytest.fixture(scope="session")
def trained(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `nets:Tiny` after two epochs; read, never written."""
    program = make_program(server, tmp_path_factory.mktemp("trained"))
    program.run(TINY + "--epochs 2 --lr 0.05 --seed 1 -o out").succeeded()
    return program.latest("out") / "checkpoint.pth.tar"


@pytest.fixture(scope="session")
def stats(server: ForkServer, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activation statistics of that network."""
    program = make_program(server, tmp_path_factory.mktemp("stats"))
    program.run(TINY + "--qe-calibration 0.2 -o out --exp-load-weights-from", trained).succeeded()
    return program.latest("out") / "acts_quantization_stats.yaml"
