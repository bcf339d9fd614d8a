"""Loss and accuracy of a pass over labelled images, without waiting for the device at each step.

Knows nothing about models or loaders: logits, labels and losses in, counts and means out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distiller.data_loggers.loggers import result_line
from distiller.errors import DatasetError
from distiller.label_ranks import label_ranks


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What a classifier scored on `n` images.

    Attributes:
        loss: mean over the images.
        top1_correct: images whose label has the highest logit.
        top5_correct: images whose label is among the five highest (or all, when there are fewer).
        n: images seen.
        confusion: (classes, answers) counts on the CPU, row the label, column the class
            answered; None when not asked for.
    """

    loss: float
    top1_correct: int
    top5_correct: int
    n: int
    confusion: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * self.top1_correct / self.n

    @property
    def top5(self) -> float:
        """Percent."""
        return 100 * self.top5_correct / self.n

    @property
    def loss_is_finite(self) -> bool:
        """False once the loss of any batch was NaN or infinite."""
        return math.isfinite(self.loss)

    def line(self) -> str:
        """`==> Top1: 91.250    Top5: 99.500    Loss: 0.301`."""
        return result_line(self.loss, self.top1, self.top5)


def correct_counts(logits: Tensor, labels: Tensor) -> Tensor:
    """How many images have their label as the highest logit, and among the five highest.

    Args:
        logits: (batch, classes).
        labels: (batch,), integers.

    Equal logits and NaN count as `label_ranks` says.

    Returns:
        (2,) integers on the device of `logits`; with fewer than five classes the second
        counts the label among all of them.
    """
    rank = label_ranks(logits, labels)
    return torch.stack(((rank == 0).sum(), (rank < 5).sum()))


class ClassificationMeter:
    """Sums loss and correct answers batch by batch, on the device of the logits.

    Args:
        num_classes: count, for each of so many classes, what it was taken for; None for not.
    """

    def __init__(self, *, num_classes: int | None = None) -> None:
        self._num_classes = num_classes
        self._n = 0
        self._loss_sum: Tensor | None = None  # () in double precision where the device has it
        self._correct: Tensor | None = None  # (2,) top-1 and top-5
        self._confusion: Tensor | None = None  # (classes, classes)

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Take in one batch; does not wait for the device.

        Args:
            logits: (batch, classes).
            labels: (batch,), integers.
            loss: scalar, the mean over the batch.
        """
        if self._loss_sum is None or self._correct is None:
            self._loss_sum = torch.zeros((), dtype=_sum_dtype(logits), device=logits.device)
            self._correct = torch.zeros(2, dtype=torch.long, device=logits.device)
        self._n += len(labels)
        self._loss_sum += loss.detach().to(self._loss_sum.dtype) * len(labels)
        self._correct += correct_counts(logits, labels)
        if self._num_classes is not None:
            self._count_confusion(logits, labels, self._num_classes)

    def result(self) -> EvalResult:
        """The score of all batches so far; waits for the device once.

        Raises:
            DatasetError: there was no batch.
        """
        if self._loss_sum is None or self._correct is None:
            raise DatasetError("evaluation: no image was seen; give more data or a larger effective size")
        sums = torch.cat((self._loss_sum.reshape(1), self._correct.to(self._loss_sum.dtype)))
        loss_sum, top1, top5 = sums.tolist()
        confusion = None if self._confusion is None else self._confusion.cpu()
        return EvalResult(loss_sum / self._n, int(top1), int(top5), self._n, confusion)

    def _count_confusion(self, logits: Tensor, labels: Tensor, classes: int) -> None:
        answers = logits.shape[1]  # a network may know more classes than the data have
        if self._confusion is None:
            self._confusion = torch.zeros(classes, answers, dtype=torch.long, device=logits.device)
        cells = labels * answers + logits.argmax(dim=1)
        self._confusion.view(-1).index_add_(0, cells, torch.ones_like(cells))


class LossPartsMeter:
    """The mean over the images of each named part of the loss, summed on the part's device.

    Weighted as `ClassificationMeter` weighs the loss, so that the parts add up to it.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # () in double precision where the device has it
        self._n: dict[str, int] = {}

    @torch.no_grad()
    def update(self, parts: Iterable[tuple[str, Tensor]], n: int) -> None:
        """Take in one batch; does not wait for the device.

        Args:
            parts: (name, scalar mean over the batch); those of one name are added up.
            n: images in the batch.
        """
        batch: dict[str, Tensor] = {}
        for name, value in parts:
            batch[name] = batch[name] + value if name in batch else value
        for name, value in batch.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().to(_sum_dtype(value)) * n
            self._n[name] = self._n.get(name, 0) + n

    def result(self) -> dict[str, float]:
        """The means, over the batches that had the part; waits for the device."""
        return {name: float(total) / self._n[name] for name, total in self._sums.items()}


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64
