"""A sweep that is killed, once for each argument: `python killed_sweep.py FOLDER exact block:2 write:1 0.35`.

The second argument is the error that points are known to, or `exact`.

SIGKILL strikes when so many blocks were run, or when half of the line of a block is written, or after so many
seconds, whatever is being done then. Each run is a process of its own; a fork, because importing torch again
takes seconds.
"""

import os
import signal
import sys
import time

import torch

from distiller.sensitivity import AxisRequest, TensorBlocks, sensitivity_sweep
from distiller.sensitivity.block_engine import BlockEngine
from distiller.sensitivity.point_file import PointFile
from tests.replay.networks import images, make

AXES = (AxisRequest("element", (0.25, 0.5, 0.75)), AxisRequest("weight-bits", (8.0, 2.0)))


def data() -> TensorBlocks:
    return TensorBlocks(images(96), torch.arange(96) % 10, 8, "ninety-six")


def sweep(folder: str, error: float | None = None) -> list:
    return sensitivity_sweep(make("Residual"), AXES, data(), folder, error=error)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sweep_until_killed(folder: str, error: float | None, where: str, block: int) -> None:
    calls = 0

    def run_or_die(self: BlockEngine, *args: object) -> object:
        nonlocal calls
        calls += 1
        if where == "block" and calls == block:
            die()
        return run(self, *args)

    def tear_line(self: PointFile, line: str) -> None:
        if where == "write" and calls == block:
            self._file.write(line[: len(line) // 2].encode())
            self._file.flush()
            die()
        write(self, line)

    run, BlockEngine.run = BlockEngine.run, run_or_die
    write, PointFile._write = PointFile._write, tear_line
    sweep(folder, error)


def kill_after(child: int, seconds: float) -> None:
    """SIGKILL a child after so many seconds, unless it has ended by then."""
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    error = None if sys.argv[2] == "exact" else float(sys.argv[2])
    for argument in sys.argv[3:]:
        where, _, block = argument.partition(":")
        child = os.fork()
        if child == 0:
            if block:
                sweep_until_killed(sys.argv[1], error, where, int(block))
            else:
                sweep(sys.argv[1], error)
            os._exit(0)
        if not block:
            kill_after(child, float(where))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == -signal.SIGKILL or (not block and status == 0), argument
