#!/usr/bin/env python3
"""Train, prune, sweep, measure and quantize image classifiers from the command line.

The flags are at the top; below them `run` picks the job. The jobs themselves are in
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
import warnings
from collections.abc import Sequence
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from distiller.apputils.image_classifier import Run

LOG = logging.getLogger("distiller.app")
_FLOAT32 = 3.4e38
"""About the largest number that weights can be multiplied with."""


def make_parser() -> argparse.ArgumentParser:
    """The command line; needs no torch, so that --help answers at once."""
    parser = _Parser(
        prog="compress_classifier.py",
        description="Compression experiments with image classifiers: train under a YAML schedule, prune, "
        "sweep sensitivity, collect activation statistics, quantize.",
        allow_abbrev=False,
    )
    _add_data_flags(parser.add_argument_group("data"))
    _add_model_flags(parser.add_argument_group("model and machine"))
    _add_training_flags(parser.add_argument_group("training"))
    _add_checkpoint_flags(parser)
    _add_job_flags(parser)
    _add_output_flags(parser.add_argument_group("output"))
    _add_quantization_flags(parser)
    _add_refused_flags(parser)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One message, without pages of usage before it."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists all flags)\n")


def _add_data_flags(group: Any) -> None:
    group.add_argument("data", metavar="DATASET_DIR", nargs="?", type=_path,
        help="folder of the data set; not needed by digits, synthetic, and fashion-mnist where its Debian "
        "package is installed; a function of your own is called with it, or with None")  # fmt: skip
    group.add_argument("--dataset", type=_not_empty,
        help="digits, mnist, fashion-mnist, cifar10, cifar100, imagenet, image-folder, synthetic, or "
        "package.module:function (default: from the architecture's name)")  # fmt: skip
    group.add_argument(
        "--download", action="store_true", help="get mnist, fashion-mnist or cifar if DATASET_DIR lacks it"
    )
    group.add_argument("-j", "--workers", type=_at_least(0), default=4, metavar="N",
        help="processes that read image files or a Dataset of your own (default: %(default)s)")  # fmt: skip
    group.add_argument(
        "-b", "--batch-size", "--batch", type=_at_least(1), default=256, help="(default: %(default)s)"
    )
    group.add_argument(
        "--validation-split", "--valid-size", "--vs", type=_fraction(0, below=1), default=0.1, metavar="P",
        help="share of the training set to validate on; 0: the test set is used (default: %(default)s)",
    )  # fmt: skip
    for part, short in (("train", "etrs"), ("valid", "evs"), ("test", "etes")):
        group.add_argument(
            f"--effective-{part}-size", f"--{short}", type=_fraction(above=0), default=1.0, metavar="P",
            help=f"share of the {part} set used per epoch (default: %(default)s)",
        )  # fmt: skip


def _add_model_flags(group: Any) -> None:
    group.add_argument("-a", "--arch", type=_arch, default="resnet18",
        help="name, or package.module:function (default: %(default)s)")  # fmt: skip
    group.add_argument("--pretrained", action="store_true", help="torchvision's weights")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    group.add_argument("--cpu", action="store_true", help="same as --device cpu; overrides --gpus")
    group.add_argument(
        "--gpus", "--gpu", metavar="IDS", help="comma-separated; several: DataParallel (default: all)"
    )
    group.add_argument("--load-serialized", action="store_true", help="no DataParallel over several GPUs")
    group.add_argument("--seed", type=_at_least(0),
        help="(default: drawn and printed; with --resume-from that of its run; 0 with --deterministic, "
        "and for jobs that do not train)")  # fmt: skip
    group.add_argument(
        "--deterministic", "--det", action="store_true", help="seed 0 unless given; deterministic kernels"
    )


def _add_training_flags(group: Any) -> None:
    group.add_argument(
        "--epochs", type=_at_least(1, up_to=10**9), default=90,
        help="how many there are in all, those before --resume-from included (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--compress", nargs="?", const=False, type=_path, metavar="FILE",
        help="train under this YAML schedule")  # fmt: skip
    group.add_argument(
        "--dry-run", action="store_true",
        help="resolve the schedule against the model, print what each policy touches in which epochs, exit",
    )  # fmt: skip
    group.add_argument("--plugin", action="append", default=[], metavar="PACKAGE",
        help="package that a schedule's class may be in; may be repeated")  # fmt: skip
    group.add_argument(
        "--optimizer", choices=("sgd", "adam", "adamw"), default="sgd", help="(default: %(default)s)"
    )
    group.add_argument(
        "--lr", "--learning-rate", type=_fraction(above=0, up_to=_FLOAT32), default=0.1, metavar="LR",
        help="(default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--momentum", type=_fraction(0, up_to=_FLOAT32), default=0.9, help="of SGD (default: %(default)s)"
    )
    group.add_argument("--weight-decay", "--wd", type=_fraction(0, up_to=_FLOAT32), default=1e-4, metavar="W",
        help="(default: %(default)s)")  # fmt: skip


def _add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--resume", dest="deprecated_resume", action=_Resume, type=_path, help=argparse.SUPPRESS
    )
    group.add_argument("--resume-from", dest="resumed_checkpoint_path", type=_path, metavar="CHECKPOINT",
        help="go on where it ended")  # fmt: skip
    group.add_argument("--exp-load-weights-from", dest="load_model_path", type=_path, metavar="CHECKPOINT",
        help="take weights only")  # fmt: skip
    parser.add_argument(
        "--reset-optimizer", action="store_true", help="with --resume-from: a new optimizer, and epoch 0"
    )
    parser.add_argument("--save-untrained-model", action="store_true",
        help="also save the model that training begins with, as lottery tickets need it")  # fmt: skip


def _add_job_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("jobs other than training")
    group.add_argument("-e", "--evaluate", action="store_true", help="test and exit")
    group.add_argument("--summary", action=_Summary, metavar="WHAT",
        help="sparsity, compute, model or modules: print and exit; may be repeated")  # fmt: skip
    group.add_argument(
        "--sense", dest="sensitivity", type=str.lower, choices=("element", "filter", "channel"),
        help="test at growing sparsity of one weight after the other, and exit",
    )  # fmt: skip
    group.add_argument(
        "--sense-range", nargs=3, type=float, default=[0.0, 0.95, 0.05], metavar=("A", "B", "STEP"),
        help="sparsities of the sweep, both ends included (default: 0 0.95 0.05)",
    )  # fmt: skip
    group.add_argument(
        "--sense-resume", type=_path, metavar="RUN_FOLDER", help="go on with a sweep that was interrupted"
    )
    group.add_argument("--greedy", action="store_true",
        help="prune filters where it costs the least accuracy, group by group, and exit")  # fmt: skip
    group.add_argument("--greedy-target-density", type=_fraction(above=0, below=1), metavar="D",
        help="with --greedy: end at this share of the MACs")  # fmt: skip
    group.add_argument("--greedy-pruning-step", type=_fraction(above=0, below=1), default=0.1, metavar="P",
        help="share of a group's remaining filters pruned at once (default: %(default)s)")  # fmt: skip
    group.add_argument("--greedy-ft-epochs", type=_at_least(0), default=1, metavar="N",
        help="epochs of fine-tuning of each candidate (default: %(default)s)")  # fmt: skip
    group.add_argument("--greedy-finetuning-policy", type=str.lower, choices=("constant", "linear-grow"),
        default="constant", help="training images of an epoch: all of --effective-train-size, or the share "
        "of them that the MACs have been pruned by (default: %(default)s)")  # fmt: skip


def _add_output_flags(group: Any) -> None:
    group.add_argument("-n", "--name", help="of the experiment: prefix of the run folder and its checkpoints")
    group.add_argument(
        "-o", "--out-dir", dest="output_dir", type=_path, default="logs", help="(default: %(default)s)"
    )
    group.add_argument("-p", "--print-freq", type=_at_least(1), default=10, metavar="N",
        help="mini-batches between lines (default: %(default)s)")  # fmt: skip
    group.add_argument("-v", "--verbose", action="store_true", help="print what else goes into the log file")
    group.add_argument("--confusion", dest="display_confusion", action="store_true",
        help="print the confusion matrix of each validation and test")  # fmt: skip
    group.add_argument("--num-best-scores", type=_at_least(1), default=1, metavar="N",
        help="best epochs to print (default: %(default)s)")  # fmt: skip
    group.add_argument(
        "--masks-sparsity", action="store_true", help="print a table of the masks after each epoch's training"
    )
    group.add_argument("--param-hist", dest="log_params_histograms", action="store_true",
        help="a histogram of each parameter to TensorBoard, each epoch")  # fmt: skip
    group.add_argument("--activation-stats", "--act-stats", nargs="+", type=str.lower, default=[],
        choices=("train", "valid", "test"), metavar="PHASE",
        help="print and save statistics of activations in these phases (train, valid, test); end the list "
        "with another flag")  # fmt: skip


def _add_quantization_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("post-training quantization (with --evaluate)")
    modes, clips = ("sym", "sym_restr", "asym_s", "asym_u"), ("none", "avg", "n_std", "gauss", "laplace")
    bits = {"type": _at_least(0), "default": 8, "metavar": "BITS"}
    group.add_argument("--quantize-eval", "--qe", action="store_true", help="quantize, then evaluate")
    group.add_argument("--qe-mode", "--qem", type=str.lower, choices=modes, default="sym",
        help="of activations and weights (default: %(default)s)")  # fmt: skip
    group.add_argument(
        "--qe-mode-acts", "--qema", type=str.lower, choices=modes, help="of activations (default: --qe-mode)"
    )
    group.add_argument(
        "--qe-mode-wts", "--qemw", type=str.lower, choices=modes, help="of weights (default: --qe-mode)"
    )
    group.add_argument("--qe-bits-acts", "--qeba", **bits, help="0: not quantized (default: %(default)s)")
    group.add_argument("--qe-bits-wts", "--qebw", **bits, help="0: not quantized (default: %(default)s)")
    group.add_argument("--qe-bits-accum", type=_at_least(1), default=32, metavar="BITS",
        help="of accumulators and biases (default: %(default)s)")  # fmt: skip
    group.add_argument("--qe-clip-acts", "--qeca", type=str.lower, choices=clips, default="none",
        help="how ranges of activations are clipped (default: %(default)s)")  # fmt: skip
    group.add_argument("--qe-clip-n-stds", type=float, metavar="N", help="with --qe-clip-acts n_std")
    group.add_argument("--qe-no-clip-layers", "--qencl", nargs="+", default=[], metavar="LAYER",
        help="not clipped; end the list with another flag")  # fmt: skip
    group.add_argument("--qe-no-quant-layers", "--qenql", nargs="+", default=[], metavar="LAYER",
        help="not quantized; likewise")  # fmt: skip
    group.add_argument("--qe-per-channel", "--qepc", action="store_true", help="weights per output channel")
    group.add_argument("--qe-scale-approx-bits", "--qesab", type=_at_least(1), metavar="BITS",
        help="rescale by an integer of so many bits and a shift")  # fmt: skip
    group.add_argument(
        "--qe-save-fp-weights", action="store_true", help="keep the float weights beside the quantized"
    )
    sources = group.add_mutually_exclusive_group()
    sources.add_argument(
        "--qe-stats-file", type=_path, metavar="YAML", help="ranges from statistics collected before"
    )
    sources.add_argument("--qe-dynamic", action="store_true", help="ranges from each batch, no statistics")
    sources.add_argument("--qe-calibration", type=_fraction(above=0), metavar="P",
        help="collect statistics on this share of the training set; without --evaluate --quantize-eval: "
        "and exit (default source of ranges: 0.05)")  # fmt: skip
    sources.add_argument(
        "--qe-config-file", type=_path, metavar="YAML", help="every other --qe-* flag is ignored"
    )


REFUSED = {
    "activation histograms": ("--activation-histograms", "--act-hist"),
    "ONNX export": ("--export-onnx",),
    "thinning": ("--thinnify",),
    "early exit": ("--earlyexit_lossweights", "--earlyexit_thresholds"),
    "conversion to PyTorch's quantized modules": ("--qe-convert-pytorch", "--qept", "--qe-pytorch-backend"),
    "LAPQ": (
        "--qe-lapq", "--qe-coordinate-search", "--lapq-maxiter", "--lapq-maxfev", "--lapq-method",
        "--lapq-basinhopping", "--lapq-bh", "--lapq-basinhopping-niter", "--lapq-bh-niter",
        "--lapq-init-mode", "--lapq-init-method", "--lapq-eval-size", "--lapq-eval-memoize-dataloader",
        "--lapq-search-clipping",
    ),
    "knowledge distillation": (
        "--kd-teacher", "--kd-pretrained", "--kd-resume", "--kd-temperature", "--kd-temp",
        "--kd-distill-wt", "--kd-dw", "--kd-student-wt", "--kd-sw", "--kd-teacher-wt", "--kd-tw",
        "--kd-start-epoch",
    ),
}  # fmt: skip
"""Distiller's flags whose feature is not in this version: refused by name, never ignored."""


