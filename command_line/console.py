"""Where messages go: the console, and the log file of the run."""

from __future__ import annotations

import logging
import sys
import warnings
from logging.handlers import MemoryHandler


class Console(logging.StreamHandler):
    """Messages to standard output."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: D102
        _raise_if_unwritable(self, "standard output")
        super().handleError(record)


class LogFile(logging.FileHandler):
    """Messages to the run's log file."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: D102
        _raise_if_unwritable(self, self.baseFilename)
        super().handleError(record)


def set_up_console(verbose: bool) -> MemoryHandler:
    """Messages and warnings to standard output, and kept for the run's log file, which is not there yet."""
    console, early = Console(sys.stdout), MemoryHandler(capacity=10_000, flushLevel=100)
    console.setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.captureWarnings(True)
    warnings.formatwarning = lambda message, *_where: str(message)
    for name in ("distiller", "py.warnings"):
        log = logging.getLogger(name)
        log.setLevel(logging.DEBUG)
        log.handlers = [console, early]
        log.propagate = False
    return early


def _raise_if_unwritable(handler: logging.StreamHandler, name: str) -> None:
    """To be called while a log record could not be written: nothing is lost unnoticed, the run ends."""
    error = sys.exc_info()[1]
    if isinstance(error, OSError):
        handler.setLevel(logging.CRITICAL + 1)  # tell it once
        error.filename = name
        raise error
