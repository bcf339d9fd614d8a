"""The epochs of a policy, and how much of them has passed.

Knows nothing about policies.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["EpochWindow"]


@dataclass(frozen=True, slots=True)
class EpochWindow:
    """The epochs in which a policy is active; epochs count from 0.

    Attributes:
        epochs: the active epochs, ascending, at least one; a tuple or a range.
        written_end: the schedule's `ending_epoch`; None for a list of epochs.
    """

    epochs: Sequence[int]
    written_end: int | None = None

    @classmethod
    def spanning(cls, start: int, end: int, frequency: int = 1) -> EpochWindow:
        """Every `frequency`-th epoch from `start` to `end` (exclusive)."""
        return cls(range(start, end, frequency), end)

    @property
    def start(self) -> int:
        """The first active epoch."""
        return self.epochs[0]

    @property
    def last(self) -> int:
        """The last active epoch."""
        return self.epochs[-1]

    @property
    def end(self) -> int:
        """The epoch before which the policy ends: as written, or the one after the last active epoch."""
        return self.last + 1 if self.written_end is None else self.written_end

    @property
    def frequency(self) -> int:
        """Epochs from one active epoch to the next (of the first two; 1 when alone)."""
        return self.epochs[1] - self.epochs[0] if len(self.epochs) > 1 else 1

    def latest(self, epoch: int) -> int | None:
        """The last active epoch up to and including `epoch`; None before the first."""
        index = bisect_right(self.epochs, epoch)
        return self.epochs[index - 1] if index else None

    def acts_between(self, start: int, end: int) -> bool:
        """Whether an epoch from `start` to `end` (exclusive) is active."""
        latest = self.latest(end - 1)
        return latest is not None and latest >= start

    def progress(self, epoch: int) -> float:
        """How much of the window has passed at `epoch`: 0 at its first, 1 at its last epoch.

        A window of one epoch has passed as soon as it is reached.
        """
        if self.last == self.start:
            return 1.0
        return min(1.0, max(0.0, (epoch - self.start) / (self.last - self.start)))
