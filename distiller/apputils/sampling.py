"""Which samples, in which order: splits, subsets and the random generators behind them.

Every random choice comes from (seed, what it is for, epoch), never from a global random state.
Knows nothing about data.
"""

from __future__ import annotations

import hashlib
import math
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Generator, Tensor

from distiller.errors import DatasetError


def split_indices(count: int, validation_split: float, seed: int) -> tuple[Tensor, Tensor]:
    """(training, validation) samples: of a random order, the first floor(split * count) validate.

    Args:
        count: samples to split.
        validation_split: [0, 1).
        seed: of the order.

    Returns:
        Two sets of indices, ascending, disjoint, together all of 0 .. count - 1.

    Raises:
        DatasetError: one side would be empty though it is asked for.
    """
    order = torch.randperm(count, generator=seeded(seed, "split"))
    held_out = _floor(count * validation_split)
    if validation_split > 0 and held_out in (0, count):
        raise DatasetError(
            f"validation_split: {validation_split} of {count} images leaves none to "
            f"{'train' if held_out else 'validate'} on; give another, or 0 to validate on the test set"
        )
    return order[held_out:].sort().values, order[:held_out].sort().values


def subset_size(count: int, portion: float) -> int:
    """floor(portion * count), at least 1."""
    return max(1, _floor(count * portion))


def draw_subset(pool: Tensor, portion: float, generator: Generator) -> Tensor:
    """A portion (0, 1] of `pool`, each sample at most once, in random order."""
    return pool[torch.randperm(len(pool), generator=generator)[: subset_size(len(pool), portion)]]


def seeded(seed: int, purpose: str, epoch: int = 0) -> Generator:
    """A random generator of its own for each (seed, purpose, epoch)."""
    mixed = np.random.SeedSequence([seed % 2**64, zlib.crc32(purpose.encode()), epoch])
    return Generator().manual_seed(int(mixed.generate_state(1, np.uint64)[0]))


@contextmanager
def isolated_random_state(seed: int) -> Iterator[None]:
    """The global random states of torch (CPU), numpy and Python seeded within, and as before after."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - a user's data set may draw from it
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


def fingerprint(indices: Tensor) -> str:
    """A short text that is another one for other samples, or another order."""
    return hashlib.sha256(indices.numpy().tobytes()).hexdigest()[:16]


def _floor(samples: float) -> int:
    """`math.floor`, but 28.999999999999996 (0.29 * 100) is 29."""
    return math.floor(samples + 1e-9)
