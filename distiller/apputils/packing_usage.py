"""Which job the flags of packed files ask for, and which of them cannot be together.

    --pack FILE with --evaluate          after the test
    --pack FILE when training            after the last test: what training ended with
    --pack FILE with a checkpoint alone  the checkpoint, and nothing else is done; with a flag of training, as
                                         --epochs, it is trained
    --unpack FILE                        a packed file becomes a checkpoint again

Knows nothing about how flags are parsed.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Iterator

from distiller.apputils.given_flags import given_flags

_OF_TRAINING = frozenset(
    ("epochs", "lr", "momentum", "weight_decay", "optimizer", "reset_optimizer", "earlyexit_lossweights")
)

__all__ = ["packing_rules", "packs_only"]


def packs_only(args: Namespace) -> bool:
    """Whether a checkpoint is to be packed as it is: nothing says that it is to be trained or tested."""
    has_checkpoint = bool(args.resumed_checkpoint_path or args.load_model_path)
    goes_on = args.compress or args.evaluate or args.kd_teacher or args.kd_chain or trains(args)
    return bool(args.pack) and has_checkpoint and not goes_on


def trains(args: Namespace) -> bool:
    """Whether flags that only training takes were given."""
    return not _OF_TRAINING.isdisjoint(given_flags(args))


def packing_rules(args: Namespace, jobs: Collection[str]) -> Iterator[tuple[bool, str]]:
    """Every rule: whether it is broken, and what is told then.

    Args:
        args: the flags by name.
        jobs: the flags of the jobs that are asked for.
    """
    has_checkpoint = bool(args.resumed_checkpoint_path or args.load_model_path)
    yield (
        bool(args.unpack and has_checkpoint),
        "--unpack: not together with --resume-from or --exp-load-weights-from, which take a packed file as "
        "it is",
    )
    yield bool(args.unpack and args.compress), "--compress: not together with --unpack, which trains nothing"
    yield bool(args.unpack) and trains(args), "--unpack: trains nothing; leave the flags of training out"
    yield (
        bool(args.pack) and (bool(args.kd_chain) or list(jobs) not in ([], ["--evaluate"], ["--pack"])),
        "--pack: only when training or evaluating, or with a checkpoint, given with --resume-from or "
        "--exp-load-weights-from, alone",
    )
