"""The seed of a run: given, a checkpoint's, or drawn. Some images are set aside by it to validate.

Knows nothing about models or data.
"""

from __future__ import annotations

import random
from argparse import Namespace

from distiller.apputils.checkpoint import Checkpoint

__all__ = ["choose_seed", "seed_warning"]


def choose_seed(args: Namespace, checkpoint: Checkpoint | None, *, trains: bool) -> int:
    """Given, the resumed run's, or drawn; 0 for what does not train: the same images each time.

    What decides by validation images without training has the seed of the checkpoint, however that is loaded:
    by another one it would have been trained on most of them.

    Args:
        args: the flags by name.
        checkpoint: that is loaded.
        trains: whether the run trains.
    """
    if args.seed is not None:
        return args.seed
    seed = _seed_of(checkpoint)
    if seed is not None and (args.resumed_checkpoint_path or _decides_by_validation(args, trains)):
        return seed
    is_drawn = trains and not args.deterministic
    return random.SystemRandom().randint(1, 100_000) if is_drawn else 0


def seed_warning(
    args: Namespace, checkpoint: Checkpoint, seed: int, *, trains: bool, goes_on: bool
) -> str | None:
    """What does not fit between the seed of a run and that of its checkpoint; None where all does.

    Args:
        args: the flags by name.
        checkpoint: that is loaded.
        seed: of the run.
        trains: whether the run trains.
        goes_on: whether it is the checkpoint's training that goes on.
    """
    theirs = _seed_of(checkpoint)
    if goes_on and theirs not in (None, seed):
        return (
            f"--seed {seed}: the resumed run's seed is {theirs}. With another one the order and augmentation "
            "of the images change, and which of them validate (some were trained on): the run does not end "
            f"as it would have without the interruption. Leave --seed out to go on with {theirs}"
        )
    if not _decides_by_validation(args, trains) or theirs == seed:
        return None
    if theirs is None:
        return (
            f"{checkpoint.path}: does not say by which seed it was trained: it may have been trained on "
            f"images that validate by seed {seed}. Give the --seed of its training"
        )
    return (
        f"--seed {seed}: {checkpoint.path} was trained by seed {theirs}, on most of the images that validate "
        f"by {seed}. Leave --seed out for its own"
    )


def _seed_of(checkpoint: Checkpoint | None) -> int | None:
    seed = checkpoint.extras.get("seed") if checkpoint is not None else None
    return None if seed is None else int(seed)


def _decides_by_validation(args: Namespace, trains: bool) -> bool:
    chosen_exits = (args.earlyexit_max_drop, args.earlyexit_shares)
    return not trains and (bool(args.sense_valid) or any(value is not None for value in chosen_exits))
