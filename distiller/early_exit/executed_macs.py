"""The multiply-accumulates that a model with early exits really does: counted where batches get smaller.

What each layer does for one image is counted once; hooks then count the images that each layer sees.
Knows nothing about thresholds that were chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distiller.branch_points import every_exit, exits_of
from distiller.early_exit.rules import ExitRule, Threshold
from distiller.early_exit.session import early_exits
from distiller.errors import UsageError
from distiller.evaluation_mode import buffers_kept, evaluating
from distiller.macs import count_macs
from distiller.names import named_modules, unwrap
from distiller.observation import watch_inputs


class ImageCounter:
    """How many images each layer of a model sees, and what it does for them.

    Args:
        model: with exits or without.
        image: one image, (1, ...), where the model is.

    Attributes:
        images: seen by each module that has work of its own, by canonical name; of a module that is called
            twice in a forward pass each image counts twice.
    """

    def __init__(self, model: nn.Module, image: Tensor) -> None:
        bare = unwrap(model)
        self._modules = dict(named_modules(bare))
        self.images: Counter[str] = Counter()
        with every_exit(bare):
            costs = count_macs(bare, image)
            self._modules = {cost.name: self._modules[cost.name] for cost in costs}
            with self.counting(), evaluating(bare), buffers_kept(bare):
                bare(image)
        self._macs = {cost.name: cost.macs / self.images[cost.name] for cost in costs}
        self.images.clear()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within the block the images that the layers see are counted."""
        handles = [watch_inputs(module, partial(self._see, name)) for name, module in self._modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def macs(self) -> float:
        """The multiply-accumulates of all that was counted."""
        return sum(macs * self.images[name] for name, macs in self._macs.items())

    def macs_within(self, module: nn.Module) -> float:
        """Those of one module and of all that is in it."""
        inside = set(module.modules())
        return sum(
            macs * self.images[name] for name, macs in self._macs.items() if self._modules[name] in inside
        )

    def _see(self, name: str, module: nn.Module, inputs: Any) -> None:
        self.images[name] += next(len(x) for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor))


@dataclass(frozen=True, slots=True)
class ExitCosts:
    """The multiply-accumulates for one image.

    Attributes:
        trunk: of the network without branches, up to each exit, and of the whole.
        branches: of each exit's branch.
    """

    trunk: tuple[float, ...]
    branches: tuple[float, ...]

    def of_leaving(self, is_open: Sequence[bool]) -> tuple[float, ...]:
        """For an image that leaves at each exit, and at the end, when branches of the open ones run."""
        run = [branch if opened else 0.0 for branch, opened in zip(self.branches, is_open, strict=True)]
        on_the_way = [sum(run[: index + 1]) for index in range(len(run))]
        return tuple(a + b for a, b in zip(self.trunk, [*on_the_way, sum(run)], strict=True))


def exit_costs(model: nn.Module, image: Tensor) -> ExitCosts:
    """What an image costs that leaves at each exit, counted in passes that end there.

    Args:
        model: with exits.
        image: one image, (1, ...), where the model is.

    Raises:
        UsageError: as `early_exits`; or the model answers with what is no number.
    """
    bare = unwrap(model)
    counter, points = ImageCounter(bare, image), exits_of(bare)
    trunk: list[float] = []
    branches: list[float] = []
    for index in range(len(points) + 1):
        thresholds: list[Threshold] = [None] * len(points)
        if index < len(points):
            thresholds[index] = 0.0  # every confidence is above it
        counter.images.clear()
        with early_exits(bare, ExitRule("confidence", tuple(thresholds))) as answer, counter.counting():
            left_at = int(answer(image).exits[0])
        if left_at != index:
            raise UsageError("early exit: the model answers with what is no number; train it first")
        if index < len(points):
            branches.append(counter.macs_within(points[index].branch_net))
        trunk.append(counter.macs - sum(branches[index:]))
    return ExitCosts(tuple(trunk), tuple(branches))
