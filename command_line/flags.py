"""Flags of data, model, training, checkpoints and output."""

from __future__ import annotations

import argparse
from typing import Any

from command_line.argument_types import arch, at_least, fraction, not_empty, path

FLOAT32 = 3.4e38
"""About the largest number that weights can be multiplied with."""


def add_data_flags(group: Any) -> None:
    """Where the images come from."""
    group.add_argument("data", metavar="DATASET_DIR", nargs="?", type=path,
        help="folder of the data set; not needed by digits, synthetic, and fashion-mnist where its Debian "
        "package is installed; a function of your own is called with it, or with None")  # fmt: skip
    group.add_argument("--dataset", type=not_empty,
        help="digits, mnist, fashion-mnist, cifar10, cifar100, imagenet, image-folder, synthetic, or "
        "package.module:function (default: from the architecture's name)")  # fmt: skip
    group.add_argument(
        "--download", action="store_true", help="get mnist, fashion-mnist or cifar if DATASET_DIR lacks it"
    )
    group.add_argument("-j", "--workers", type=at_least(0), default=4, metavar="N",
        help="processes that read image files or a Dataset of your own (default: %(default)s)")  # fmt: skip
    group.add_argument(
        "-b", "--batch-size", "--batch", type=at_least(1), default=256, help="(default: %(default)s)"
    )
    group.add_argument(
        "--validation-split", "--valid-size", "--vs", type=fraction(0, below=1), default=0.1, metavar="P",
        help="share of the training set to validate on; 0: the test set is used (default: %(default)s)",
    )  # fmt: skip
    for part, short in (("train", "etrs"), ("valid", "evs"), ("test", "etes")):
        group.add_argument(
            f"--effective-{part}-size", f"--{short}", type=fraction(above=0), default=1.0, metavar="P",
            help=f"share of the {part} set used per epoch (default: %(default)s)",
        )  # fmt: skip


def add_model_flags(group: Any) -> None:
    """The network, and what it runs on."""
    group.add_argument("-a", "--arch", type=arch, default="resnet18",
        help="name, or package.module:function (default: %(default)s)")  # fmt: skip
    group.add_argument("--pretrained", action="store_true", help="torchvision's weights")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)")
    group.add_argument("--cpu", action="store_true", help="same as --device cpu; overrides --gpus")
    group.add_argument(
        "--gpus", "--gpu", metavar="IDS", help="comma-separated; several: DataParallel (default: all)"
    )
    group.add_argument("--load-serialized", action="store_true", help="no DataParallel over several GPUs")
    group.add_argument(
        "--channels-last", action="store_true",
        help="weights and activations laid out (N, H, W, C): often much faster on a CPU with few channels",
    )  # fmt: skip
    group.add_argument("--seed", type=at_least(0),
        help="(default: drawn and printed; with --resume-from that of its run; 0 with --deterministic, "
        "and for jobs that do not train)")  # fmt: skip
    group.add_argument(
        "--deterministic", "--det", action="store_true", help="seed 0 unless given; deterministic kernels"
    )


def add_training_flags(group: Any) -> None:
    """How it is trained."""
    group.add_argument(
        "--epochs", type=at_least(1, up_to=10**9), default=90,
        help="how many there are in all, those before --resume-from included (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--compress", nargs="?", const=False, type=path, metavar="FILE",
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
        "--lr", "--learning-rate", type=fraction(above=0, up_to=FLOAT32), default=0.1, metavar="LR",
        help="(default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--momentum", type=fraction(0, up_to=FLOAT32), default=0.9, help="of SGD (default: %(default)s)"
    )
    group.add_argument("--weight-decay", "--wd", type=fraction(0, up_to=FLOAT32), default=1e-4, metavar="W",
        help="(default: %(default)s)")  # fmt: skip


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """What it begins with."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--resume", dest="deprecated_resume", action=_Resume, type=path, help=argparse.SUPPRESS
    )
    group.add_argument("--resume-from", dest="resumed_checkpoint_path", type=path, metavar="CHECKPOINT",
        help="go on where it ended")  # fmt: skip
    group.add_argument("--exp-load-weights-from", dest="load_model_path", type=path, metavar="CHECKPOINT",
        help="take weights only")  # fmt: skip
    parser.add_argument(
        "--reset-optimizer", action="store_true", help="with --resume-from: a new optimizer, and epoch 0"
    )
    parser.add_argument("--save-untrained-model", action="store_true",
        help="also save the model that training begins with, as lottery tickets need it")  # fmt: skip


def add_output_flags(group: Any) -> None:
    """What is printed and written."""
    group.add_argument("-n", "--name", help="of the experiment: prefix of the run folder and its checkpoints")
    group.add_argument(
        "-o", "--out-dir", dest="output_dir", type=path, default="logs", help="(default: %(default)s)"
    )
    group.add_argument("-p", "--print-freq", type=at_least(1), default=10, metavar="N",
        help="mini-batches between lines (default: %(default)s)")  # fmt: skip
    group.add_argument("-v", "--verbose", action="store_true", help="print what else goes into the log file")
    group.add_argument("--confusion", dest="display_confusion", action="store_true",
        help="print the confusion matrix of each validation and test")  # fmt: skip
    group.add_argument("--num-best-scores", type=at_least(1), default=1, metavar="N",
        help="best epochs to print (default: %(default)s)")  # fmt: skip
    group.add_argument(
        "--masks-sparsity", action="store_true", help="print a table of the masks after each epoch's training"
    )
    group.add_argument("--param-hist", dest="log_params_histograms", action="store_true",
        help="a histogram of each parameter to TensorBoard, each epoch")  # fmt: skip
    group.add_argument("--activation-stats", "--act-stats", nargs="+", type=str.lower, default=[],
        choices=("train", "valid", "test"), metavar="PHASE",
        help="print and save statistics of activations in these phases (train, valid, test): of the outputs "
        "of ReLU, ReLU6 and LeakyReLU modules, and records of those of Conv2d; end the list with another "
        "flag")  # fmt: skip


class _Resume(argparse.Action):
    """Distiller's --resume: --resume-from with --reset-optimizer."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)
        namespace.resumed_checkpoint_path, namespace.reset_optimizer = values, True
