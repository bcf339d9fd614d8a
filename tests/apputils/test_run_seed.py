from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from distiller.apputils.checkpoint import Checkpoint
from distiller.apputils.run_seed import choose_seed, seed_warning

PATH = Path("x.pth.tar")
DECIDING = ({"sense_valid": True}, {"earlyexit_max_drop": 1.0}, {"earlyexit_shares": [0.5]})


def flags(**given):
    unset = {"seed": None, "deterministic": False, "resumed_checkpoint_path": None, "sense_valid": False}
    return Namespace(**{**unset, "earlyexit_max_drop": None, "earlyexit_shares": None, **given})


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


def test_what_looks_at_no_validation_images_has_any_seed():
    for seed in (99, None):
        assert seed_warning(flags(), checkpoint(seed), 7, trains=False, goes_on=False) is None
    assert choose_seed(flags(), checkpoint(), trains=False) == 0
    assert choose_seed(flags(resumed_checkpoint_path=PATH), checkpoint(), trains=False) == 99
