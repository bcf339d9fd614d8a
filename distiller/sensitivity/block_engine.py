"""The scores of all points of a sweep on one block of images.

    for each chunk of the block:
        run the dense network once
        for each unit, as soon as what it reads is there:
            run what depends on it, for every level

Levels whose variants are equal are run once. A decision that is closer than what the order of summation can
change is made by the plain loop: the whole network, in its own memory layout, on the whole block. So is every
unit that the network cannot be cut at, and a block on which the dense network in parts says something else.
Knows nothing about data sets, files or processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distiller.evaluation_mode import answer
from distiller.names import named_buffers, named_parameters
from distiller.replay import Program, Variant, applied
from distiller.sensitivity.decisions import Decisions, Tally, relative_difference, right_answers
from distiller.sensitivity.lane import Lane, LanePart
from distiller.sensitivity.units import Unit

TOLERANCE = 2e-5
"""Of the largest logit: what sums in another order may change, with much to spare."""
_CACHED_BYTES = 2**28
"""Of the variants of one engine; those beyond are made anew for each block."""
_BYTES_TOGETHER = 2**27
"""Of the variants of a unit that are there at once, if they are not kept; one at least."""
_LATE_BYTES = 2**26
"""Of what late units read, for a whole block."""

Place = tuple[int, int]
"""(unit, level): places in `units` and in the levels of the unit."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How blocks are run; results do not depend on it, but for the last digits of the loss.

    Attributes:
        chunk: images that are run together, 2 or more; what is run bit for bit takes the whole block.
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


def must_be_bitwise(program: Program, unit: Unit) -> bool:
    """Whether a last bit more or less can be another decision altogether: somewhere something is rounded."""
    return bool(program.discontinuous or unit.inputs)


