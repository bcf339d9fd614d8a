"""Inference that ends where the network is sure: images that leave are not computed further.

At each branch point the branch answers for the images that are left, those of which it is sure get its
answer, and the layers behind see the smaller batch. When none is left the forward pass ends there.
Knows nothing about labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distiller.branch_points import BranchPoint, exits_of
from distiller.early_exit.branches import check_branch_points
from distiller.early_exit.rules import ExitRule, check_count
from distiller.errors import DistillerError, UsageError
from distiller.evaluation_mode import evaluating
from distiller.names import unwrap


class ExitOutcome(NamedTuple):
    """What a batch of images was answered.

    Attributes:
        logits: (batch, classes), each image's from where it left.
        exits: (batch,) integers, where that was: 0 is the first exit, the number of exits the final output.
    """

    logits: Tensor
    exits: Tensor


@contextmanager
def early_exits(model: nn.Module, rule: ExitRule) -> Iterator[Callable[[Tensor], ExitOutcome]]:
    """Within the block the model is in evaluation mode, and images leave it early.

        with early_exits(model, ExitRule("entropy", (0.3,))) as answer:
            logits, exits = answer(images)

    Args:
        model: with exits; a wrapper around it is not run, the model inside is.
        rule: with a threshold for each of them.

    Yields:
        A function of a batch of images, (batch, ...), without gradients.

    Raises:
        UsageError: the model has no exits or another number of them, or one is where the network has another
            way past it.
        GraphTraceError: whether it has cannot be found out.
    """
    bare = unwrap(model)
    points = exits_of(bare)
    if not points:
        raise UsageError("early exit: the model has no exits; attach some")
    check_count("thresholds", len(rule.thresholds), len(points))
    check_branch_points(bare)
    with evaluating(bare):
        yield lambda images: _Pass(bare, points, rule).run(images)


class _AllHaveLeft(Exception):
    """Ends a forward pass of which no image is left."""


class _Pass:
    """One forward pass: which images are left, and what the others were answered."""

    def __init__(self, model: nn.Module, points: tuple[BranchPoint, ...], rule: ExitRule) -> None:
        self._model, self._points, self._rule = model, points, rule
        self._left = torch.empty(0)  # indices into the batch
        self._exits = torch.empty(0)
        self._logits: Tensor | None = None

    def run(self, images: Tensor) -> ExitOutcome:
        count = len(images)
        self._left = torch.arange(count, device=images.device)
        self._exits = torch.full((count,), len(self._points), device=images.device)
        for point in self._points:
            point.gate = self._gate
        try:
            with suppress(_AllHaveLeft):
                self._answer(self._model(images))
        finally:
            for point in self._points:
                point.gate = None
        assert self._logits is not None
        return ExitOutcome(self._logits, self._exits)

    def _gate(self, index: int, branch: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if len(x) != len(self._left):
            raise DistillerError(
                f"early exit: exit {index + 1} sees a batch of {len(x)} where {len(self._left)} images are "
                "left; it must read a tensor of one row an image"
            )
        if self._rule.thresholds[index] is None:  # nothing leaves: its branch is not computed either
            return x
        logits = branch(x)
        leaves = self._rule.leaves(index, logits)
        gone = leaves.nonzero().squeeze(1)
        if len(gone) == 0:
            return x
        self._place(self._left[gone], logits[gone])
        self._exits[self._left[gone]] = index
        stay = leaves.logical_not().nonzero().squeeze(1)
        self._left = self._left[stay]
        if len(stay) == 0:
            raise _AllHaveLeft
        return x[stay]

    def _answer(self, output: Tensor) -> None:
        if len(output) != len(self._left):
            raise DistillerError(
                f"early exit: the network answers with {len(output)} rows where {len(self._left)} images are "
                "left"
            )
        if len(output) == len(self._exits):
            self._logits = output
        else:
            self._place(self._left, output)

    def _place(self, indices: Tensor, logits: Tensor) -> None:
        if self._logits is None:
            self._logits = logits.new_empty((len(self._exits), *logits.shape[1:]))
        self._logits[indices] = logits
