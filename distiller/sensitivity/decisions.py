"""What logits say of images: right or wrong, and how close it was.

Knows nothing about where logits come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from distiller.label_ranks import label_ranks

_TOP = 5


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts over some images.

    Attributes:
        n: images.
        top1: those whose label has the highest logit.
        top5: those whose label is among the five highest.
        loss: sum of their cross-entropies.
        lost: those that the dense network gets right, and this one wrong.
        won: those the other way round.
    """

    n: int
    top1: int
    top5: int
    loss: float
    lost: int = 0
    won: int = 0

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Tally:
        """Those of one batch: logits (batch, classes), labels (batch,). Losses are at least of float32."""
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        rank = label_ranks(logits, labels)
        loss = F.cross_entropy(logits, labels).double() * len(labels)  # as a mean over the batch is summed
        top1, top5 = int((rank == 0).sum()), int((rank < _TOP).sum())
        return cls(len(labels), top1, top5, float(loss))

    def against(self, dense_is_right: Tensor, is_right: Tensor) -> Tally:
        """With what changed from the dense network, given who is right on each image."""
        lost, won = int((dense_is_right & ~is_right).sum()), int((~dense_is_right & is_right).sum())
        return replace(self, lost=lost, won=won)

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.n + other.n,
            self.top1 + other.top1,
            self.top5 + other.top5,
            self.loss + other.loss,
            self.lost + other.lost,
            self.won + other.won,
        )


@dataclass(frozen=True, slots=True)
class Decisions:
    """What is left of logits when they are gone.

    Attributes:
        tally: of the images, without what changed from the dense network.
        is_right: (images,) of bool.
        distance: the least by which two logits would have to come nearer for another image to be right, or
            among the five highest, or one less; NaN where a logit is.
        largest: of the absolute logits.
    """

    tally: Tally
    is_right: Tensor
    distance: Tensor
    largest: Tensor

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Decisions:
        """Those of one batch: logits (batch, classes), labels (batch,)."""
        of_label = logits.gather(1, labels.unsqueeze(1))
        others = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
        highest = others.topk(min(_TOP, logits.shape[1]), dim=1).values
        gaps = torch.stack(((of_label - highest[:, :1]).abs(), (of_label - highest[:, -1:]).abs()))
        return cls(Tally.of(logits, labels), right_answers(logits, labels), gaps.amin(), logits.abs().amax())

    @classmethod
    def together(cls, parts: Sequence[Decisions]) -> Decisions:
        """Those of all images, in the order of the parts; one at least."""
        return cls(
            sum((part.tally for part in parts), Tally(0, 0, 0, 0.0)),
            torch.cat([part.is_right for part in parts]),
            torch.stack([part.distance for part in parts]).amin(),
            torch.stack([part.largest for part in parts]).amax(),
        )

    def could_be_others(self, tolerance: float) -> bool:
        """Whether an error of the logits could change one, or a logit is not finite.

        Args:
            tolerance: of the error, relative to the largest logit.
        """
        return not bool(self.distance > 2 * tolerance * self.largest)


def right_answers(logits: Tensor, labels: Tensor) -> Tensor:
    """Which labels have the highest logit, (batch,) of bool."""
    return label_ranks(logits, labels) == 0


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value; infinite where either is not finite."""
    if not bool(found.isfinite().all() & expected.isfinite().all()):
        return float("inf") if not torch.equal(found.isfinite(), expected.isfinite()) else 0.0
    scale = float(expected.abs().max())
    return float((found - expected).abs().max()) / scale if scale else float((found - expected).abs().max())