def allowed_difference(lane: Lane) -> float:
    """By how much logits may differ from the whole network's, relative to the largest, to be trusted."""
    return 0.0 if lane.is_bitwise else TOLERANCE / 4


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
            bitwise = [place for place in cut if must_be_bitwise(program, units[place])]
            others = [place for place in cut if place not in bitwise]
            dtype = torch.bfloat16 if settings.bfloat16 else None
            if others:
                self._lanes.append(Lane(model, program, units, others, settings.channels_last, dtype))
            if bitwise:
                self._lanes.append(Lane(model, program, units, bitwise, is_bitwise=True))

    @torch.inference_mode()
    def run(self, images: Tensor, labels: Tensor, active: Collection[Place] | None = None) -> BlockScores:
        """Score a block.

        Args:
            images: (batch, ...), where the model is.
            labels: (batch,).
            active: the points that are wanted; default all.
        """
        dense_logits = answer(self.model, images)
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
        for place, own, found in self._decisions(images, labels, dense_logits, wanted):
            tally = dense if found is None else found.tally.against(is_right, found.is_right)
            for level in own.levels:
                if active is None or (place, level) in active:
                    points[place, level] = tally
        return BlockScores(dense, points, self._flipped(images, dense_logits))

    def _flipped(self, images: Tensor, dense_logits: Tensor) -> int:
        if not self.settings.bfloat16 or not self._lanes:
            return 0
        logits = torch.cat([self._lanes[0].dense(chunk) for chunk in images.split(self.settings.chunk)])
        return int((logits.argmax(1) != dense_logits.argmax(1)).sum())

    def _decisions(
        self,
        images: Tensor,
        labels: Tensor,
        dense_logits: Tensor,
        wanted: Mapping[int, Sequence[_Distinct]],
    ) -> Iterator[tuple[int, _Distinct, Decisions | None]]:
        """Of each unit and variant; None: those of the dense network."""
        for place, distinct in wanted.items():
            yield from ((place, own, None) for own in distinct if own.is_dense)
        todo = {place: [own for own in distinct if not own.is_dense] for place, distinct in wanted.items()}
        for lane in self._lanes:
            for place, own, found in self._from_lane(lane, images, labels, dense_logits, todo):
                is_final = lane.is_coarse or lane.is_bitwise
                is_open = found is None or (not is_final and found.could_be_others(TOLERANCE))
                yield place, own, self._plain(images, labels, place, own) if is_open else found
        for place in self._whole:
            yield from ((place, own, self._plain(images, labels, place, own)) for own in todo[place])

    def _from_lane(
        self,
        lane: Lane,
        images: Tensor,
        labels: Tensor,
        dense_logits: Tensor,
        todo: Mapping[int, Sequence[_Distinct]],
    ) -> Iterator[tuple[int, _Distinct, Decisions | None]]:
        """None: on these images the lane does not answer as the network does."""
        if not lane.takes(images):
            yield from ((place, own, None) for place in lane.places for own in todo[place])
            return
        found: dict[int, list[list[Decisions]]] = {place: [] for place in lane.places if todo[place]}
        size = len(images) if lane.is_bitwise else self.settings.chunk
        late: dict[int, list[LanePart]] = {}
        if len(images) > size:
            late = {place: [] for place in self._late(lane, images, todo)}
        clean: list[Tensor] = []
        chunks, of_chunks = (whole.split(size) for whole in (images, labels))
        for chunk, own_labels in zip(chunks, of_chunks, strict=True) if found else ():
            for place, part in lane.run(chunk, list(found), clean.append):
                if place in late:
                    late[place].append(part.kept())
                else:
                    found[place] += self._of_parts([part], place, todo[place], [own_labels])
        for place in list(late):
            found[place] = self._of_parts(late.pop(place), place, todo[place], of_chunks)
        is_true = lane.is_coarse or not found
        is_true = is_true or relative_difference(torch.cat(clean), dense_logits) <= allowed_difference(lane)
        for place, by_chunk in found.items():
            for own, parts in zip(todo[place], zip(*by_chunk, strict=True), strict=True):
                yield place, own, Decisions.together(parts) if is_true else None

    def _of_parts(
        self, parts: Sequence[LanePart], place: int, distinct: Sequence[_Distinct], labels: Sequence[Tensor]
    ) -> list[list[Decisions]]:
        """Of each variant, part by part."""
        found: list[list[Decisions]] = [[] for _ in parts]
        for variants in self._cache.groups(place, [own.levels[0] for own in distinct]):
            for decisions, part, of_part in zip(found, parts, labels, strict=True):
                decisions += [Decisions.of(logits, of_part) for logits in part.logits(variants)]
            variants.clear()  # before the next ones are made
        return found

    def _late(self, lane: Lane, images: Tensor, todo: Mapping[int, Sequence[_Distinct]]) -> set[int]:
        """Units whose variants are made anew, and that read little: they are run when the whole block is
        through, so that each variant is made but once for it."""
        room, late = _LATE_BYTES, set()
        for place in lane.places:
            size = lane.bytes_read(place, images)
            is_kept = all(self._cache.keeps(place, own.levels[0]) for own in todo[place])
            if not is_kept and size <= room:
                room -= size
                late.add(place)
        return late

    def _plain(self, images: Tensor, labels: Tensor, place: int, own: _Distinct) -> Decisions:
        with applied(self.model, self._cache.variant(place, own.levels[0])):
            return Decisions.of(answer(self.model, images), labels)


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
        self._sizes: dict[Place, int] = {}
        self._bytes = 0

    def variant(self, place: int, level: int) -> Variant:
        """That of a unit at the place of a level."""
        if (place, level) in self._kept:
            return self._kept[place, level]
        unit = self._units[place]
        variant = unit.make(unit.levels[level])
        size = sum(value.numel() * value.element_size() for value in variant.tensors.values())
        self._sizes[place, level] = size
        if self._bytes + size <= _CACHED_BYTES:
            self._bytes += size
            self._kept[place, level] = variant
        return variant

    def keeps(self, place: int, level: int) -> bool:
        """Whether that variant needs not be made anew."""
        return (place, level) in self._kept

    def groups(self, place: int, levels: Sequence[int]) -> Iterator[list[Variant]]:
        """Those of a unit in their order, no more at once than there is room for."""
        anew = [self._sizes[place, level] for level in levels if not self.keeps(place, level)]
        most = max(1, _BYTES_TOGETHER // max(anew)) if any(anew) else len(levels)
        for begin in range(0, len(levels), most):
            yield [self.variant(place, level) for level in levels[begin : begin + most]]

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
