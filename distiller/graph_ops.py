"""The operations of a model, made out of a trace: leaf modules' calls and what stands between them.

The aten operations of one call of a leaf module are one operation; every other one that depends on
the model's input is one by itself; what is computed from parameters alone is looked through, and
its parameters and MACs are booked on who reads it.
Knows nothing about what the graph is used for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from distiller.graph_trace import AtenCall, Read, Trace
from distiller.names import named_modules, named_parameters

Shape = tuple[int, ...]

FIGURES = ("MACs", "footprint", "fm_vol", "weights_vol", "ai", "n_ifm", "n_ofm", "kernel_shape", "group")
"""The keys that `Op.attrs` may have."""


class Operand(NamedTuple):
    """A tensor that an operation reads: whose result it is, or which input of the model, and its shape."""

    source: str
    shape: Shape
    is_input: bool = False


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor that no operation computes: a parameter, or an input of the model.

    Attributes:
        name: canonical, of a parameter; of an input, what the model's `forward` calls it.
        shape: its shape.
        readers: names of the operations that read it, in the order of execution.
    """

    name: str
    shape: Shape
    readers: tuple[str, ...]

    @property
    def volume(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Op:
    """One call of a leaf module, or one functional operation.

    Shapes are those of the whole batch, volumes are numbers of elements.

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
        operands: the tensors it reads, each once, in the order of its arguments; parameters left out.
        output_shapes: of those of its results that something reads, or the model returns.
        params: canonical names of the parameters it reads.
        weights_vol: elements of those of them that have two and more dimensions.
        macs: multiply-accumulate operations, as `distiller.macs` counts them.
        kernel_shape: of a convolution or pooling, as (3, 3); else empty.
        group: groups of a convolution, else None.
    """

    name: str
    type: str
    module_name: str
    is_functional: bool
    output_shape: Shape
    predecessors: tuple[str, ...]
    successors: tuple[str, ...]
    is_output: bool
    operands: tuple[Operand, ...]
    output_shapes: tuple[Shape, ...]
    params: tuple[str, ...]
    weights_vol: int
    macs: int
    kernel_shape: Shape
    group: int | None

    def reads_input(self, name: str) -> bool:
        """Whether the model's input `name` is among its operands."""
        return any(operand.is_input and operand.source == name for operand in self.operands)

    @property
    def input_shapes(self) -> tuple[Shape, ...]:
        """The shapes of its operands."""
        return tuple(operand.shape for operand in self.operands)

    @property
    def input_volume(self) -> int:
        """Elements of all its operands."""
        return sum(math.prod(shape) for shape in self.input_shapes)

    @property
    def output_volume(self) -> int:
        """Elements of all its results that are read."""
        return sum(math.prod(shape) for shape in self.output_shapes)

    @property
    def attrs(self) -> dict[str, Any]:
        """Its figures under Distiller's names.

        `MACs`; `fm_vol`, elements of operands and results; `weights_vol`; `footprint`, the sum of
        the two volumes; `ai`, the arithmetic intensity MACs / footprint. Of convolutions and linear
        layers also `n_ifm` and `n_ofm`, channels or features in and out; of convolutions and poolings
        `kernel_shape`; of convolutions `group`.
        """
        fm_vol = self.input_volume + self.output_volume
        footprint = fm_vol + self.weights_vol
        figures: dict[str, Any] = {
            "MACs": self.macs,
            "footprint": footprint,
            "fm_vol": fm_vol,
            "weights_vol": self.weights_vol,
            "ai": self.macs / footprint if footprint else 0.0,
        }
        if self.type in ("Conv", "ConvTranspose", "Gemm") and self.operands:
            channel_dim = -1 - len(self.kernel_shape)
            figures["n_ifm"] = self.operands[0].shape[channel_dim]
            figures["n_ofm"] = self.output_shape[channel_dim]
        if self.kernel_shape:
            figures["kernel_shape"] = self.kernel_shape
        if self.group is not None:
            figures["group"] = self.group
        return figures


def leaf_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The leaf modules of a model by canonical name, each once, in the model's order."""
    return {name: module for name, module in named_modules(model) if is_leaf(module)}


def is_leaf(module: nn.Module) -> bool:
    """Whether a module has no submodules (but parametrizations and quantizers) and is no empty container."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    others = [child for child in module.children() if getattr(child, "quantizes", None) is None]
    return len(others) == int(parametrize.is_parametrized(module))


def operations(traced: Trace, model: nn.Module) -> list[Op]:
    """The operations of a traced model in the order of execution.

    Args:
        traced: the trace of `model`.
        model: not a wrapper around one.
    """
    groups = _group_by_module_call(traced.calls, model)
    _link(traced, groups)
    ordered = list(dict.fromkeys(groups.values()))
    _give_names(ordered, {name for name, _ in named_modules(model)})
    names = {id(parameter): name for name, parameter in named_parameters(model)}
    sizes = {name: parameter.numel() for name, parameter in named_parameters(model) if parameter.dim() >= 2}
    ops = []
    for group in ordered:
        params = tuple(dict.fromkeys(names[id(model.get_parameter(raw))] for raw in group.parameters))
        result = (group.result or group.calls[-1]).shape
        ops.append(
            Op(
                name=group.name,
                type=group.type,
                module_name=group.module_name,
                is_functional=group.module is None,
                output_shape=result,
                predecessors=tuple(other.name for other in group.predecessors),
                successors=tuple(other.name for other in group.successors),
                is_output=group.is_output,
                operands=tuple(
                    Operand(source.name, shape, isinstance(source, AtenCall))
                    for (source, _, _), shape in group.operands.items()
                ),
                output_shapes=tuple(group.results.values()) or (result,),
                params=params,
                weights_vol=sum(sizes.get(name, 0) for name in params),
                macs=group.macs,
                kernel_shape=next((call.kernel_shape for call in group.calls if call.kernel_shape), ()),
                group=next((call.group for call in group.calls if call.group is not None), None),
            )
        )
    return ops


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
    results: dict[tuple[AtenCall, int], Shape] = field(default_factory=dict)
    operands: dict[tuple[_Group | AtenCall, AtenCall, int], Shape] = field(default_factory=dict)
    predecessors: dict[_Group, None] = field(default_factory=dict)
    successors: dict[_Group, None] = field(default_factory=dict)
    is_output: bool = False
    parameters: dict[str, None] = field(default_factory=dict)  # raw names
    macs: int = 0

    @property
    def type(self) -> str:
        # What a leaf module computes from its parameters alone, and how it moves data, is its own affair.
        calls = [call for call in self.calls if call.depends_on_input] or self.calls
        words = list(dict.fromkeys(call.type for call in calls))
        words = [word for word in words if word not in _DATA_MOVEMENT] or words
        return words[0] if len(words) == 1 else type(self.module).__name__

    def gives(self, read: Read) -> None:
        """Take note that something outside reads a result of one of this group's calls."""
        self.result = self.result or read.call
        self.results.setdefault((read.call, read.index), read.shape)

    def take(self, call: AtenCall) -> None:
        """Book what `call` costs and which parameters it reads."""
        self.macs += call.macs
        self.parameters.update(dict.fromkeys(call.parameters))


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


def _link(traced: Trace, groups: dict[AtenCall, _Group]) -> None:
    """Tell the groups who reads whom, which parameters they read, and what they cost."""
    booked: set[AtenCall] = set()
    for call in traced.calls:
        if call not in groups:
            continue
        group = groups[call]
        group.take(call)
        passed: dict[AtenCall, None] = {}
        for read in _reads(call, groups, passed):
            source = groups.get(read.call)
            if source is not group:
                group.operands.setdefault((source or read.call, read.call, read.index), read.shape)
            if source is not None and source is not group:
                source.gives(read)
                source.successors[group] = None
                group.predecessors[source] = None
        for between in passed:
            group.parameters.update(dict.fromkeys(between.parameters))
            group.macs += 0 if between in booked else between.macs
        booked.update(passed)
    for read in traced.outputs:
        ends = [read] if read.call in groups else list(_reads(read.call, groups, {}))
        for end in ends:
            if end.call in groups:
                groups[end.call].gives(end)
                groups[end.call].is_output = True


def _reads(call: AtenCall, groups: dict[AtenCall, _Group], passed: dict[AtenCall, None]) -> Iterator[Read]:
    """What `call` reads of groups and of the model's inputs, through calls that have no group.

    Those are added to `passed`; what is in it already is not looked through again.
    """
    for read in call.reads:
        if read.call in groups or read.call.depends_on_input:
            yield read
        elif read.call not in passed:
            passed[read.call] = None
            yield from _reads(read.call, groups, passed)


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
