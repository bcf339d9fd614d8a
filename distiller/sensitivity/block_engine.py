"""The scores of all points of a sweep on one block of images.

    for each chunk of the block:
        run the dense network once
        for each unit, as soon as what it reads is there:
            run what depends on it, for every level

Levels whose variants are equal are run once. A decision that is closer than what the order of summation can
change is made by the plain loop: the whole network, in its own memory layout, on the whole block. So is every
unit that the network cannot be cut at.
Knows nothing about data sets, files or processes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distiller.names import named_buffers, named_parameters
from distiller.replay import Program, Rerun, Variant, applied, clean_pass, folded_norms
from distiller.replay.layer_outputs import CONVOLUTIONS
from distiller.replay.memory_layout import to_channels_last
from distiller.replay.program import Step, unbatched
from distiller.sensitivity.decisions import Tally, near_ties, right_answers
from distiller.sensitivity.units import Unit

TOLERANCE = 2e-5
"""Of the largest logit: what sums in another order may change, with much to spare."""
_CACHED_BYTES = 2**28
"""Of the variants of one engine; those beyond are made anew for each block."""
_BYTES_AT_ONCE = 2**20
"""Of a layer's result: variants are run together until it has so many, which stay in a cache."""
_ROWS_AT_ONCE = 2048
"""Of a layer's result (one for each image and position): variants are run together until it has so many. With
fewer, a layer takes longer to lay its weight out than to multiply with it."""

Place = tuple[int, int]
"""(unit, level): places in `units` and in the levels of the unit."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How blocks are run; results do not depend on it, but for the last digits of the loss.

    Attributes:
        chunk: images that are run together, 2 or more.
        channels_last: whether the network is run in that memory layout.
        bfloat16: whether it is run in that type; then nothing is decided anew, and decisions may differ.
        whole: units that are run as the plain loop does: place -> why.
    """

    chunk: int
    channels_last: bool = False
    bfloat16: bool = False
    whole: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BlockScores:
    """What a block says.

    Attributes:
        dense: of the dense network.
        points: of each (unit, level).
        flipped: images that the dense network answers otherwise in bfloat16.
    """

    dense: Tally
    points: Mapping[Place, Tally]
    flipped: int = 0


class BlockEngine:
    """Runs blocks of one sweep.

    Args:
        model: in evaluation mode for as long as the engine is used; comes back unchanged from each block.
        program: of the model; None: every unit is run as the plain loop does.
        units: what is swept.
        settings: how.
    """

    def __init__(
        self, model: nn.Module, program: Program | None, units: Sequence[Unit], settings: EngineSettings
    ) -> None:
        self.model, self.units, self.settings = model, units, settings
        self._cache = _VariantCache(units)
        self._distinct = [self._cache.distinct(model, place) for place in range(len(units))]
        self._lanes: list[Lane] = []
        self._whole = [place for place in range(len(units)) if program is None or place in settings.whole]
        if program is not None:
            cut = [place for place in range(len(units)) if place not in settings.whole]
            smooth = [place for place in cut if not units[place].inputs]
            # Quantized activations: a last bit more or less can be a whole step of the grid.
            stepped = [place for place in cut if units[place].inputs]
            dtype = torch.bfloat16 if settings.bfloat16 else None
            if smooth:
                self._lanes.append(Lane(model, program, units, smooth, settings.channels_last, dtype))
            if stepped:
                self._lanes.append(Lane(model, program, units, stepped, is_smooth=False))

    @torch.inference_mode()
    def run(self, images: Tensor, labels: Tensor, active: Collection[Place] | None = None) -> BlockScores:
        """Score a block.

        Args:
            images: (batch, ...), where the model is.
            labels: (batch,).
            active: the points that are wanted; default all.
        """
        dense_logits = self.model(images)
        dense = Tally.of(dense_logits, labels)
        is_right = right_answers(dense_logits, labels)
        wanted = {
            place: [
                own
                for own in self._distinct[place]
                if active is None or any((place, level) in active for level in own.levels)
            ]
            for place in range(len(self.units))
        }
        points: dict[Place, Tally] = {}
        for place, own, logits in self._logits(images, labels, wanted):
            tally = (
                dense.against(is_right, is_right) if own.is_dense else self._tally(logits, labels, is_right)
            )
            for level in own.levels:
                if active is None or (place, level) in active:
                    points[place, level] = tally
        return BlockScores(dense, points, self._flipped(images, dense_logits))

    def _flipped(self, images: Tensor, dense_logits: Tensor) -> int:
        if not self.settings.bfloat16 or not self._lanes:
            return 0
        logits = torch.cat([self._lanes[0].dense(chunk) for chunk in images.split(self.settings.chunk)])
        return int((logits.argmax(1) != dense_logits.argmax(1)).sum())

    def _tally(self, logits: Tensor | None, labels: Tensor, is_right: Tensor) -> Tally:
        assert logits is not None
        return Tally.of(logits, labels).against(is_right, right_answers(logits, labels))

    def _logits(
        self, images: Tensor, labels: Tensor, wanted: Mapping[int, Sequence[_Distinct]]
    ) -> Iterator[tuple[int, _Distinct, Tensor | None]]:
        for place, distinct in wanted.items():
            yield from ((place, own, None) for own in distinct if own.is_dense)
        todo = {place: [own for own in distinct if not own.is_dense] for place, distinct in wanted.items()}
        for lane in self._lanes:
            for place, own, logits in self._from_lane(lane, images, todo):
                is_open = not lane.is_coarse and bool(near_ties(logits, labels, TOLERANCE).any())
                yield place, own, self._plain(images, place, own) if is_open else logits
        for place in self._whole:
            yield from ((place, own, self._plain(images, place, own)) for own in todo[place])

    def _from_lane(
        self, lane: Lane, images: Tensor, todo: Mapping[int, Sequence[_Distinct]]
    ) -> Iterator[tuple[int, _Distinct, Tensor]]:
        parts: dict[int, list[list[Tensor]]] = {place: [] for place in lane.places if todo[place]}
        makers = {place: partial(self._variants, place, todo[place]) for place in parts}
        for chunk in images.split(self.settings.chunk) if parts else ():
            for place, logits in lane.run(chunk, makers):
                parts[place].append(logits)
        for place, by_chunk in parts.items():
            for own, logits in zip(todo[place], zip(*by_chunk, strict=True), strict=True):
                yield place, own, torch.cat(logits)

    def _variants(self, place: int, distinct: Sequence[_Distinct]) -> list[Variant]:
        return [self._cache.variant(place, own.levels[0]) for own in distinct]

    def _plain(self, images: Tensor, place: int, own: _Distinct) -> Tensor:
        with applied(self.model, self._cache.variant(place, own.levels[0])):
            return self.model(images)


