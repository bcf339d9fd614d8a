"""The forward pass of a model as a list of steps that can be run one by one, and in part.

A step is an aten operation as `torch.export` gives it, without those that work in place. The number
of images is open where the model allows it; else it is that of the example.
Knows nothing about which steps are run, or why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind
from torch.utils import _pytree as pytree

from distiller.errors import GraphTraceError
from distiller.graph_trace import aten_name, export_program
from distiller.names import canonical, named_buffers, named_parameters, unwrap
from distiller.replay.discontinuity import discontinuous_operations

_IN_ANY_LAYOUT: dict[Any, Any] = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
}
"""Operations that some memory layouts refuse, and what gives the same in every one."""
_PURPOSE = "running it in part"
_REMEDY = "it is run as a whole instead"
_CHANGES = {
    OutputKind.BUFFER_MUTATION: "its own buffers in evaluation, which are put back each time",
    OutputKind.USER_INPUT_MUTATION: "the images that it is given",
}


@dataclass(frozen=True, slots=True)
class Value:
    """Stands among the arguments of a step for the result of another."""

    index: int


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One operation.

    Attributes:
        index: its place; the results of steps go by it.
        target: what is called.
        args: its arguments; a `Value` where another's result stands, nested in lists too. Tuples have none.
        kwargs: alike.
        reads: the steps whose results it reads, each once; sources of the program count as steps.
        kind: the name of the aten operation.
        module: canonical name of the module in whose forward it stands; "" is the model.
        shape: of its result; the first of -1 is the number of images. None: not one tensor.
    """

    index: int
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    reads: tuple[int, ...]
    kind: str
    module: str
    shape: tuple[int, ...] | None

    def run(self, value: Callable[[int], Any]) -> Any:
        """Its result, given what the results of others are."""
        args = [_filled(arg, value) for arg in self.args]
        return self.target(*args, **{k: _filled(v, value) for k, v in self.kwargs.items()})


@dataclass(frozen=True, slots=True)
class Program:
    """The steps of a forward pass, from one tensor of images to one tensor of logits.

    Attributes:
        steps: in the order of execution.
        state: canonical names of parameters and buffers by index; an index of its own for each.
        constants: values of the other sources, by index.
        sizes: what depends on the number of images alone, by index: images -> number.
        images: the index of the input.
        output: the index of the result.
        batch: the number of images that it takes; None: any.
        discontinuous: operations, by name, that make a last bit more or less of what they read, of the images
            or the state, into something else altogether.
    """

    steps: tuple[Step, ...]
    state: Mapping[int, str]
    constants: Mapping[int, Any]
    sizes: Mapping[int, Callable[[int], int]]
    images: int
    output: int
    batch: int | None
    discontinuous: tuple[str, ...]

    def readers(self, index: int) -> tuple[Step, ...]:
        """The steps that read a result."""
        return tuple(step for step in self.steps if index in step.reads)

    def indices_of(self, name: str) -> tuple[int, ...]:
        """Where a parameter or buffer comes in; nowhere, when it is not read."""
        return tuple(index for index, found in self.state.items() if found == name)

    def without_images(self) -> frozenset[int]:
        """Results with a row for each image that depend on nothing but how many there are."""
        of_images, found = {self.images}, set()
        for step in self.steps:
            if not of_images.isdisjoint(step.reads):
                of_images.add(step.index)
            elif not unbatched(step.shape):
                found.add(step.index)
        return frozenset(found)


def read_program(model: nn.Module, example: Tensor) -> Program:
    """The steps of a model in evaluation mode; its modes and its state stay as they were.

    Args:
        model: the model, or a wrapper around it; takes one tensor, returns one.
        example: images, two or more, on the model's device.

    Raises:
        GraphTraceError: it cannot be traced, changes its own state, or takes or returns something else.
    """
    model = unwrap(model)
    try:
        exported = _functional(export_program(model, example, _PURPOSE, _REMEDY, any_batch=True))
        batch = None
    except GraphTraceError:
        exported = _functional(export_program(model, example, _PURPOSE, _REMEDY))
        batch = len(example)
    return _Reader(exported, model, batch).program()


