"""A sample of a tensor's elements, spread evenly over it.

Knows nothing about what it is for.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def sample_of(flat: Tensor, count: int, shift: float) -> Tensor:
    """One element at random from each of `count` stretches of equal length.

    Elements at a fixed distance would all be of one channel in some memory layouts.

    Args:
        flat: (elements,), in the order of memory.
        count: size of the sample.
        shift: 0..1: moves all places by this share of a stretch; the places are the same but for it.

    Returns:
        (count,); all of `flat` where there are no more.
    """
    if count >= len(flat):
        return flat
    spare = len(flat) // count - 1
    skipped = round(shift * spare)
    flat = flat[skipped : len(flat) - spare + skipped]
    return flat.index_select(0, _places(len(flat), count).to(flat.device))


@lru_cache(maxsize=64)
def _places(length: int, count: int) -> Tensor:
    """(count,): ascending indices below `length`, one in each of `count` stretches."""
    generator = torch.Generator().manual_seed(0)
    jitter = torch.rand(count, generator=generator, dtype=torch.float64)
    places = (torch.arange(count) + jitter) * (length / count)
    return places.to(torch.int32 if length < 1 << 31 else torch.int64)