@dataclass(frozen=True, slots=True)
class _Distinct:
    """Levels of a unit with the same variant.

    Attributes:
        levels: their places.
        is_dense: whether the variant is the dense network.
    """

    levels: tuple[int, ...]
    is_dense: bool


class _VariantCache:
    """The variants of units, kept as long as there is room."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._units = units
        self._kept: dict[Place, Variant] = {}
        self._bytes = 0

    def variant(self, place: int, level: int) -> Variant:
        """That of a unit at the place of a level."""
        if (place, level) in self._kept:
            return self._kept[place, level]
        unit = self._units[place]
        variant = unit.make(unit.levels[level])
        size = sum(value.numel() * value.element_size() for value in variant.tensors.values())
        if self._bytes + size <= _CACHED_BYTES:
            self._bytes += size
            self._kept[place, level] = variant
        return variant

    def distinct(self, model: nn.Module, place: int) -> list[_Distinct]:
        """Levels of a unit by what they make of the model."""
        unit = self._units[place]
        state = {**dict(named_parameters(model)), **dict(named_buffers(model))}
        by_print: dict[Any, list[int]] = {}
        dense = _fingerprint({name: state[name].detach() for name in unit.tensors})
        for level in range(len(unit.levels)):
            variant = self.variant(place, level)
            merged = {name: variant.tensors.get(name, state[name].detach()) for name in unit.tensors}
            key = (level,) if variant.inputs else _fingerprint(merged)
            by_print.setdefault(key, []).append(level)
        return [_Distinct(tuple(levels), key == dense) for key, levels in by_print.items()]


def _fingerprint(tensors: Mapping[str, Tensor]) -> bytes:
    digest = hashlib.blake2b()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}\n".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


class Lane:
    """Units that are run in one memory layout and type.

    Args:
        model: the model.
        program: of it.
        units: of the sweep.
        places: of the units that are run here.
        channels_last: the memory layout.
        dtype: of the network; default its own.
        is_smooth: whether results may be sums in another order: a last bit more or less changes little.
    """

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        units: Sequence[Unit],
        places: Sequence[int],
        channels_last: bool = False,
        dtype: torch.dtype | None = None,
        is_smooth: bool = True,
    ) -> None:
        self.places = tuple(places)
        self.is_coarse = dtype is not None
        self._program, self._is_smooth, self._dtype = program, is_smooth, dtype
        self._channels_last = channels_last
        state = {**dict(named_parameters(model)), **dict(named_buffers(model))}
        self._state = {name: self._laid_out(value.detach()) for name, value in state.items()}
        folds = folded_norms(program, self._state) if is_smooth else ()
        self._reruns = {
            place: Rerun(program, units[place].tensors, units[place].inputs, folds) for place in places
        }

    def run(
        self, images: Tensor, todo: Mapping[int, Callable[[], Sequence[Variant]]]
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """(unit, logits of each of its variants), for one chunk.

        Args:
            images: the chunk.
            todo: by unit, what makes its variants when it is its turn.
        """
        places = list(todo)
        readers = [self._reruns[place] for place in places]
        filled = self._filled_up(images)
        for at, value in clean_pass(self._program, self._state, filled, readers):
            if at >= 0:
                changes = [self._variant_laid_out(variant) for variant in todo[places[at]]()]
                at_once = partial(_at_once, len(filled))
                outputs = readers[at].outputs(value, changes, len(filled), at_once, in_parts=self._is_smooth)
                yield places[at], [_kept(logits[: len(images)]) for logits in outputs]

    def dense(self, images: Tensor) -> Tensor:
        """Logits of the dense network, for one chunk."""
        ((_, value),) = clean_pass(self._program, self._state, self._filled_up(images), ())
        return _kept(value(self._program.output)[: len(images)])

    def _filled_up(self, images: Tensor) -> Tensor:
        """Images, some of them twice where the program takes no fewer, laid out."""
        least = 2 if self._program.batch is None else self._program.batch
        if len(images) < least:
            images = images[torch.arange(least, device=images.device) % len(images)]
        return self._laid_out(images)

    def _variant_laid_out(self, variant: Variant) -> Variant:
        tensors = {name: self._laid_out(value) for name, value in variant.tensors.items()}
        return Variant(tensors, variant.inputs)

    def _laid_out(self, value: Tensor) -> Tensor:
        if self._dtype is not None and value.is_floating_point():
            value = value.to(self._dtype)
        return to_channels_last(value) if self._channels_last and value.dim() == 4 else value


def _kept(logits: Tensor) -> Tensor:
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
