"""Which tensors of a quantized model must still be put on a grid, so that runtimes compute it in integers.

An operation runs in integers if all tensors that it reads, and (but for linear layers) the one that it
makes, are on grids. Training with quantization leaves tensors without: what a convolution hands to a sum,
what goes to a shortcut, the model's input.
Knows nothing about ranges and data.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from distiller.export.integer_view import IntegerView, is_tensor_quantizer
from distiller.graph import Op, SummaryGraph
from distiller.names import named_modules
from distiller.quantization.training.attachments import INPUT_QUANTIZER, OUTPUT_QUANTIZER

_LAYERS = frozenset(("Conv", "Gemm", "MatMul"))
_FREE_OUTPUT = frozenset(("Gemm", "MatMul"))  # run in integers also if what they make is on no grid
_JOINS = frozenset(("Add", "AveragePool", "Concat", "Mul", "ReduceMean"))
_MOVES = frozenset(
    (
        "Expand",
        "Flatten",
        "Gather",
        "MaxPool",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    )
)
_CLIPS = frozenset(("Clip", "Relu"))


@dataclass(frozen=True, slots=True)
class MissingGrid:
    """A tensor that needs a grid.

    Attributes:
        module: canonical name of the module whose output it is, or whose first argument.
        is_output: which of the two.
        readers: canonical names of the layers that round it again as they read it, to grids of their own.
    """

    module: str
    is_output: bool
    readers: tuple[str, ...]


def missing_grids(view: IntegerView, dummy_input: Any) -> list[MissingGrid]:
    """The tensors without a grid that a layer with integer weights reads, or a sum, product, concatenation or
    average pooling that has an operand from where there are integers and a result that goes there.

    A tensor behind ReLUs, and operations that only move values, is the same tensor; its place is behind the
    ReLU nearest to where it is made. Results of functional operations have no place, only readers have.

    Args:
        view: of a trained model; stays as it is.
        dummy_input: an input of the model, or a tuple of them.

    Returns:
        In the order of execution.

    Raises:
        GraphTraceError: the model cannot be traced.
    """
    flow = _Flow(view, dummy_input)
    flow.leave_out_what_stays_in_float()
    places: dict[tuple[str, bool], list[str]] = {}
    for reader in flow.in_integers:
        op = flow.graph.ops[reader]
        if flow.is_read_on_grid(op):
            continue
        if any(operand.is_input for operand in op.operands) and flow.is_layer(op):
            places.setdefault((op.module_name, False), [])
        for name in op.predecessors:
            chain = flow.chain(name)
            if flow.is_on_grid(chain):
                continue
            place = flow.place(chain)
            if place is not None:
                places.setdefault((place.module_name, True), [])
            elif flow.is_layer(op):
                places.setdefault((op.module_name, False), [])
    return [
        MissingGrid(module, is_output, flow.rounding_readers(module) if is_output else ())
        for module, is_output in flow.without_repeats(places)
    ]


class _Flow:
    """The operations of a model without its quantizers, and where these are."""

    def __init__(self, view: IntegerView, dummy_input: Any) -> None:
        skeleton, self._layers = _without_quantizers(view)
        self.graph = SummaryGraph(skeleton, dummy_input, purpose="grids of an integer model")
        modules = dict(named_modules(view.model))
        self._has_input_grid = {name for name, module in modules.items() if hasattr(module, INPUT_QUANTIZER)}
        self._makes_grid = {
            name
            for name, module in modules.items()
            if hasattr(module, OUTPUT_QUANTIZER) or is_tensor_quantizer(module)
        }
        self._calls = Counter(op.module_name for op in self.graph.ops.values() if not op.is_functional)
        self.in_integers = dict.fromkeys(
            op.name for op in self.graph.ops.values() if self.is_layer(op) or op.type in _JOINS
        )

    def is_layer(self, op: Op) -> bool:
        """Whether it has a weight of integers, and runtimes an operation for it."""
        return op.type in _LAYERS and op.module_name in self._layers and not op.is_functional

    def makes_grid(self, op: Op) -> bool:
        """Whether its result is put on a grid."""
        return not op.is_functional and op.module_name in self._makes_grid

    def is_read_on_grid(self, op: Op) -> bool:
        """Whether it rounds what it reads, or the model rounds its input for it."""
        is_rounding = not op.is_functional and op.module_name in self._has_input_grid
        return is_rounding or self._is_of_rounded_input(op)

    def is_on_grid(self, chain: list[Op]) -> bool:
        """Whether the tensor that the chain hands on is."""
        is_moved = chain[-1].type in _MOVES | _CLIPS
        return any(map(self.makes_grid, chain)) or (is_moved and self._is_of_rounded_input(chain[-1]))

    def chain(self, name: str) -> list[Op]:
        """The operation, and those before it up to one that computes something or makes a grid."""
        ops = [self.graph.ops[name]]
        while ops[-1].type in _MOVES | _CLIPS and not self.makes_grid(ops[-1]) and ops[-1].predecessors:
            ops.append(self.graph.ops[ops[-1].predecessors[0]])
        return ops

    def place(self, chain: list[Op]) -> Op | None:
        """The operation of a chain behind which a grid belongs; None if there is no module for it."""
        moves = [op.type in _MOVES for op in chain]
        first = moves.index(False) if False in moves else len(chain) - 1
        candidates = [op for op in chain[first:] if not op.is_functional and op.type not in _MOVES]
        once = [op for op in candidates if self._calls[op.module_name] == 1]
        return next(iter(once or candidates), None)

    def leave_out_what_stays_in_float(self) -> None:
        """Keep, of what could run in integers, what is read from and handed to where there are integers."""
        before = -1
        while before != len(self.in_integers):
            before = len(self.in_integers)
            for name in list(self.in_integers):
                op = self.graph.ops[name]
                if not self._can_read(op) or not (op.type in _FREE_OUTPUT or self._is_read(op)):
                    del self.in_integers[name]

    def rounding_readers(self, module: str) -> tuple[str, ...]:
        """The layers that read the results of a module, also through others, and round them."""
        found: dict[str, None] = {}
        for op in self.graph.ops.values():
            if not op.is_functional and op.module_name == module:
                found.update(dict.fromkeys(self._readers(op, self._has_input_grid)))
        return tuple(found)

    def without_repeats(self, places: dict[tuple[str, bool], list[str]]) -> Iterator[tuple[str, bool]]:
        """The places in the order of execution, without ReLUs whose operand gets a grid."""
        for op in self.graph.ops.values():
            for is_output in (False, True):
                key = (op.module_name, is_output)
                if op.is_functional or key not in places:
                    continue
                behind = self.chain(op.name)[1:] if op.type in _CLIPS else []
                if not any((link.module_name, True) in places for link in behind if not link.is_functional):
                    yield key
                del places[key]

    def _can_read(self, op: Op) -> bool:
        if self.is_layer(op):
            return True
        ends = [self.chain(name) for name in op.predecessors]
        reads_real_input = any(operand.is_input for operand in op.operands) and "" not in self._has_input_grid
        if reads_real_input or not all(self.is_on_grid(chain) or self.place(chain) for chain in ends):
            return False
        return any(self.is_on_grid(chain) or chain[-1].name in self.in_integers for chain in ends)

    def _is_of_rounded_input(self, op: Op) -> bool:
        return "" in self._has_input_grid and not op.predecessors

    def _is_read(self, op: Op) -> bool:
        """Whether something rounds its result, or reads it to go on in integers."""
        return self.makes_grid(op) or next(self._readers(op, self._has_input_grid, True), None) is not None

    def _readers(self, op: Op, rounding: set[str], also_integer: bool = False) -> Iterator[str]:
        for name in op.successors:
            reader = self.graph.ops[name]
            is_rounding = not reader.is_functional and reader.module_name in rounding
            if is_rounding or (also_integer and (name in self.in_integers or self.makes_grid(reader))):
                yield reader.module_name
            elif reader.type in _MOVES | _CLIPS and not self.makes_grid(reader):
                yield from self._readers(reader, rounding, also_integer)


def _without_quantizers(view: IntegerView) -> tuple[nn.Module, set[str]]:
    """A copy of the view's model whose layers are leaves, and the names of those with integers."""
    names = {name for name, module in named_modules(view.model) if module in view.layers}
    skeleton = copy.deepcopy(view.model)
    for module in skeleton.modules():
        for key, hooks in (
            (INPUT_QUANTIZER, module._forward_pre_hooks),
            (OUTPUT_QUANTIZER, module._forward_hooks),
        ):
            if hasattr(module, key):
                delattr(module, key)
                hooks.clear()
    return skeleton, names
