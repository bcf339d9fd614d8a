"""What a schedule does in the epochs to come, joined into stretches in which the same happens.

Knows nothing about what the policies do; nothing is computed or changed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch.optim import Optimizer

from distiller.interfaces import EpochWindow
from distiller.scheduler import CompressionScheduler

_LOOKED_AT_EACH = 1000
"""The epochs that are looked at one by one; among later ones the next change is found by halving."""


class Stretch(NamedTuple):
    """Epochs `begin` to `last`, and the lines that describe each of them."""

    begin: int
    last: int
    lines: list[str]


def stretches_alike(
    scheduler: CompressionScheduler, end: int, optimizer: Optimizer | None = None
) -> Iterator[Stretch]:
    """The epochs before `end`, joined where the same is described.

    How long it takes depends on the changes, not on the epochs. From epoch 1000 on, what is described alike
    at both ends of an unbroken stretch of activity is taken to be alike within it.

    Args:
        scheduler: with its policies.
        end: the epoch after the last one; 1 or more.
        optimizer: as the policies describe themselves with it.
    """

    def describe(epoch: int) -> list[str]:
        return scheduler.describe(epoch, optimizer)

    windows = [entry.window for entry in scheduler.policies]
    begin, epoch, lines = 0, 0, describe(0)
    while epoch < end:
        boundary = min([end, *(_next_boundary(window, epoch, end) for window in windows)])
        epoch = _first_other(describe, lines, epoch, boundary)
        now = describe(epoch) if epoch < end else None
        if now != lines:
            yield Stretch(begin, epoch - 1, lines)
            begin, lines = epoch, now or []


def _next_boundary(window: EpochWindow, epoch: int, end: int) -> int:
    """The first epoch after `epoch` in which a policy may begin or cease to act; `end` if there is none."""
    epochs = window.epochs
    if epoch in epochs:
        is_unbroken = isinstance(epochs, range) and epochs.step == 1
        return window.last + 1 if is_unbroken else epoch + 1
    index = bisect_right(epochs, epoch)
    return epochs[index] if index < len(epochs) else end


def _first_other(describe: Callable[[int], list[str]], lines: list[str], epoch: int, boundary: int) -> int:
    """The first epoch after `epoch` that is not described by `lines`; `boundary` if none before it is."""
    near = min(boundary, max(epoch + 1, _LOOKED_AT_EACH))
    for look in range(epoch + 1, near):
        if describe(look) != lines:
            return look
    if near == boundary or describe(boundary - 1) == lines:
        return boundary
    same, other = near - 1, boundary - 1
    while other - same > 1:
        middle = (same + other) // 2
        same, other = (middle, other) if describe(middle) == lines else (same, middle)
    return other
