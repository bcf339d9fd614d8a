"""A sweep that kills itself, once for each argument: `python killed_sweep.py FOLDER test:4 write:2`.

SIGKILL strikes at the given evaluation of a run, or when half of the line that follows it is written.
Each run is a process of its own; a fork, because importing torch again takes seconds.
"""

import os
import signal
import sys

import torch
from torch import nn

from distiller.sensitivity.point_file import PointFile
from distiller.sensitivity.sweep import sensitivity_sweep

LEVELS = (0.0, 0.25, 0.5, 0.75)


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def evaluate(*, model: nn.Module) -> tuple[float, float, float]:
    images = torch.linspace(-1, 1, 60).view(10, 6)
    with torch.no_grad():
        loss = model(images).square().mean()
    return 100 / (1 + loss.item()), 100.0, loss.item()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sweep_until_killed(folder: str, where: str, point: int) -> None:
    calls = 0

    def evaluate_or_die(*, model: nn.Module) -> tuple[float, float, float]:
        nonlocal calls
        calls += 1
        if where == "test" and calls == point:
            die()
        return evaluate(model=model)

    def tear_line(self: PointFile, line: str) -> None:
        if where == "write" and calls == point:
            self._file.write(line[: len(line) // 2].encode())
            self._file.flush()
            die()
        write(self, line)

    write, PointFile._write = PointFile._write, tear_line
    sensitivity_sweep(make_model(), "element", LEVELS, evaluate_or_die, folder, test_images=10)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for argument in sys.argv[2:]:
        where, _, point = argument.partition(":")
        child = os.fork()
        if child == 0:
            sweep_until_killed(sys.argv[1], where, int(point))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, argument
