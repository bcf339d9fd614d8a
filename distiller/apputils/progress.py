"""Progress of an epoch: a bar on a terminal, lines in a pipe, scalars to the loggers.

Figures are read from the device only when they are shown. Knows nothing about models.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from torch.optim import Optimizer
from tqdm import tqdm

from distiller.apputils.training_loop import Progress
from distiller.data_loggers.loggers import Logger, PythonLogger


class EpochProgress:
    """A `report` for `train_epoch` and `evaluate`; used as a context around one of them.

    Args:
        loggers: take the scalars of a training step every `print_freq` mini-batches.
        print_freq: mini-batches between figures.
        optimizer: whose learning rate is shown.
        is_terminal: show a bar; default: whether standard output and error are one. A `PythonLogger`'s
            lines then have level DEBUG: they are for its log file, not for the terminal.
    """

    def __init__(
        self,
        loggers: Sequence[Logger],
        print_freq: int,
        optimizer: Optimizer | None = None,
        is_terminal: bool | None = None,
    ) -> None:
        self._loggers = loggers
        self._print_freq = print_freq
        self._optimizer = optimizer
        both_are = sys.stdout.isatty() and sys.stderr.isatty()
        self._is_terminal = both_are if is_terminal is None else is_terminal
        self._bar: tqdm | None = None

    def __enter__(self) -> EpochProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __call__(self, progress: Progress) -> None:
        """Take in one mini-batch."""
        is_due = progress.step % self._print_freq == 0 or progress.step == progress.steps
        if is_due and progress.phase == "train":
            self._log(progress)
        if self._is_terminal:
            self._advance_bar(progress, is_due)

    def _advance_bar(self, progress: Progress, is_due: bool) -> None:
        if self._bar is None:
            epoch = "" if progress.epoch is None else f" {progress.epoch}"
            self._bar = tqdm(total=progress.steps, desc=f"{progress.phase}{epoch}", leave=False)
        if is_due:
            result = progress.read()
            self._bar.set_postfix_str(f"loss {result.loss:.3f}, top1 {result.top1:.2f}")
        self._bar.update(progress.step - self._bar.n)

    def _log(self, progress: Progress) -> None:
        assert progress.epoch is not None
        result = progress.read()
        scalars = {"Overall Loss": result.loss, **progress.read_parts()}
        scalars |= {"Top1": result.top1, "Top5": result.top5}
        if self._optimizer is not None:
            scalars["LR"] = float(self._optimizer.param_groups[0]["lr"])
        scalars["Time"] = progress.seconds / progress.step
        if self._bar is not None:
            self._bar.clear()  # for lines that reach the terminal all the same, as with --verbose
        for logger in self._loggers:
            if self._is_terminal and isinstance(logger, PythonLogger):
                logger.log_training_step(
                    progress.epoch, progress.step, progress.steps, scalars, level=logging.DEBUG
                )
            else:
                logger.log_training_step(progress.epoch, progress.step, progress.steps, scalars)
