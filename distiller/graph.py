"""The graph of a model: which operation feeds which, also where the operation is no module.

Every call of a leaf module is one operation, and so is every functional operation between
them; dropout, identities and whatever else passes its value on, and what is computed from
parameters alone, are looked through.
Knows nothing about what the graph is used for.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.utils import parametrize

from distiller.errors import DistillerError, UnknownNameError, did_you_mean
from distiller.graph_trace import AtenCall, Trace, trace
from distiller.names import named_modules, strip_wrappers, unwrap

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


@dataclass(frozen=True, slots=True)
class Op:
    """One call of a leaf module, or one functional operation.

    Attributes:
        name: unique. The module's canonical name for its first call, then `<module>_<Type>_<n>`;
            `<calling module>.<Type>`, then `<calling module>.<Type>_<n>`, of a functional operation.
        type: a word of ONNX; the class name of a leaf module that is several operations.
        module_name: canonical name of the leaf module called, or of the module in whose
            forward the functional operation stands ("" is the model itself).
        is_functional: whether no leaf module stands for it.
        output_shape: shape of its result, of the first where there are several.
        predecessors: names of the operations it reads, each once, in the order of its arguments.
        successors: names of the operations that read it, each once, in the order of execution.
        is_output: whether the model returns its result.
    """

    name: str
    type: str
    module_name: str
    is_functional: bool
    output_shape: tuple[int, ...]
    predecessors: tuple[str, ...]
    successors: tuple[str, ...]
    is_output: bool


class SummaryGraph:
    """The operations of a model in the order of execution.

    The model is traced as in evaluation, in place: its modes and its state stay as they were.

    Attributes:
        ops: the operations by name, in the order of execution (a topological order).
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
        self.ops: dict[str, Op] = {op.name: op for op in _operations(traced, model)}

    def predecessors(self, name: str) -> tuple[str, ...]:
        """Names of the operations whose results the operation `name` reads.

        Raises:
            UnknownNameError: there is no such operation.
        """
        return self._op(name).predecessors

    def successors(self, name: str) -> tuple[str, ...]:
        """Names of the operations that read the result of the operation `name`.

        Raises:
            UnknownNameError: there is no such operation.
        """
        return self._op(name).successors

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

    def _op(self, name: str) -> Op:
        op = self.ops.get(name) or self.ops.get(strip_wrappers(name))
        if op is None:
            hint = did_you_mean(strip_wrappers(name), self.ops)
            raise UnknownNameError(f"no operation '{name}' in the graph{hint}", name)
        return op


def model_graph(model: nn.Module, purpose: str) -> SummaryGraph:
    """The graph of a model that says what its input is like: `input_shape`, as (1, 3, 32, 32).

    The graph is kept with the model, and made anew when the model's modules or shapes have changed.

    Args:
        model: the model, or a wrapper around it; the attribute may be on either.
        purpose: what the graph is for, named in the errors.

    Raises:
        DistillerError: there is no `input_shape`.
        GraphTraceError: `torch.export` cannot trace the model.
    """
    inner = unwrap(model)
    shape = getattr(inner, "input_shape", None) or getattr(model, "input_shape", None)
    if shape is None:
        raise DistillerError(
            f"'{purpose}' needs the shape of the model's input: set model.input_shape, as (1, 3, 32, 32)"
        )
    state = {name: tuple(param.shape) for name, param in inner.named_parameters()}
    made_of = (tuple(shape), state, {name: type(module) for name, module in inner.named_modules()})
    kept = _GRAPHS.get(inner)
    if kept is None or kept[0] != made_of:
        param = next(inner.parameters(), torch.empty(0))
        # Zeros: random numbers would move the state that a resumed run takes up.
        images = torch.zeros(tuple(shape), dtype=param.dtype, device=param.device)
        kept = _GRAPHS[inner] = (made_of, SummaryGraph(inner, images, purpose))
    return kept[1]


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


def leaf_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The leaf modules of a model by canonical name, each once, in the model's order."""
    return {name: module for name, module in named_modules(model) if is_leaf(module)}