def _functional(exported: ExportedProgram) -> ExportedProgram:
    """The program without operations that work in place; none of them is taken apart otherwise."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return exported.run_decompositions({})
    except Exception as error:  # whatever torch raises: the model is run as a whole then
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise GraphTraceError(
            f"torch.export cannot do without its changes in place: {reason.strip()}"
        ) from error


class _Reader:
    """Makes a program of an exported one."""

    def __init__(self, exported: ExportedProgram, model: nn.Module, batch: int | None) -> None:
        self._exported, self._model, self._batch = exported, model, batch
        self._index = {node: index for index, node in enumerate(exported.graph.nodes)}
        objects = {id(value): name for name, value in (*named_parameters(model), *named_buffers(model))}
        raw = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
        self._canonical = {name: objects[id(value)] for name, value in raw}

    def program(self) -> Program:
        """The steps, and where everything else comes from."""
        signature = self._exported.graph_signature
        for spec in signature.output_specs:
            if spec.kind is not OutputKind.USER_OUTPUT:
                changed = _CHANGES.get(spec.kind, "something besides its answer")
                raise GraphTraceError(f"{type(self._model).__name__}: changes {changed}; {_REMEDY}")
        state: dict[int, str] = {}
        constants: dict[int, Any] = {}
        images: list[int] = []
        specs = {spec.arg.name: spec for spec in signature.input_specs}
        for node in self._nodes("placeholder"):
            spec, index = specs[node.name], self._index[node]
            if spec.kind is InputKind.USER_INPUT:
                if isinstance(node.meta.get("val"), Tensor):
                    images.append(index)
                constants[index] = getattr(spec.arg, "value", None)
            elif spec.target in self._canonical:
                state[index] = self._canonical[spec.target]
            else:
                constants[index] = self._constant(spec)
        for node in self._nodes("get_attr"):
            constants[self._index[node]] = _attribute(self._exported.graph_module, str(node.target))
        outputs = pytree.tree_leaves(next(iter(self._nodes("output"))).args)
        if len(images) != 1 or len(outputs) != 1 or not isinstance(outputs[0], fx.Node):
            raise GraphTraceError(
                f"{type(self._model).__name__}: takes {len(images)} tensors and returns {len(outputs)} "
                f"values, one of each can be run in part; {_REMEDY}"
            )
        constants.pop(images[0])
        symbol = self._symbol(images[0])
        sizes = {
            self._index[node]: _size(node.meta["val"].node.expr, symbol)
            for node in self._nodes("call_function")
            if isinstance(node.meta.get("val"), torch.SymInt)
        }
        return Program(
            steps=tuple(self._steps(sizes, symbol)),
            state=state,
            constants=constants,
            sizes=sizes,
            images=images[0],
            output=self._index[outputs[0]],
            batch=self._batch,
            discontinuous=discontinuous_operations(
                self._exported.graph.nodes,
                [node for node, index in self._index.items() if index in state or index == images[0]],
            ),
        )

    def _nodes(self, op: str) -> Iterator[fx.Node]:
        return (node for node in self._exported.graph.nodes if node.op == op)

    def _constant(self, spec: InputSpec) -> Any:
        name = str(spec.target)
        if name in self._exported.constants:
            return self._exported.constants[name]
        raise GraphTraceError(f"{type(self._model).__name__}: reads '{name}' that it does not own; {_REMEDY}")

    def _symbol(self, images: int) -> Any:
        node = next(node for node, index in self._index.items() if index == images)
        size = node.meta["val"].shape[0]
        return size.node.expr if isinstance(size, torch.SymInt) else None

    def _steps(self, sizes: Mapping[int, Any], symbol: Any) -> Iterator[Step]:
        for node in self._nodes("call_function"):
            value = node.meta.get("val")
            if self._index[node] in sizes or (value is None and not node.users):
                continue  # a size, or a check of sizes
            yield Step(
                index=self._index[node],
                target=_IN_ANY_LAYOUT.get(node.target, node.target),  # type: ignore[arg-type]
                args=tuple(self._argument(arg) for arg in node.args),
                kwargs={key: self._argument(arg) for key, arg in node.kwargs.items()},
                reads=tuple(self._index[read] for read in node.all_input_nodes),
                kind=aten_name(node),
                module=self._module(node),
                shape=_shape(value, symbol),
            )

    def _argument(self, arg: Any) -> Any:
        if isinstance(arg, fx.Node):
            return Value(self._index[arg])
        if isinstance(arg, (list, tuple)):
            items = [self._argument(item) for item in arg]
            return items if any(isinstance(item, (Value, list)) for item in items) else tuple(items)
        return arg

    def _module(self, node: fx.Node) -> str:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        return canonical(stack[-1][0], self._model) if stack and stack[-1][0] else ""


def _filled(arg: Any, value: Callable[[int], Any]) -> Any:
    kind = type(arg)
    if kind is Value:
        return value(arg.index)
    return [_filled(item, value) for item in arg] if kind is list else arg


def _size(expression: Any, symbol: Any) -> Callable[[int], int]:
    @lru_cache(maxsize=64)
    def size(images: int) -> int:
        return int(sympy.sympify(expression).subs(symbol, images))

    return size


def _shape(value: Any, symbol: Any) -> tuple[int, ...] | None:
    if not isinstance(value, Tensor):
        return None
    first, *others = value.shape or (1,)
    if isinstance(first, torch.SymInt) and first.node.expr == symbol:
        first = -1
    if any(isinstance(size, torch.SymInt) for size in (first, *others)):
        return None  # more than the first dimension depends on the number of images
    return (first, *(int(size) for size in others))


def _attribute(module: nn.Module, path: str) -> Any:
    owner: Any = module
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner


def unbatched(shape: Sequence[int] | None) -> bool:
    """Whether a result does not have an image in each row."""
    return shape is None or not shape or shape[0] != -1
