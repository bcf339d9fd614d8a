"""The graph of a model: which operation feeds which, also where the operation is no module.

Every call of a leaf module is one operation, and so is every functional operation between
them; dropout, identities and whatever else passes its value on, and what is computed from
parameters alone, are looked through.
Knows nothing about what the graph is used for.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from distiller.dummy_input import resolve_input_shape, shaped
from distiller.errors import DistillerError, UnknownNameError, UsageError, did_you_mean, require
from distiller.graph_ops import FIGURES, Op, SourceTensor, is_leaf, leaf_modules, operations
from distiller.graph_trace import is_operation_type, trace
from distiller.names import named_parameters, owner, strip_wrappers, unwrap

__all__ = [
    "AdjacencyMap",
    "AdjacentsEntry",
    "Op",
    "OpSimpleMetadata",
    "SourceTensor",
    "SummaryGraph",
    "batch_norm_behind",
    "is_leaf",
    "leaf_modules",
    "model_graph",
]

_REMEDY = (
    "use an input the model accepts and control flow that does not depend on the values of tensors, "
    "or do without what needs the graph"
)


class OpSimpleMetadata(NamedTuple):
    """Name and kind of an operation; the kind is a word of ONNX: Conv, Relu, Gemm, Add, ..."""

    name: str
    type: str


@dataclass(slots=True)
class AdjacentsEntry:
    """An operation and its neighbours.

    Attributes:
        op_meta: the operation.
        predecessors: the operations whose results it reads, each once, in the order of its arguments.
        successors: the operations that read its results, each once, in the order of execution.
        module_name: the leaf module that it is a call of, None when functional or not known.
        output_shape: shape of its (first) result, None when not known.
        is_output: whether the model returns its result.
    """

    op_meta: OpSimpleMetadata
    predecessors: list[OpSimpleMetadata] = field(default_factory=list)
    successors: list[OpSimpleMetadata] = field(default_factory=list)
    module_name: str | None = None
    output_shape: tuple[int, ...] | None = None
    is_output: bool = False


AdjacencyMap = OrderedDict[str, AdjacentsEntry]


class SummaryGraph:
    """The operations of a model in the order of execution.

    The model is traced as in evaluation, in place: its modes and its state stay as they were.

    Attributes:
        ops: the operations by name, in the order of execution (a topological order).
        inputs: the tensors that the model is given, by the names they have in its `forward`.
        params: the parameters that operations read, by canonical name, in the model's order.
    """

    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        purpose: str = "the model's graph",
        remedy: str = _REMEDY,
    ) -> None:
        """Trace `model`.

        Args:
            model: the model, or a wrapper (DataParallel, DDP, torch.compile) around it.
            dummy_input: a tensor, or a tuple of the model's positional arguments, on any device.
            purpose: what the graph is for, named in the error.
            remedy: how to go without the graph, named in the error.

        Raises:
            GraphTraceError: `torch.export` cannot trace the model.
        """
        model = unwrap(model)
        traced = trace(model, dummy_input, purpose, remedy)
        self.ops: dict[str, Op] = {op.name: op for op in operations(traced, model)}
        self._parameters = dict(named_parameters(model))
        self._leaf_modules = tuple(leaf_modules(model))
        ops = self.ops.values()
        self.inputs: dict[str, SourceTensor] = {}
        for given in traced.inputs:
            readers = tuple(op.name for op in ops if op.reads_input(given.name))
            self.inputs[given.name] = SourceTensor(given.name, given.shape, readers)
        self.params: dict[str, SourceTensor] = {}
        for name, parameter in self._parameters.items():
            readers = tuple(op.name for op in ops if name in op.params)
            if readers:
                self.params[name] = SourceTensor(name, tuple(parameter.shape), readers)

    def find_op(self, name: str) -> Op:
        """The operation `name`; wrapper parts of the name are dropped.

        Raises:
            UnknownNameError: there is no such operation.
        """
        op = self.ops.get(name) or self.ops.get(strip_wrappers(name))
        if op is None:
            hint = did_you_mean(strip_wrappers(name), self.ops) or "; the names are the keys of ops"
            raise UnknownNameError(f"no operation '{name}' in the graph{hint}", name)
        return op

    def find_param(self, name: str) -> SourceTensor:
        """The parameter `name`; wrapper parts of the name are dropped.

        Raises:
            UnknownNameError: no operation reads a parameter of that name.
        """
        param = self.params.get(name) or self.params.get(strip_wrappers(name))
        if param is None:
            hint = did_you_mean(strip_wrappers(name), self.params)
            raise UnknownNameError(f"no parameter '{name}' in the graph{hint}", name)
        return param

    def param_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the parameter `name`; raises as `find_param`."""
        return self.find_param(name).shape

    def param_volume(self, name: str) -> int:
        """The number of elements of the parameter `name`; raises as `find_param`."""
        return self.find_param(name).volume

    def predecessors(self, name: str) -> tuple[str, ...]:
        """Names of the operations whose results the operation `name` reads.

        Raises:
            UnknownNameError: there is no such operation.
        """
        return self.find_op(name).predecessors

    def successors(self, name: str) -> tuple[str, ...]:
        """Names of the operations that read the result of the operation `name`.

        Raises:
            UnknownNameError: there is no such operation.
        """
        return self.find_op(name).successors

    def predecessors_f(self, name: str, types: str | Collection[str]) -> tuple[str, ...]:
        """Names of the nearest operations of some types before the operation `name`.

        From each operand it goes back through operations of other types, to the first of these
        types on every way; what is before that is not looked at.

        Args:
            name: where to start; itself never among the results.
            types: a word of ONNX, or several, as ("Conv", "Gemm").

        Returns:
            Names, each once, nearest first; none where the model has no operation of these types.

        Raises:
            UnknownNameError: there is no such operation, or no such type in this model or any other.
        """
        return self._nearest(name, types, self.predecessors)

    def successors_f(self, name: str, types: str | Collection[str]) -> tuple[str, ...]:
        """Names of the nearest operations of some types behind the operation `name`; as `predecessors_f`."""
        return self._nearest(name, types, self.successors)

    def get_ops(self, attr: str, f: Callable[[Op], bool] = lambda op: True) -> list[Op]:
        """The operations that have the figure `attr` of `Op.attrs` and for which `f` is true.

        Raises:
            UnknownNameError: no operation of any model has such a figure.
        """
        if attr not in FIGURES:
            raise UnknownNameError(f"no figure '{attr}' of operations; there are {', '.join(FIGURES)}", attr)
        return [op for op in self.ops.values() if attr in op.attrs and f(op)]

    def get_attr(self, attr: str, f: Callable[[Op], bool] = lambda op: True) -> list[Any]:
        """The figure `attr` of each operation in `get_ops(attr, f)`: `sum(graph.get_attr("MACs"))`.

        Raises:
            UnknownNameError: as `get_ops`.
        """
        return [op.attrs[attr] for op in self.get_ops(attr, f)]

    def top_level_ops(self) -> list[str]:
        """Names of the functional operations in the model's own `forward`, in no submodule's."""
        return [op.name for op in self.ops.values() if op.is_functional and not op.module_name]

    def missing_modules(self) -> list[str]:
        """Names of the leaf modules that no operation stands for.

        They are never called, or only pass their input on, as dropout and identities do; or a module
        around them uses their parameters without calling them.
        """
        called = {op.module_name for op in self.ops.values() if not op.is_functional}
        return [name for name in self._leaf_modules if name not in called]

    def named_params_layers(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """(layer name, parameter name, parameter) of every parameter of the model, in its order."""
        for name, parameter in self._parameters.items():
            yield owner(name), name, parameter

    def layers_topological_order(self) -> list[str]:
        """Canonical names of the leaf modules that are called, each once, by first call."""
        return list(dict.fromkeys(op.module_name for op in self.ops.values() if not op.is_functional))

    def adjacency_map(self, dedicated_modules_only: bool = False) -> AdjacencyMap:
        """Every operation with its immediate neighbours, in the order of execution.

        The key of a leaf module that is called once is its canonical name.

        Args:
            dedicated_modules_only: leave out functional operations and the calls of modules that
                are called more than once, as entries and as neighbours.
        """
        calls = Counter(op.module_name for op in self.ops.values() if not op.is_functional)
        metadata = {
            op.name: OpSimpleMetadata(op.name, op.type)
            for op in self.ops.values()
            if not dedicated_modules_only or (not op.is_functional and calls[op.module_name] == 1)
        }
        return OrderedDict(
            (name, self._entry(self.ops[name], meta, metadata)) for name, meta in metadata.items()
        )

    @staticmethod
    def _entry(op: Op, meta: OpSimpleMetadata, metadata: dict[str, OpSimpleMetadata]) -> AdjacentsEntry:
        return AdjacentsEntry(
            op_meta=meta,
            predecessors=[metadata[name] for name in op.predecessors if name in metadata],
            successors=[metadata[name] for name in op.successors if name in metadata],
            module_name=None if op.is_functional else op.module_name,
            output_shape=op.output_shape,
            is_output=op.is_output,
        )

    def _nearest(
        self, name: str, types: str | Collection[str], neighbours: Callable[[str], tuple[str, ...]]
    ) -> tuple[str, ...]:
        require(types, (str, Collection), "types", "a type of operation, or several")
        wanted = {types} if isinstance(types, str) else set(types)
        known = {op.type for op in self.ops.values()}
        for kind in wanted - known:
            if not is_operation_type(kind):
                hint = did_you_mean(kind, known) or f"; the graph has {', '.join(sorted(known))}"
                raise UnknownNameError(f"no such type of operation: '{kind}'{hint}", kind)
        seen = dict.fromkeys(neighbours(name))
        ahead = list(seen)
        for other in ahead:
            if self.ops[other].type not in wanted:
                further = [beyond for beyond in neighbours(other) if beyond not in seen]
                seen.update(dict.fromkeys(further))
                ahead += further
        return tuple(other for other in ahead if self.ops[other].type in wanted)


def model_graph(model: nn.Module, purpose: str) -> SummaryGraph:
    """The graph of a model that says what its input is like: `input_shape`, as (1, 3, 32, 32).

    The graph is kept with the model, and made anew when the model's modules or shapes have changed.

    Args:
        model: the model, or a wrapper around it; the attribute may be on either.
        purpose: what the graph is for, named in the errors.

    Raises:
        DistillerError: there is no `input_shape`, or it is no shape.
        GraphTraceError: `torch.export` cannot trace the model.
    """
    inner = unwrap(model)
    shape = input_shape_of(model, purpose)
    state = {name: tuple(param.shape) for name, param in inner.named_parameters()}
    made_of = (repr(shape), state, {name: type(module) for name, module in inner.named_modules()})
    kept = _GRAPHS.get(inner)
    if kept is None or kept[0] != made_of:
        param = next(inner.parameters(), torch.empty(0))
        # Zeros: random numbers would move the state that a resumed run takes up.
        images = shaped(shape, partial(torch.zeros, dtype=param.dtype, device=param.device))
        kept = _GRAPHS[inner] = (made_of, SummaryGraph(inner, images, purpose))
    return kept[1]


def input_shape_of(model: nn.Module, purpose: str) -> Any:
    """What a model says its input is like: a shape, batch included, or shapes in tuples, lists and dicts.

    Args:
        model: the model, or a wrapper around it; its attribute `input_shape` may be on either.
        purpose: what the shape is for, named in the errors.

    Raises:
        DistillerError: there is no `input_shape`, or it is no shape.
    """
    shape = getattr(unwrap(model), "input_shape", None) or getattr(model, "input_shape", None)
    remedy = "set model.input_shape, as (1, 3, 32, 32)"
    if shape is None:
        raise DistillerError(f"'{purpose}' needs the shape of the model's input: {remedy}")
    try:
        return resolve_input_shape(None, shape)
    except UsageError as error:
        raise DistillerError(f"'{purpose}': model.input_shape: {error}; {remedy}") from error


_GRAPHS: WeakKeyDictionary[nn.Module, tuple[Any, SummaryGraph]] = WeakKeyDictionary()


def batch_norm_behind(graph: SummaryGraph, op: Op, passed: Collection[str] = ()) -> Op | None:
    """The batch norm that alone reads what a convolution or linear layer puts out, channel by channel.

    Args:
        graph: the one that `op` is of.
        op: a call of the layer.
        passed: types of operations that may stand between, each the only reader of the one before.

    Returns:
        The call of the batch norm. None if there is none, if something else reads the layer too, or if the
        norm's channels are not the layer's, as behind a linear layer on (N, L, C); also where `op` is
        neither convolution nor linear layer.
    """
    if op.type != "Conv" and not (op.type == "Gemm" and len(op.output_shape) == 2):
        return None
    behind = op
    while len(behind.successors) == 1 and not behind.is_output:
        behind = graph.ops[behind.successors[0]]
        if behind.output_shape[:2] != op.output_shape[:2]:  # (N, C)
            return None
        if behind.type == "BatchNormalization":
            return behind
        if behind.type not in passed:
            return None
    return None
