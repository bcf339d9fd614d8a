import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distiller.apputils.sampling import (
    draw_subset,
    isolated_random_state,
    seeded,
    split_indices,
    subset_size,
)
from distiller.errors import DatasetError

SEEDS = st.integers(-(2**63), 2**63)


@given(count=st.integers(2, 300), percent=st.integers(1, 99), seed=SEEDS)
def test_split_is_disjoint_complete_and_of_the_size_asked_for(count, percent, seed):
    held_out = count * percent // 100
    if held_out == 0:
        with pytest.raises(DatasetError):
            split_indices(count, percent / 100, seed)
        return
    train, valid = split_indices(count, percent / 100, seed)
    assert len(valid) == held_out
    assert sorted(train.tolist() + valid.tolist()) == list(range(count))


def test_split_of_zero_leaves_all_for_training():
    train, valid = split_indices(7, 0, seed=3)
    assert train.tolist() == list(range(7))
    assert len(valid) == 0


def test_split_depends_on_the_seed_alone():
    assert torch.equal(split_indices(100, 0.3, 5)[1], split_indices(100, 0.3, 5)[1])
    assert not torch.equal(split_indices(100, 0.3, 5)[1], split_indices(100, 0.3, 6)[1])


def test_split_that_leaves_nothing_names_the_remedy():
    with pytest.raises(DatasetError) as caught:
        split_indices(5, 0.1, seed=0)
    assert str(caught.value) == (
        "validation_split: 0.1 of 5 images leaves none to validate on; "
        "give another, or 0 to validate on the test set"
    )
    with pytest.raises(DatasetError, match="leaves none to train on"):
        split_indices(5, 0.9999999999, seed=0)


@given(count=st.integers(1, 200), percent=st.integers(1, 100), seed=SEEDS)
def test_subset_holds_distinct_samples_of_the_pool(count, percent, seed):
    pool = torch.arange(count) * 3 + 1
    subset = draw_subset(pool, percent / 100, seeded(seed, "test"))
    assert len(subset) == max(1, count * percent // 100)
    assert len(set(subset.tolist())) == len(subset)
    assert set(subset.tolist()) <= set(pool.tolist())


def test_portion_is_not_short_of_a_sample_by_rounding():
    assert 0.29 * 100 < 29
    assert subset_size(100, 0.29) == 29


def test_generators_differ_by_seed_purpose_and_epoch():
    draws = {
        torch.randint(2**40, (1,), generator=seeded(*key)).item()
        for key in [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1), (2**32, "a", 0), (-1, "a", 0)]
    }
    assert len(draws) == 6


def test_random_states_are_seeded_within_and_restored_after():
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002

    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    with isolated_random_state(11):
        first = draw()
    with isolated_random_state(11):
        assert draw() == first
    with pytest.raises(KeyError), isolated_random_state(11):
        raise KeyError
    with isolated_random_state(12):
        assert not set(draw()) & set(first)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]
