"""Running only what depends on a few tensors of a model, for several values of them.

What does not depend on them is taken from a clean pass; what does is run anew, for several values at
once where every result in between has an image in each row.
Knows nothing about what the values are for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from distiller.errors import GraphTraceError
from distiller.replay.folding import NORM, Fold
from distiller.replay.layer_outputs import LAYERS, LayerCall, layer_outputs
from distiller.replay.program import Program, Step, Value, unbatched
from distiller.replay.variant import Variant

_OWN_MEMORY = ("conv1d", "conv2d", "conv3d", "linear", "add", "relu", "cat", "getitem")
"""Operations whose result nobody else holds: what reads it last may write over it. (`getitem`: of a norm.)"""


AtOnce = Callable[[Step], int]
"""A layer -> for how many changes it is run together."""


def one_at_once(layer: Step) -> int:
    """Each change by itself."""
    return 1


@dataclass(frozen=True, slots=True)
class _Group:
    """Some changes that are run together.

    Attributes:
        copies: how many.
        results: those that are still read, one change after the other, by index.
    """

    copies: int
    results: dict[int, Any]


class Rerun:
    """The part of a program that depends on some parameters, buffers or inputs of layers.

    Attributes:
        steps: those that depend on them, in the order of execution.
        needs: results of a clean pass that these read.
        ready_at: the last of those: from there on it can be run.
    """

    def __init__(
        self,
        program: Program,
        tensors: Collection[str],
        inputs: Collection[str] = (),
        folds: Sequence[Fold] = (),
    ) -> None:
        """Find what depends on what.

        Args:
            program: of the model.
            tensors: canonical names of parameters and buffers.
            inputs: canonical names of convolutions and linear layers.
            folds: norms that are run as a part of the convolution before, where they are not changed.

        Raises:
            GraphTraceError: a module of `inputs` is not one such layer that is run once.
        """
        self._program = program
        self._changed = {index: name for name in tensors for index in program.indices_of(name)}
        self._spots = {self._spot(name).index: name for name in inputs}
        dirty: set[int] = set(self._changed)
        steps: list[Step] = []
        for step in program.steps:
            if step.index in self._spots or not dirty.isdisjoint(step.reads):
                dirty.add(step.index)
                steps.append(step)
        self._own_fold = self._fold_of_change(steps, folds)
        self.steps = tuple(self._with_folds(steps, folds))
        known = {*program.state, *program.constants, *program.sizes}
        self.needs = frozenset(read for step in self.steps for read in step.reads) - dirty - known
        if not self.steps:
            self.needs = frozenset([program.output])
        if self._layer is not None:
            self.needs |= {self._layer.index}
        self.ready_at = max(self.needs, default=-1)

    def _fold_of_change(self, steps: Sequence[Step], folds: Sequence[Fold]) -> Fold | None:
        """That of the one convolution whose weight alone is changed, if that is so."""
        if len(self._changed) != 1 or self._spots:
            return None
        (index,) = self._changed
        readers = [step for step in steps if index in step.reads]
        own = [fold for fold in folds if fold.weight == index and index in fold.sources]
        return own[0] if len(readers) == len(own) == 1 and readers[0].index in own[0].steps else None

    def _with_folds(self, steps: Sequence[Step], folds: Sequence[Fold]) -> Iterator[Step]:
        """The steps with those folds of which all depends on what is changed: by their inputs alone, or by
        the weight of their convolution."""
        indices = {step.index for step in steps}
        used = [
            fold
            for fold in folds
            if fold.steps <= indices
            and fold.sources.isdisjoint(self._changed)
            and fold.steps.isdisjoint(self._spots)
        ]
        instead = {fold.step.index: fold.step for fold in used}
        if self._own_fold is not None:
            used.append(self._own_fold)
            instead[self._own_fold.step.index] = self._own_fold.with_open_weight()
        gone = {index for fold in used for index in fold.steps} - set(instead)
        yield from (instead.get(step.index, step) for step in steps if step.index not in gone)

    @cached_property
    def _layer(self) -> Step | None:
        """The one layer whose weight alone is changed, if that is so."""
        if len(self._changed) != 1 or self._spots:
            return None
        (index,) = self._changed
        readers = [step for step in self.steps if index in step.reads]
        if len(readers) != 1 or readers[0].kind not in LAYERS:
            return None
        args = readers[0].args
        values = [arg.index for arg in args[:3] if isinstance(arg, Value)]
        return readers[0] if args[1] == Value(index) and values.count(index) == 1 else None

    @cached_property
    def takes_several(self) -> bool:
        """Whether several changes can be run as more images: behind the first step each row is an image."""
        if self._program.batch is not None or not self.steps or len(self._entries) != 1:
            return False
        if self._is_tuple(self.steps[0].index):
            return False
        rest = self.steps[1:]
        shapes = {step.index: step.shape for step in self._program.steps}
        shapes[self._program.images] = (-1,)
        reads = [read for step in rest for read in step.reads if read in shapes and not self._is_tuple(read)]
        own = [step.index for step in self.steps if not self._is_tuple(step.index)]
        if not self._program.without_images().isdisjoint(reads):
            return False  # the numbers of the rows, say, which are not those of the first images once more
        return not any(unbatched(shapes[index]) for index in (*reads, *own))

    def outputs(
        self,
        value: Callable[[int], Any],
        changes: Sequence[Variant],
        images: int,
        at_once: AtOnce = one_at_once,
        *,
        in_parts: bool = False,
    ) -> Iterator[Tensor]:
        """The model's output for each change, in their order.

        Args:
            value: results of the clean pass, state and constants by index.
            changes: of what this is about.
            images: how many the clean pass was about.
            at_once: for how many changes at least a layer is run together, where that can be; what follows it
                is then too.
            in_parts: whether a layer's output may be a sum of parts, in another order than the layer's own.
        """
        if not self.steps:
            yield from (value(self._program.output) for _ in changes)
        elif self._layer is not None:
            yield from self._from_layer(value, changes, images, at_once, in_parts)
        elif self.takes_several:
            entry = self.steps[0]
            firsts = (self._run_entry(entry, value, change, images) for change in changes)
            yield from self._behind(firsts, value, images, at_once)
        else:
            for change in changes:
                yield self._run(self.steps, self._replaced(change), change, value, images, 1)

    def _from_layer(
        self,
        value: Callable[[int], Any],
        changes: Sequence[Variant],
        images: int,
        at_once: AtOnce,
        in_parts: bool,
    ) -> Iterator[Tensor]:
        assert self._layer is not None
        ((index, name),) = self._changed.items()
        weights = [change.tensors[name] for change in changes]
        dense = value(index)
        if self._own_fold is not None:
            weights, dense = (
                [self._own_fold.scaled(weight) for weight in weights],
                self._own_fold.scaled(dense),
            )
        call = LayerCall(self._layer, value, dense, value(self._layer.index))
        firsts = layer_outputs(call, weights, in_parts=in_parts)
        yield from self._behind(firsts, value, images, at_once if self.takes_several else one_at_once)

    def _run_entry(self, entry: Step, value: Callable[[int], Any], change: Variant, images: int) -> Tensor:
        return self._run((entry,), self._replaced(change), change, value, images, 1)

    def _behind(
        self, firsts: Iterator[Tensor], value: Callable[[int], Any], images: int, at_once: AtOnce
    ) -> Iterator[Tensor]:
        """Run what is behind the first step for each of its results: more of them together, the fewer rows a
        layer has for one."""
        groups: Iterator[_Group] = (_Group(1, {self.steps[0].index: first}) for first in firsts)
        for count, steps in _stages(self.steps[1:], at_once):
            groups = self._stage(groups, count, steps, value, images)
        for group in groups:
            output = group.results[self._program.output]
            yield from output.split(images) if group.copies > 1 else (output,)

    def _stage(
        self,
        groups: Iterator[_Group],
        count: int,
        steps: Sequence[Step],
        value: Callable[[int], Any],
        images: int,
    ) -> Iterator[_Group]:
        waiting: list[_Group] = []
        for group in itertools.chain(groups, (None,)):
            if group is not None:
                waiting.append(group)
            copies = sum(one.copies for one in waiting)
            if waiting and (group is None or copies >= count):
                results = _joined([one.results for one in waiting])
                waiting = []
                self._run(steps, results, Variant({}, {}), value, images, copies)
                yield _Group(copies, results)

    def _replaced(self, change: Variant) -> dict[int, Any]:
        return {index: change.tensors[name] for index, name in self._changed.items()}

    def _run(
        self,
        steps: Sequence[Step],
        results: dict[int, Any],
        change: Variant,
        value: Callable[[int], Any],
        images: int,
        copies: int,
    ) -> Any:
        """Run steps; `results` are those that replace what a clean pass gave."""
        repeated: dict[int, Any] = {}
        sizes, batched = self._program.sizes, self._program_results

        def read(index: int) -> Any:
            if index in results:
                return results[index]
            if index in sizes:
                return sizes[index](images * copies)
            if copies == 1 or index not in batched:
                return value(index)
            if index not in repeated:
                repeated[index] = torch.cat([value(index)] * copies)
            return repeated[index]

        last = self._last_reads
        result: Any = None
        for step in steps:
            result = self._run_step(step, read, results, change)
            for index in last.get(step.index, ()):
                results.pop(index, None)
                repeated.pop(index, None)
            results[step.index] = result
        return result

    def _run_step(
        self, step: Step, read: Callable[[int], Any], results: Mapping[int, Any], change: Variant
    ) -> Any:
        if step.index in self._spots:
            spot, transform = step.args[0].index, change.inputs[self._spots[step.index]]
            return step.run(lambda index: transform(read(index)) if index == spot else read(index))
        over = self._overwritten.get(step.index)
        if over is not None and over in results:
            if step.kind == "relu":
                return results[over].relu_()
            other = next(arg.index for arg in step.args if arg.index != over)
            return results[over].add_(read(other))
        return step.run(read)

    @cached_property
    def _program_results(self) -> frozenset[int]:
        return frozenset((*(step.index for step in self._program.steps), self._program.images))

    @cached_property
    def _last_reads(self) -> dict[int, list[int]]:
        """Step -> results of this rerun, or copies for it, that no later step reads."""
        last: dict[int, int] = {}
        for step in self.steps:
            for read in step.reads:
                last[read] = step.index
        found: dict[int, list[int]] = {}
        for read, step in last.items():
            if read != self._program.output and read not in self._changed:
                found.setdefault(step, []).append(read)
        return found

    @cached_property
    def _overwritten(self) -> dict[int, int]:
        """Step -> the result of its own rerun that it can write over: nobody reads it afterwards."""
        own = {step.index: step for step in self.steps}
        found = {}
        for step in self.steps:
            if step.index in self._spots:
                continue
            if step.kind == "relu":
                candidates = step.args[:1]
            elif self._is_sum_of_two(step):
                candidates = step.args  # the sum is the same to the bit either way
            else:
                continue
            for arg in candidates:
                result = own.get(arg.index) if isinstance(arg, Value) else None
                if (
                    result is not None
                    and result.index in self._last_reads.get(step.index, ())
                    and self._owns_memory(result, own)
                    and all(
                        reader is step or reader.kind in (*_OWN_MEMORY, NORM)  # no view of it is read later
                        for reader in self._program.readers(result.index)
                    )
                ):
                    found[step.index] = result.index
                    break
        return found

    def _is_sum_of_two(self, step: Step) -> bool:
        """Whether it is a sum of two results of its own shape."""
        if step.kind != "add" or len(step.args) != 2 or step.kwargs:
            return False
        first, second = step.args
        return (
            isinstance(first, Value)
            and isinstance(second, Value)
            and first != second
            and self._shape(first.index) == self._shape(second.index) == step.shape
        )

    def _owns_memory(self, step: Step, own: Mapping[int, Step]) -> bool:
        if step.kind == "getitem":
            norm = own.get(step.reads[0])
            return norm is not None and norm.kind == NORM and step.args[1] == 0
        return step.kind in _OWN_MEMORY

    def _shape(self, index: int) -> tuple[int, ...] | None:
        return next((step.shape for step in self._program.steps if step.index == index), None)

    def _is_tuple(self, index: int) -> bool:
        """Whether a result is several tensors, which other steps take apart."""
        readers = self._program.readers(index)
        return bool(readers) and all(step.kind == "getitem" for step in readers)

    @cached_property
    def _entries(self) -> list[Step]:
        changed = set(self._changed)
        return [s for s in self.steps if s.index in self._spots or not changed.isdisjoint(s.reads)]

    def _spot(self, name: str) -> Step:
        found = [step for step in self._program.steps if step.module == name and step.kind in LAYERS]
        if len(found) != 1 or not isinstance(found[0].args[0], Value):
            raise GraphTraceError(
                f"'{name}' is {len(found)} convolutions or linear layers, one that is run once expected"
            )
        return found[0]


def _stages(steps: Sequence[Step], at_once: AtOnce) -> Iterator[tuple[int, Sequence[Step]]]:
    """(how many changes together, steps), ever more together."""
    count, begin = 1, 0
    for place, step in enumerate(steps):
        wanted = at_once(step) if step.kind in LAYERS else 1
        if wanted > count:
            if place > begin:
                yield count, steps[begin:place]
            count, begin = wanted, place
    if begin < len(steps):
        yield count, steps[begin:]


def _joined(groups: Sequence[dict[int, Any]]) -> dict[int, Any]:
    """Results of several groups as those of one."""
    if len(groups) == 1:
        return groups[0]
    return {index: _cat([results[index] for results in groups]) for index in groups[0]}


def _cat(values: Sequence[Any]) -> Any:
    if isinstance(values[0], tuple):  # a norm has several results
        return tuple(_cat(parts) for parts in zip(*values, strict=True))
    return torch.cat(list(values))
