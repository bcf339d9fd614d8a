from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from distiller.apputils.checkpoint import Checkpoint
from distiller.apputils.run_seed import (
    SPLIT_EXTRAS,
    choose_seed,
    seed_warning,
    split_extras,
    split_warning,
)

PATH = Path("x.pth.tar")
DECIDING = ({"sense_valid": True}, {"earlyexit_max_drop": 1.0}, {"earlyexit_shares": [0.5]})


def flags(**given):
    unset = {"seed": None, "deterministic": False, "resumed_checkpoint_path": None, "sense_valid": False}
    none = {"earlyexit_max_drop": None, "earlyexit_shares": None, "validation_split": 0.1}
    return Namespace(**{**unset, **none, **given})


def checkpoint(seed=99):
    return Checkpoint(PATH, {}, extras={} if seed is None else {"seed": seed})


@pytest.mark.parametrize("given", DECIDING)
def test_what_decides_by_validation_images_has_the_seed_of_the_checkpoint(given):
    assert choose_seed(flags(**given), checkpoint(), trains=False) == 99
    assert choose_seed(flags(seed=7, **given), checkpoint(), trains=False) == 7
    assert choose_seed(flags(**given), checkpoint(None), trains=False) == 0
    assert choose_seed(flags(**given), None, trains=False) == 0
    assert choose_seed(flags(deterministic=True, **given), checkpoint(), trains=True) == 0


@pytest.mark.parametrize("given", DECIDING)
def test_images_that_may_have_been_trained_on_are_told(given):
    args = flags(**given)
    assert seed_warning(args, checkpoint(), 99, trains=False, goes_on=False) is None
    assert seed_warning(args, checkpoint(), 7, trains=True, goes_on=False) is None
    assert seed_warning(args, checkpoint(), 7, trains=False, goes_on=False) == (
        "--seed 7: x.pth.tar was trained by seed 99, on most of the images that validate by 7. Leave --seed out for "
        "its own"
    )
    assert seed_warning(args, checkpoint(None), 0, trains=False, goes_on=False) == (
        "x.pth.tar: does not say by which seed it was trained: it may have been trained on images that validate by "
        "seed 0. Give the --seed of its training"
    )


def with_split(split):
    return Checkpoint(
        PATH, {}, extras={"seed": 99} if split is None else {"seed": 99, "validation_split": split}
    )


@pytest.mark.parametrize("given", DECIDING)
def test_a_share_that_was_trained_on_in_part_is_told(given):
    args = flags(**given)
    for enough in (0.1, 0.2):
        assert split_warning(args, with_split(enough), trains=False, goes_on=False) is None
    assert split_warning(args, with_split(0.05), trains=True, goes_on=False) is None
    assert split_warning(args, with_split(0.05), trains=False, goes_on=False) == (
        "--validation-split 0.1: x.pth.tar was trained with 0.05, on some of the images that validate now; give "
        "--validation-split 0.05"
    )
    assert split_warning(args, with_split(0.0), trains=False, goes_on=False) == (
        "--validation-split 0.1: x.pth.tar was trained with 0, on some of the images that validate now; train with "
        "images set aside"
    )
    assert split_warning(args, with_split(None), trains=False, goes_on=False) == (
        "x.pth.tar: does not say which share of the images its training set aside: some of those that validate now "
        "may have been trained on. Give the --validation-split of its training, now 0.1"
    )
    assert split_warning(args, checkpoint(None), trains=False, goes_on=False) is None  # told of the seed


def test_a_training_that_goes_on_with_another_share_is_told():
    for split in (0.05, 0.2):
        assert split_warning(flags(), with_split(split), trains=True, goes_on=True) == (
            f"--validation-split 0.1: that of the resumed run is {split}. With another one other images validate (some "
            f"were trained on): give --validation-split {split} to go on as it began"
        )
    assert split_warning(flags(), with_split(0.1), trains=True, goes_on=True) is None
    assert split_warning(flags(), with_split(None), trains=True, goes_on=True) is None


def test_a_run_keeps_both():
    assert split_extras(flags(validation_split=0.3), 7) == {"seed": 7, "validation_split": 0.3}
    assert set(split_extras(flags(), 7)) == set(SPLIT_EXTRAS)


def test_what_looks_at_no_validation_images_has_any_seed():
    for seed in (99, None):
        assert seed_warning(flags(), checkpoint(seed), 7, trains=False, goes_on=False) is None
    assert choose_seed(flags(), checkpoint(), trains=False) == 0
    assert choose_seed(flags(resumed_checkpoint_path=PATH), checkpoint(), trains=False) == 99
