"""Where in a network an early exit can be: where all that goes on goes through one tensor.

Images that leave are taken out of the batch there, so that nothing behind may read what was before. In a
residual network that is behind a block, not within one.
Knows nothing about branches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from distiller.errors import UsageError
from distiller.graph import SummaryGraph, model_graph
from distiller.names import named_modules, unwrap


@dataclass(frozen=True, slots=True)
class Places:
    """The modules of a network, by whether an exit can be behind them.

    Attributes:
        position: by name of a module, where in the order of execution its result is there; of all modules
            that do something.
        good: those of them behind which an exit can be.
        shown: of those of `good` with one result the outermost, in the order of execution.
    """

    position: Mapping[str, int]
    good: frozenset[str]
    shown: tuple[str, ...]

    def check(self, name: str) -> None:
        """See to it that an exit can be behind a module.

        Raises:
            UsageError: it cannot; names the nearest modules behind which it can.
        """
        if name in self.good:
            return
        if name not in self.position:
            raise UsageError(
                f"early exit: '{name}' only passes its input on, or does not run; {self._remedy(name)}"
            )
        raise UsageError(
            f"early exit: '{name}' is no place for one, the network has another way past it, or ends there; "
            f"{self._remedy(name)}"
        )

    def _remedy(self, name: str) -> str:
        at = self.position.get(name, math.inf)
        before = [other for other in self.shown if self.position[other] < at][-1:]
        behind = [other for other in self.shown if self.position[other] > at][:1]
        near = " or ".join(f"'{other}'" for other in (*before, *behind))
        return f"name {near}" if near else "this network has no place for one"


def exit_places(model: nn.Module) -> Places:
    """The places of a model that says what its input is like: `input_shape`, as (1, 3, 32, 32).

    Raises:
        DistillerError: there is no `input_shape`.
        GraphTraceError: `torch.export` cannot trace the model.
    """
    bare = unwrap(model)
    graph = model_graph(bare, "early exit")
    cuts = _cuts(graph)
    results = _results(graph, [name for name, _ in named_modules(bare) if name])
    good = [name for name, position in results.items() if position in cuts]
    shown: dict[int, str] = {}
    for name in sorted(good, key=lambda name: (results[name], name.count("."), name)):
        shown.setdefault(results[name], name)
    return Places(results, frozenset(good), tuple(shown.values()))


def _cuts(graph: SummaryGraph) -> set[int]:
    """The operations, by position, whose result is all that anything behind reads; the last one left out."""
    ops = list(graph.ops.values())
    at = {op.name: index for index, op in enumerate(ops)}
    last_read = [
        len(ops) if op.is_output else max((at[name] for name in op.successors), default=index)
        for index, op in enumerate(ops)
    ]
    inputs_read = max((at[name] for source in graph.inputs.values() for name in source.readers), default=-1)
    found: set[int] = set()
    latest = inputs_read  # until when something else than the result at hand is read
    for index, op in enumerate(ops):
        if latest <= index and last_read[index] > index and not op.is_output:
            found.add(index)
        latest = max(latest, last_read[index])
    return found


def _results(graph: SummaryGraph, modules: Sequence[str]) -> dict[str, int]:
    """By module that is called once, the position of the one operation in it whose result leaves it."""
    ops = list(graph.ops.values())
    found: dict[str, int] = {}
    for module in modules:
        inside = {
            op.name for op in ops if op.module_name == module or op.module_name.startswith(f"{module}.")
        }
        leaving = [
            index
            for index, op in enumerate(ops)
            if op.name in inside and (op.is_output or not inside.issuperset(op.successors))
        ]
        if len(leaving) == 1:
            found[module] = leaving[0]
    return found