def _add_refused_flags(parser: argparse.ArgumentParser) -> None:
    for feature, flags in REFUSED.items():
        parser.add_argument(
            *flags, dest="refused", action=_Refuse, nargs="*", const=feature, help=argparse.SUPPRESS
        )


class _Refuse(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(f"{option_string}: {self.const} is not available in this version")


class _Summary(argparse.Action):
    choices_now = ("sparsity", "compute", "model", "modules")

    def __call__(self, parser, namespace, values, option_string=None):
        what = str(values).lower()
        if what in ("png", "png_w_params"):
            parser.error(f"{option_string} {what}: graph pictures are not available in this version")
        if what not in self.choices_now:
            choices = ", ".join(self.choices_now)
            parser.error(f"argument {option_string}: invalid choice: '{what}' (choose from {choices})")
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), what])


class _Resume(argparse.Action):
    """Distiller's --resume: --resume-from with --reset-optimizer."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)
        namespace.resumed_checkpoint_path, namespace.reset_optimizer = values, True


def _not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _path(text: str) -> str:
    return str(Path(_not_empty(text)).expanduser())


def _arch(text: str) -> str:
    return text if ":" in text else text.lower()


def _at_least(low: int, up_to: int = 2**63 - 1):
    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low}, got '{text}'")
        if value > up_to:
            limit = "below 2**63" if up_to == 2**63 - 1 else f"at most {up_to:,}"
            raise argparse.ArgumentTypeError(f"must be {limit}, got '{text}'")
        return value

    return whole_number


def _fraction(
    low: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    up_to: float = 1.0,
):
    """A number from `low` or above `above`, and below `below` or up to `up_to`."""
    bounds = [f"from {low:g}" if low is not None else f"above {above:g}"]
    bounds.append(f"below {below:g}" if below is not None else f"up to {up_to:g}")

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        inside = value >= low if low is not None else value > (above or 0.0)
        inside = inside and (value < below if below is not None else value <= up_to)
        if not inside:
            raise argparse.ArgumentTypeError(f"must be a number {' and '.join(bounds)}, got '{text}'")
        return value

    return number


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
        return run_or_explain(args, parser.parse_args([]))
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


def run_or_explain(args: argparse.Namespace, defaults: argparse.Namespace) -> int:
    """Do the job; returns the exit status."""
    from distiller.apputils.usage import check_usage
    from distiller.errors import DistillerError

    try:
        run(args, check_usage(args, defaults))
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


def _raise_if_unwritable(handler: logging.StreamHandler, name: str) -> None:
    """To be called while a log record could not be written: nothing is lost unnoticed, the run ends."""
    error = sys.exc_info()[1]
    if isinstance(error, OSError):
        handler.setLevel(logging.CRITICAL + 1)  # tell it once
        error.filename = name
        raise error


class _Console(logging.StreamHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        _raise_if_unwritable(self, "standard output")
        super().handleError(record)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        _raise_if_unwritable(self, self.baseFilename)
        super().handleError(record)


def set_up_console(verbose: bool) -> MemoryHandler:
    """Messages and warnings to standard output, and kept for the run's log file, which is not there yet."""
    console, early = _Console(sys.stdout), MemoryHandler(capacity=10_000, flushLevel=100)
    console.setLevel(logging.DEBUG if verbose else logging.INFO)
    logging.captureWarnings(True)
    warnings.formatwarning = lambda message, *_where: str(message)
    for name in ("distiller", "py.warnings"):
        log = logging.getLogger(name)
        log.setLevel(logging.DEBUG)
        log.handlers = [console, early]
        log.propagate = False
    return early


def make_run(args: argparse.Namespace, early: MemoryHandler) -> Run:
    """The run folder with its log file and loggers, and what the run runs on in the log."""
    from distiller.apputils import classifier_jobs as jobs
    from distiller.apputils.experiment import create_run_folder, environment
    from distiller.apputils.image_classifier import Run
    from distiller.data_loggers.loggers import CsvLogger, PythonLogger, TensorBoardLogger

    configs = [file for file in (args.compress, args.qe_stats_file, args.qe_config_file) if file]
    folder = create_run_folder(args.output_dir, args.name, configs)
    file = _LogFile(folder.log_file, encoding="utf-8", errors="backslashreplace")
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
