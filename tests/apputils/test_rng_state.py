import random

import numpy as np
import pytest
import torch

from distiller.apputils.rng_state import capture_rng_state, restore_rng_state
from distiller.errors import CheckpointError


def draw():
    return (
        [random.random() for _ in range(3)] + [random.gauss(0, 1)],
        [*np.random.rand(3).tolist(), float(np.random.randn())],  # noqa: NPY002 - the global generator
        torch.rand(5).tolist() + torch.randn(1).tolist() + torch.randperm(20).tolist(),
    )


@pytest.fixture(autouse=True)
def _generators_left_as_they_were():
    state = capture_rng_state()
    yield
    restore_rng_state(state)


def test_generators_draw_the_same_numbers_after_restoring():
    random.seed(1)
    np.random.seed(2)  # noqa: NPY002
    torch.manual_seed(3)
    draw()  # leaves a cached gaussian in Python's and numpy's generator
    state = capture_rng_state()
    first = draw()
    draw()
    restore_rng_state(state)
    assert draw() == first


def test_restoring_twice_from_one_state_is_possible():
    state = capture_rng_state()
    first = draw()
    restore_rng_state(state)
    draw()
    restore_rng_state(state)
    assert draw() == first


@pytest.mark.parametrize("key", ["python", "numpy", "torch"])
def test_a_state_without_one_generator_is_refused(key):
    state = capture_rng_state()
    del state[key]
    with pytest.raises(CheckpointError, match=f"random number generators: .*'{key}'.*start anew"):
        restore_rng_state(state)


@pytest.mark.parametrize("wrong", [7, "x", (1, 2), torch.zeros(3), None])
@pytest.mark.parametrize("key", ["python", "numpy", "torch"])
def test_a_state_of_another_form_is_refused(key, wrong):
    with pytest.raises(CheckpointError, match="cannot be restored"):
        restore_rng_state({**capture_rng_state(), key: wrong})


@pytest.mark.parametrize("position", [-1, 625, 10**6, 1.0])
def test_a_position_that_numpy_would_read_foreign_memory_at_is_refused(position):
    state = capture_rng_state()
    kind, keys, _, *rest = state["numpy"]
    with pytest.raises(CheckpointError, match="numpy's generator"):
        restore_rng_state({**state, "numpy": (kind, keys, position, *rest)})


def test_a_state_that_is_refused_leaves_every_generator_where_it_was():
    elsewhere = capture_rng_state()
    draw()
    before = capture_rng_state()
    with pytest.raises(CheckpointError):
        restore_rng_state({**elsewhere, "torch": torch.zeros(5056, dtype=torch.uint8)})
    expected = draw()
    restore_rng_state(before)
    assert draw() == expected
