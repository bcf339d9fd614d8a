"""Processes of a sweep that begin to work: `python interrupted_start.py`, which somebody interrupts.

Says "starting" when it begins, and the numbers of its processes as they are started.
"""

import os
import signal

import torch

from distiller.sensitivity.axes import AXES, AxisContext
from distiller.sensitivity.block_engine import EngineSettings
from distiller.sensitivity.block_pool import BlockPool, BlockTask
from tests.replay.networks import images, make

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs have not
    model = make("Residual")
    units = AXES["element"].units(model, ["*"], (0.3, 0.8), AxisContext())
    os.write(1, b"starting\n")
    x, y = images(4), torch.arange(4)
    with BlockPool(model, units, EngineSettings(4), jobs=2) as pool:
        for _ in pool.run(BlockTask(index, x, y, None) for index in range(10**6)):
            os.write(1, b"running\n")
