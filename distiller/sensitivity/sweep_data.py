"""The images of a sweep, in blocks that can be asked for one by one.

Knows nothing about models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from distiller.errors import UsageError

_SEED = 20_240_501
"""Of the one random order; any number would do, as long as it is there before the results."""


class SweepData(Protocol):
    """Labelled images in a fixed order, in blocks of which only the last may be smaller."""

    @property
    def num_samples(self) -> int:
        """Images in all."""
        ...

    @property
    def batch_size(self) -> int:
        """Images of a block."""
        ...

    @property
    def identity(self) -> str:
        """A text that other images, or another order, do not have."""
        ...

    def blocks(self, indices: Iterable[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of blocks, from 0, in the order asked for; each is read when it is its turn."""
        ...


class TensorBlocks:
    """Images in memory.

    Args:
        images: (n, ...).
        labels: (n,), integers.
        batch_size: at least 1.
        identity: a text that other images do not have.
        order: of the images, (n,); default as they are.

    Raises:
        UsageError: there is no image, not a label for each, or a batch size below 1.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, batch_size: int, identity: str, order: Tensor | None = None
    ) -> None:
        if not len(images) or len(images) != len(labels):
            raise UsageError(
                f"sensitivity: a label for each of one or more images is needed, got {len(images)} images "
                f"and {len(labels)} labels"
            )
        if batch_size < 1:
            raise UsageError(f"sensitivity: the batch size must be at least 1, got {batch_size}")
        self.num_samples, self.batch_size, self.identity = len(images), batch_size, identity
        self._images, self._labels = images, labels
        self._parts = (torch.arange(len(images)) if order is None else order).split(batch_size)

    def blocks(self, indices: Iterable[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of blocks."""
        return ((self._images[self._parts[i]], self._labels[self._parts[i]]) for i in indices)


def random_order(num_samples: int) -> Tensor:
    """The one random order of so many images, (n,): the same in every sweep."""
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(_SEED))


def block_count(data: SweepData) -> int:
    """How many blocks there are."""
    return -(-data.num_samples // data.batch_size)
