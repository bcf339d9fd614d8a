#!/usr/bin/env python3
"""Train, prune, sweep, measure and quantize image classifiers from the command line.

The flags are in `command_line/`; here `run` picks the job. The jobs themselves are in
`distiller/apputils/`. Exit status: 0 done, 2 the user's mistake, 1 a fault of ours, 130 interrupted
from the keyboard, 143 by SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from command_line.console import LogFile, set_up_console
from command_line.distillation_flags import add_distillation_flags
from command_line.early_exit_flags import add_early_exit_flags
from command_line.flags import (
    add_checkpoint_flags,
    add_data_flags,
    add_model_flags,
    add_output_flags,
    add_training_flags,
)
from command_line.job_flags import add_job_flags
from command_line.layerwise_flags import add_layerwise_flags
from command_line.packing_flags import add_packing_flags
from command_line.quantization_flags import add_quantization_flags
from command_line.recommend_flags import add_recommend_flags
from command_line.sensitivity_flags import add_sensitivity_flags
from command_line.weight_sharing_flags import add_weight_sharing_flags

if TYPE_CHECKING:
    from distiller.apputils.image_classifier import Run

__all__ = ["main", "make_parser", "run"]

LOG = logging.getLogger("distiller.app")


def make_parser() -> argparse.ArgumentParser:
    """The command line; needs no torch, so that --help answers at once."""
    parser = _Parser(
        prog="compress_classifier.py",
        description="Compression experiments with image classifiers: train under a YAML schedule, prune, "
        "sweep sensitivity, collect activation statistics, quantize.",
        allow_abbrev=False,
    )
    add_data_flags(parser.add_argument_group("data"))
    add_model_flags(parser.add_argument_group("model and machine"))
    add_training_flags(parser.add_argument_group("training"))
    add_checkpoint_flags(parser)
    add_job_flags(parser)
    add_sensitivity_flags(parser)
    add_recommend_flags(parser)
    add_layerwise_flags(parser)
    add_output_flags(parser.add_argument_group("output"))
    add_distillation_flags(parser)
    add_early_exit_flags(parser)
    add_quantization_flags(parser)
    add_packing_flags(parser)
    add_weight_sharing_flags(parser)
    return parser


class _Parser(argparse.ArgumentParser):
    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        """Beside the flags' values, `given` has the names of those that were given, at whatever value."""
        found = super().parse_args(args, namespace)
        absent: list[Any] = []  # stands for every value; flags that may be repeated add to a copy of it
        names = [action.dest for action in self._actions if action.default is not argparse.SUPPRESS]
        seen = vars(super().parse_args(args, argparse.Namespace(**dict.fromkeys(names, absent))))
        # argparse sets a DATASET_DIR that is not there, to None; no flag has that for its value.
        found.given = frozenset(
            name for name, value in seen.items() if value is not absent and value is not None
        )
        return found

    def error(self, message: str) -> NoReturn:
        """One message, without pages of usage before it."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, do the job, and turn the user's mistakes into one message."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if sys.stdout is None or sys.stderr is None:
        print(f"{parser.prog}: standard output and error are needed; instead of closing one, send it to "
              f"{os.devnull}", file=sys.stderr)  # fmt: skip
        return 2
    try:
        Path.cwd()
    except OSError as error:
        print(f"{parser.prog}: the current folder cannot be used, {error.strerror}; if it was deleted, "
              "change to another one", file=sys.stderr)  # fmt: skip
        return 2
    if "" not in sys.path:
        sys.path.append("")  # the user's own package.module:function may be in the current folder
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return run_or_explain(args)
    except KeyboardInterrupt as interrupt:
        print(f"interrupted{interrupt}", file=sys.stderr)
        return 143 if isinstance(interrupt, _Terminated) else 130
    except BrokenPipeError:  # who read the output (as in `| head`) has gone: so do we
        _drop_output()
        return 141
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "distiller":
            raise
        print(f"{parser.prog}: {sys.executable} lacks a package: {error}; install requirements.txt for it, "
              "or run .venv/bin/python, which `make setup` makes", file=sys.stderr)  # fmt: skip
        return 2


def run_or_explain(args: argparse.Namespace) -> int:
    """Do the job; returns the exit status."""
    from distiller.apputils.usage import check_usage
    from distiller.errors import DistillerError

    try:
        run(args, check_usage(args))
        sys.stdout.flush()
    except DistillerError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        with contextlib.suppress(OSError):  # a full disk, say, that it is about
            LOG.debug("stopped by %s: %s", type(error).__name__, error)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        where = error.filename or "standard output, or a file"
        print(f"{where}: cannot be written, {error.strerror}; make room first", file=sys.stderr)
        _drop_output()
        return 2
    return 0


def run(args: argparse.Namespace, warn_of: Sequence[str] = ()) -> None:
    """Pick the job and do it: summaries and dry runs only print, the others have a run folder."""
    from distiller.apputils import classifier_jobs as jobs

    if args.summary:
        print("\n\n".join(jobs.summaries(args)))
        return
    if args.dry_run:
        print(jobs.dry_run(args))
        return
    if args.plot_mixture:
        from distiller.apputils.mixture_plot_job import plot_mixture

        print("\n".join(f"Saved {path}" for path in plot_mixture(args.plot_mixture)))
        return
    if args.layerwise_plot:
        from distiller.apputils.layerwise_job import redraw_layerwise

        print(redraw_layerwise(args))
        return
    early = set_up_console(args.verbose)
    for text in warn_of:
        LOG.warning(text)
    if args.deprecated_resume:
        LOG.warning("--resume is deprecated: use --resume-from, with --reset-optimizer")
    opened: list[Run] = []

    def open_run() -> Run:
        opened.append(make_run(args, early))
        return opened[0]

    try:
        jobs.run_job(args, open_run)
    except KeyboardInterrupt as interrupt:
        flag = jobs.how_to_go_on(args, opened[0].require_folder() if opened else None)
        raise type(interrupt)(f"; go on with {flag}" if flag else "") from interrupt
    finally:
        for run_of_this in opened:
            for logger in run_of_this.loggers:
                logger.close()


class _Terminated(KeyboardInterrupt):
    """SIGTERM: the run ends as it does at an interrupt from the keyboard, with a status of its own."""


def _terminate(number: int, frame: Any) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it at once
    raise _Terminated


def _drop_output() -> None:
    """What is still to be printed goes nowhere, so that the interpreter does not fail on it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_run(args: argparse.Namespace, early: MemoryHandler) -> Run:
    """The run folder with its log file and loggers, and what the run runs on in the log."""
    from distiller.apputils import classifier_jobs as jobs
    from distiller.apputils.experiment import create_run_folder, environment
    from distiller.apputils.image_classifier import Run
    from distiller.data_loggers.loggers import CsvLogger, PythonLogger, TensorBoardLogger

    configs = [file for file in (args.compress, args.qe_stats_file, args.qe_config_file) if file]
    folder = create_run_folder(args.output_dir, args.name, configs)
    file = LogFile(folder.log_file, encoding="utf-8", errors="backslashreplace")
    file.setFormatter(logging.Formatter("%(asctime)s - %(message)s"))
    for name in ("distiller", "py.warnings"):
        logging.getLogger(name).handlers[1] = file
    early.setTarget(file)
    early.close()
    LOG.info("Log file for this run: %s", folder.log_file)
    for key, value in environment([sys.executable, *sys.argv], Path(__file__).parent).items():
        LOG.debug("%s: %s", key, value)
    if jobs.choose_job(args) is not jobs.train:
        if args.activation_stats:
            return Run(folder, (PythonLogger(LOG), TensorBoardLogger(folder.path)))
        return Run(folder)
    return Run(folder, (PythonLogger(LOG), TensorBoardLogger(folder.path), CsvLogger(folder.path)))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())
