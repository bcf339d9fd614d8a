from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from distiller.apputils.determinism import set_deterministic


@pytest.fixture(autouse=True)
def restored():
    yield
    torch.use_deterministic_algorithms(False)


def test_every_generator_repeats_after_the_same_seed():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002

    set_deterministic(7)
    first = draw()
    set_deterministic(7, deterministic=False)
    assert draw() == first
    set_deterministic(8)
    assert draw() != first


def test_deterministic_kernels_are_chosen_only_when_asked():
    set_deterministic(0)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    set_deterministic(0, deterministic=False)
    assert not torch.are_deterministic_algorithms_enabled()
