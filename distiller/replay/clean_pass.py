"""A forward pass step by step that keeps no result longer than it is needed.

Knows nothing about who looks at the results.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from distiller.replay.program import Program


class Reader(Protocol):
    """Who waits for results of a pass."""

    @property
    def needs(self) -> Collection[int]:
        """The results."""
        ...

    @property
    def ready_at(self) -> int:
        """The last of them."""
        ...


def clean_pass(
    program: Program, state: Mapping[str, Tensor], images: Tensor, readers: Sequence[Reader]
) -> Iterator[tuple[int, Callable[[int], Any]]]:
    """Run a program; hand out each reader as soon as its results are there.

    Args:
        program: of the model.
        state: parameters and buffers by canonical name.
        images: (batch, ...).
        readers: in any order.

    Yields:
        (place of the reader in `readers`, index -> result, valid until the next one is asked for); and in
        the end (-1, likewise) with the result of the program.
    """
    results: dict[int, Any] = {program.images: images}
    fixed = {**program.constants, **{index: state[name] for index, name in program.state.items()}}
    until = _needed_until(program, readers)
    gone: dict[int, list[int]] = {}
    for index, last in until.items():
        gone.setdefault(last, []).append(index)
    waiting = sorted(range(len(readers)), key=lambda place: readers[place].ready_at)

    def value(index: int) -> Any:
        if index in results:
            return results[index]
        return program.sizes[index](len(images)) if index in program.sizes else fixed[index]

    def ready(index: float) -> Iterator[tuple[int, Callable[[int], Any]]]:
        while waiting and readers[waiting[0]].ready_at <= index:
            yield waiting.pop(0), value

    yield from ready(program.images)
    for step in program.steps:
        results[step.index] = step.run(value)
        yield from ready(step.index)
        for index in gone.get(step.index, ()):
            results.pop(index, None)
    yield -1, value


def _needed_until(program: Program, readers: Sequence[Reader]) -> dict[int, int]:
    """The last step at which each result is needed; the result of the program stays."""
    until = {step.index: step.index for step in program.steps}
    for step in program.steps:
        for read in step.reads:
            until[read] = step.index
    ends = sorted(step.index for step in program.steps)
    for reader in readers:
        at = next((end for end in ends if end >= reader.ready_at), ends[-1])
        for read in reader.needs:
            until[read] = max(until.get(read, at), at)
    until.pop(program.output, None)
    return until
