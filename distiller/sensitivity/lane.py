"""Units of a sweep that are run in one memory layout and type, chunk by chunk.

Knows nothing about labels, levels or blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distiller.names import named_buffers, named_parameters
from distiller.replay import Program, Rerun, Variant, clean_pass, folded_norms
from distiller.replay.layer_outputs import CONVOLUTIONS
from distiller.replay.memory_layout import to_channels_last
from distiller.replay.program import Step, unbatched
from distiller.replay.rerun import one_at_once
from distiller.sensitivity.units import Unit

__all__ = ["Lane", "LanePart"]

_BYTES_AT_ONCE = 2**20
"""Of a layer's result: variants are run together until it has so many, which stay in a cache."""
_ROWS_AT_ONCE = 2048
"""Of a layer's result (one for each image and position): variants are run together until it has so many. With
fewer, a layer takes longer to lay its weight out than to multiply with it."""


class Lane:
    """Units that are run in one memory layout and type.

    Args:
        model: the model.
        program: of it.
        units: of the sweep.
        places: of the units that are run here.
        channels_last: the memory layout.
        dtype: of the network; default its own.
        is_bitwise: whether each result is that of the network itself, bit for bit, when the chunk is the
            whole block: one variant at a time, in the network's own layout and type, no sum in another order.
    """

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        units: Sequence[Unit],
        places: Sequence[int],
        channels_last: bool = False,
        dtype: torch.dtype | None = None,
        is_bitwise: bool = False,
    ) -> None:
        assert not (is_bitwise and (channels_last or dtype is not None))
        self.places = tuple(places)
        self.is_coarse = dtype is not None
        self.is_bitwise = is_bitwise
        self._program, self._dtype = program, dtype
        self._channels_last = channels_last
        state = {**dict(named_parameters(model)), **dict(named_buffers(model))}
        self._state = {name: self.laid_out(value.detach()) for name, value in state.items()}
        folds = folded_norms(program, self._state) if not is_bitwise else ()
        self._reruns = {
            place: Rerun(program, units[place].tensors, units[place].inputs, folds) for place in places
        }

    def takes(self, images: Tensor) -> bool:
        """Whether it keeps its promise for so many images: bit for bit no block is filled up or split."""
        fits = len(images) == self._program.batch if self._program.batch else len(images) >= self._least
        return fits or not self.is_bitwise

    @property
    def _least(self) -> int:
        return 2 if self._program.batch is None else self._program.batch

    def run(
        self, images: Tensor, places: Sequence[int], on_dense: Callable[[Tensor], None] | None = None
    ) -> Iterator[tuple[int, LanePart]]:
        """(unit, what depends on it), for one chunk; each is valid until the next one is asked for.

        Args:
            images: the chunk.
            places: of the units that are wanted.
            on_dense: is given the logits of the dense network, in the end.
        """
        readers = [self._reruns[place] for place in places]
        filled = self._filled_up(images)
        for at, value in clean_pass(self._program, self._state, filled, readers):
            if at >= 0:
                yield places[at], LanePart(self, readers[at], value, len(images), len(filled))
            elif on_dense is not None:
                on_dense(_outliving(value(self._program.output)[: len(images)]))

    def dense(self, images: Tensor) -> Tensor:
        """Logits of the dense network, for one chunk."""
        ((_, value),) = clean_pass(self._program, self._state, self._filled_up(images), ())
        return _outliving(value(self._program.output)[: len(images)])

    def bytes_read(self, place: int, images: Tensor) -> float:
        """Of the clean results that a unit reads, for so many images; infinite where that is not known."""
        total = 0
        shapes = {step.index: step.shape for step in self._program.steps}
        for index in self._reruns[place].needs:
            shape = tuple(images.shape) if index == self._program.images else shapes[index]
            if shape is None:
                return math.inf
            total += images.element_size() * len(images) * math.prod(shape[1:])
        return total

    def laid_out(self, value: Tensor) -> Tensor:
        """A tensor in this layout and type."""
        if self._dtype is not None and value.is_floating_point():
            value = value.to(self._dtype)
        return to_channels_last(value) if self._channels_last and value.dim() == 4 else value

    def _filled_up(self, images: Tensor) -> Tensor:
        """Images, some of them twice where the program takes no fewer, laid out."""
        if len(images) < self._least:
            images = images[torch.arange(self._least, device=images.device) % len(images)]
        return self.laid_out(images)


@dataclass(frozen=True, slots=True)
class LanePart:
    """What depends on a unit, for one chunk.

    Attributes:
        lane: where it is run.
        rerun: what is run.
        value: results of the clean pass, by index.
        images: of the chunk.
        filled: images of the clean pass.
    """

    lane: Lane
    rerun: Rerun
    value: Callable[[int], Any]
    images: int
    filled: int

    def logits(
        self, variants: Sequence[Variant], at_once: Callable[[Step], int] | None = None
    ) -> list[Tensor]:
        """Of each variant, (images, classes).

        Args:
            variants: of the unit.
            at_once: for how many of them a layer is run together; default as many as pays. A bitwise lane
                runs one.
        """
        changes = [
            Variant(
                {name: self.lane.laid_out(value) for name, value in variant.tensors.items()}, variant.inputs
            )
            for variant in variants
        ]
        at_once = one_at_once if self.lane.is_bitwise else at_once or partial(_at_once, self.filled)
        outputs = self.rerun.outputs(
            self.value, changes, self.filled, at_once, in_parts=not self.lane.is_bitwise
        )
        return [_outliving(logits[: self.images]) for logits in outputs]

    def kept(self) -> LanePart:
        """The same, valid for as long as it is there."""
        results = {index: self.value(index) for index in self.rerun.needs}
        value = self.value
        return replace(self, value=lambda index: results[index] if index in results else value(index))


def _outliving(logits: Tensor) -> Tensor:
    """Logits that outlive the memory of the pass they are of."""
    return logits.float() if logits.dtype == torch.bfloat16 else logits.clone()


def _at_once(images: int, layer: Step) -> int:
    """For how many variants a layer is run together."""
    if unbatched(layer.shape):
        return 1
    assert layer.shape is not None
    positions = math.prod(layer.shape[2:] if layer.kind in CONVOLUTIONS else layer.shape[1:-1])
    elements = math.prod(layer.shape[1:])
    return max(1, _ROWS_AT_ONCE // (images * positions), _BYTES_AT_ONCE // (4 * images * elements))