def is_leaf(module: nn.Module) -> bool:
    """Whether a module has no submodules (but parametrizations) and is no empty container."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    return len(list(module.children())) == int(parametrize.is_parametrized(module))


_DATA_MOVEMENT = frozenset(
    ("Cast", "Expand", "Flatten", "Pad", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
)


@dataclass(slots=True, eq=False)
class _Group:
    """The aten operations that are one operation of the graph."""

    module_name: str
    module: nn.Module | None  # the leaf module called, None when functional
    calls: list[AtenCall] = field(default_factory=list)
    name: str = ""
    result: AtenCall | None = None  # the first of the calls that is read from outside
    predecessors: dict[_Group, None] = field(default_factory=dict)
    successors: dict[_Group, None] = field(default_factory=dict)
    is_output: bool = False

    @property
    def type(self) -> str:
        # What a leaf module computes from its parameters alone, and how it moves data, is its own affair.
        calls = [call for call in self.calls if call.depends_on_input] or self.calls
        words = list(dict.fromkeys(call.type for call in calls))
        words = [word for word in words if word not in _DATA_MOVEMENT] or words
        return words[0] if len(words) == 1 else type(self.module).__name__

    def read_by(self, call: AtenCall, reader: _Group) -> None:
        """Take note that `reader` reads the result of `call`, one of this group's."""
        if reader is not self:
            self.result = self.result or call
            self.successors[reader] = None
            reader.predecessors[self] = None


def _operations(traced: Trace, model: nn.Module) -> list[Op]:
    groups = _group_by_module_call(traced.calls, model)
    for call in traced.calls:
        if call in groups:
            for value in call.inputs:
                for source in _sources(value, groups):
                    groups[source].read_by(source, groups[call])
    for value in traced.outputs:
        for source in _sources(value, groups):
            groups[source].result = groups[source].result or source
            groups[source].is_output = True
    ordered = list(dict.fromkeys(groups.values()))
    _give_names(ordered, {name for name, _ in named_modules(model)})
    return [
        Op(
            name=group.name,
            type=group.type,
            module_name=group.module_name,
            is_functional=group.module is None,
            output_shape=(group.result or group.calls[-1]).shape,
            predecessors=tuple(other.name for other in group.predecessors),
            successors=tuple(other.name for other in group.successors),
            is_output=group.is_output,
        )
        for group in ordered
    ]


def _group_by_module_call(calls: tuple[AtenCall, ...], model: nn.Module) -> dict[AtenCall, _Group]:
    """The group of each call; a functional call on parameters alone has none."""
    names = {module: name for name, module in named_modules(model)}
    groups: dict[AtenCall, _Group] = {}
    of_leaf: dict[str, _Group] = {}
    for call in calls:
        modules = [(key, model.get_submodule(path)) for key, path in call.stack if path]
        leaf = next(((key, module) for key, module in modules if is_leaf(module)), None)
        if leaf is not None:
            key, module = leaf
            groups[call] = of_leaf.setdefault(key, _Group(names[module], module))
        elif call.depends_on_input:
            callers = [names[module] for _, module in modules if module in names]
            groups[call] = _Group(callers[-1] if callers else "", None)
        else:
            continue
        groups[call].calls.append(call)
    return groups


def _sources(value: AtenCall, groups: dict[AtenCall, _Group]) -> Iterator[AtenCall]:
    """The calls with a group that `value` comes from; the model's input is none."""
    if value in groups:
        yield value
    else:
        for read in value.inputs:
            yield from _sources(read, groups)


def _give_names(groups: list[_Group], module_names: set[str]) -> None:
    given: set[str] = set()
    for group in groups:
        if group.module is None:
            first = later = ".".join(filter(None, (group.module_name, group.type)))
        else:
            first, later = group.module_name, f"{group.module_name}_{group.type}"
        candidates = chain([first], (f"{later}_{number}" for number in count(1)))
        foreign = module_names - {group.module_name if group.module is not None else None}
        group.name = next(name for name in candidates if name not in given and name not in foreign)
        given.add(group.name)
