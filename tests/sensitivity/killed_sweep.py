"""A sweep that kills itself: `python killed_sweep.py FOLDER POINT {test,write}`.

SIGKILL strikes at the evaluation of the POINT-th point, or with half of its line written.
"""

import os
import signal
import sys

import torch
from torch import nn

from distiller.sensitivity.log import SensitivityLog
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


def main(folder: str, point: int, where: str) -> None:
    calls = 0

    def evaluate_or_die(*, model: nn.Module) -> tuple[float, float, float]:
        nonlocal calls
        calls += 1
        if where == "test" and calls == point:
            die()
        return evaluate(model=model)

    class TornLog(SensitivityLog):
        def _write(self, line: str) -> None:
            if where == "write" and calls == point:
                self._file.write(line[: len(line) // 2].encode())
                self._file.flush()
                die()
            super()._write(line)

    SensitivityLog._write = TornLog._write
    sensitivity_sweep(make_model(), "element", LEVELS, evaluate_or_die, folder, test_images=10)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
