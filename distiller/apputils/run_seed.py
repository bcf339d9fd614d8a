"""The seed of a run: given, a checkpoint's, or drawn. A share of the images is set aside by it to validate.

Knows nothing about models or data.
"""

from __future__ import annotations

import random
from argparse import Namespace
from typing import Any

from distiller.apputils.checkpoint import Checkpoint

__all__ = ["SPLIT_EXTRAS", "choose_seed", "seed_warning", "split_extras", "split_warning"]

SPLIT_EXTRAS = ("seed", "validation_split")
"""What checkpoints keep in their extras of the images that training set aside."""


def split_extras(args: Namespace, seed: int) -> dict[str, Any]:
    """That of a run."""
    return {"seed": seed, "validation_split": args.validation_split}


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


def split_warning(args: Namespace, checkpoint: Checkpoint, *, trains: bool, goes_on: bool) -> str | None:
    """What does not fit between the shares of images that a run and its checkpoint's training set aside.

    The images of a smaller share are among those of a larger one, by the same seed.

    Args:
        args: the flags by name.
        checkpoint: that is loaded.
        trains: whether the run trains.
        goes_on: whether it is the checkpoint's training that goes on.
    """
    own, theirs = args.validation_split, checkpoint.extras.get("validation_split")
    decides = _decides_by_validation(args, trains)
    if theirs is None:
        if not decides or _seed_of(checkpoint) is None:  # which is told
            return None
        return (
            f"{checkpoint.path}: does not say which share of the images its training set aside: some of "
            "those that validate now may have been trained on. Give the --validation-split of its training, "
            f"now {own:g}"
        )
    if goes_on and theirs != own:
        return (
            f"--validation-split {own:g}: that of the resumed run is {theirs:g}. With another one other "
            f"images validate (some were trained on): give --validation-split {theirs:g} to go on as it began"
        )
    if not decides or own <= theirs:
        return None
    remedy = f"give --validation-split {theirs:g}" if theirs else "train with images set aside"
    return (
        f"--validation-split {own:g}: {checkpoint.path} was trained with {theirs:g}, on some of the images "
        f"that validate now; {remedy}"
    )


def _seed_of(checkpoint: Checkpoint | None) -> int | None:
    seed = checkpoint.extras.get("seed") if checkpoint is not None else None
    return None if seed is None else int(seed)


def _decides_by_validation(args: Namespace, trains: bool) -> bool:
    chosen_exits = (args.earlyexit_max_drop, args.earlyexit_shares)
    return not trains and (bool(args.sense_valid) or any(value is not None for value in chosen_exits))
