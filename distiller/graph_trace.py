"""A model's forward pass as a flat list of aten operations, by `torch.export`.

Dropout and other operations that only pass their value on are left out, regions under
`torch.no_grad()` or autocast are opened, and a value that was changed in place is from
there on the value of the operation that changed it.
Knows nothing about modules, except in which module's forward each operation stands.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from distiller.errors import GraphTraceError

# Words of ONNX by the name of the aten operation; any other name becomes CamelCase.
_TYPES = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), "Conv"),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "ConvTranspose"),
    **dict.fromkeys(("linear", "addmm"), "Gemm"),
    **dict.fromkeys(("matmul", "mm", "bmm"), "MatMul"),
    **dict.fromkeys(("hardtanh", "relu6", "clamp", "clip"), "Clip"),
    **dict.fromkeys(("cat", "concat", "concatenate"), "Concat"),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split", "unbind"), "Split"),
    **dict.fromkeys(("view", "reshape", "unflatten", "_unsafe_view"), "Reshape"),
    **dict.fromkeys(("permute", "transpose", "t", "movedim"), "Transpose"),
    **dict.fromkeys(("embedding", "index", "index_select", "select", "gather"), "Gather"),
    **dict.fromkeys(("to", "_to_copy"), "Cast"),
    **{f"{kind}max_pool{n}d": "MaxPool" for kind in ("", "adaptive_") for n in (1, 2, 3)},
    **{f"{kind}avg_pool{n}d": "AveragePool" for kind in ("", "adaptive_") for n in (1, 2, 3)},
    "batch_norm": "BatchNormalization",
    "layer_norm": "LayerNormalization",
    "group_norm": "GroupNormalization",
    "instance_norm": "InstanceNormalization",
    "scaled_dot_product_attention": "Attention",
    "multiply": "Mul",
    "subtract": "Sub",
    "divide": "Div",
    "true_divide": "Div",
    "mean": "ReduceMean",
    "sum": "ReduceSum",
    "lstm": "LSTM",
    "gru": "GRU",
    "prelu": "PRelu",
}
_DROPOUTS = ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
_PASSED_ON = {"alias", "clone", "contiguous", "detach", "lift_fresh", "lift_fresh_copy", *_DROPOUTS}
# Take shape, type and device from a tensor, nothing from its values.
_CREATED = {f"new_{kind}" for kind in ("empty", "full", "ones", "zeros")} | {
    f"{kind}_like" for kind in ("empty", "full", "ones", "zeros", "rand", "randn")
}


@dataclass(frozen=True, slots=True, eq=False)
class AtenCall:
    """One aten operation, or an input of the model (type "Input", empty stack).

    Attributes:
        type: a word of ONNX.
        stack: (key, raw module path) of the modules in whose forward it stands, the model first;
            the key differs from one call of a module to the next.
        inputs: whose results it reads, each once, in the order of its arguments; parameters left out.
        depends_on_input: whether its result depends on the model's input.
        shape: shape of its result, of the first where there are several.
    """

    type: str
    stack: tuple[tuple[str, str], ...]
    inputs: tuple[AtenCall, ...]
    depends_on_input: bool
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """The operations in the order of execution, and those whose results the model returns."""

    calls: tuple[AtenCall, ...]
    outputs: tuple[AtenCall, ...]


def trace(model: nn.Module, dummy_input: Any, purpose: str, remedy: str) -> Trace:
    """The operations of one forward pass in evaluation mode; modes and state stay as they were.

    Args:
        model: the model; not a wrapper around one.
        dummy_input: a tensor, or a tuple of the model's positional arguments, on any device.
        purpose: what the trace is for, named in the error.
        remedy: how to go without, named in the error.

    Raises:
        GraphTraceError: `torch.export` cannot trace the model.
    """
    exported = export_program(model, dummy_input, purpose, remedy)
    calls: list[AtenCall] = []
    outputs = _flatten(exported.graph_module, _placeholders(exported), calls)
    return Trace(tuple(calls), tuple(value for value in outputs if isinstance(value, AtenCall)))


def export_program(
    model: nn.Module, dummy_input: Any, purpose: str, remedy: str
) -> torch.export.ExportedProgram:
    """The aten operations of one forward pass as `torch.export` gives them; takes and raises as `trace`."""
    arguments = tuple(dummy_input) if isinstance(dummy_input, (tuple, list)) else (dummy_input,)
    state = next(model.parameters(), None)
    if state is not None:
        arguments = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(state.device), arguments)
    try:
        with _evaluating(model):
            return torch.export.export(model, arguments, strict=False)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise GraphTraceError(
            f"{type(model).__name__}: torch.export cannot trace it for {purpose}: {reason.strip()}; {remedy}"
        ) from error


# A value of the exported program: the operation that computes it; None is a constant or no
# tensor; a tuple is the results of a region.
_Value = AtenCall | tuple[Any, ...] | None


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without the model's own `train`, no gradients, no fused attention, no warnings."""
    modes = {module: module.training for module in model.modules()}
    is_fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for module in modes:
            module.training = False
        torch.backends.mha.set_fastpath_enabled(False)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # what export says of a model does not help its user
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fast)
        for module, is_training in modes.items():
            module.training = is_training


def _placeholders(exported: torch.export.ExportedProgram) -> list[_Value]:
    """The values of the program's placeholders: the model's inputs, and None for its state."""
    inputs = set(exported.graph_signature.user_inputs)
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    return [
        AtenCall("Input", (), (), True, _shape(node)) if node.name in inputs else None
        for node in placeholders
    ]


def _flatten(
    program: fx.GraphModule, arguments: Sequence[_Value], calls: list[AtenCall]
) -> tuple[_Value, ...]:
    """Append the operations of `program` to `calls`; returns the values of its outputs."""
    values: dict[fx.Node, _Value] = {}
    aliases = _Aliases()
    pending = iter(arguments)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(pending)
        elif node.op == "output":
            results = pytree.tree_leaves(node.args)
            return tuple(values[item] if isinstance(item, fx.Node) else None for item in results)
        elif node.op == "call_function":
            values[node] = _evaluate(node, program, values, calls)
            written = aliases.add(node)
            if written is not None:
                values.update(dict.fromkeys(aliases.of(written), values[node]))
    raise AssertionError("an exported program ends in its output")


def _evaluate(
    node: fx.Node, program: fx.GraphModule, values: dict[fx.Node, _Value], calls: list[AtenCall]
) -> _Value:
    """The value of one operation, which is appended to `calls` unless it passes a value on."""
    if node.target is operator.getitem:
        value, index = values[node.args[0]], node.args[1]  # type: ignore[index]
        return value[index] if isinstance(value, tuple) else value  # type: ignore[index]
    at = region_at(node)
    if at is not None:
        region = program.get_submodule(str(node.args[at].target))  # type: ignore[union-attr]
        operands = [values[n] if isinstance(n, fx.Node) else None for n in node.args[at + 1 :]]
        return _flatten(region, operands, calls)  # type: ignore[arg-type]
    name = aten_name(node)
    inputs = tuple(dict.fromkeys(v for n in node.all_input_nodes if isinstance(v := values.get(n), AtenCall)))
    if name in _PASSED_ON:
        return inputs[0] if inputs else None
    if name in _CREATED or not _tensors(node):
        return None
    stack = tuple((key, path) for key, (path, _) in node.meta.get("nn_module_stack", {}).items())
    depends = any(call.depends_on_input for call in inputs)
    camel_case = "".join(word[:1].upper() + word[1:] for word in name.split("_"))
    call = AtenCall(_TYPES.get(name, camel_case), stack, inputs, depends, _shape(node))
    calls.append(call)
    return call


class _Aliases:
    """Which values are the same memory as, or views of, which others."""

    def __init__(self) -> None:
        self._same: dict[fx.Node, fx.Node] = {}
        self._base: dict[fx.Node, fx.Node] = {}

    def add(self, node: fx.Node) -> fx.Node | None:
        """Take note of an operation; returns the value that it writes in place, if any."""
        schema = getattr(node.target, "_schema", None)
        for argument, value in zip(schema.arguments if schema else (), node.args, strict=False):
            if argument.alias_info is None or not isinstance(value, fx.Node):
                continue
            original = self._same.get(value, value)
            if argument.alias_info.is_write:
                self._same[node] = original
                return original
            self._base[node] = original
        return None

    def of(self, written: fx.Node) -> list[fx.Node]:
        """The values that change when `written` does: it, what it is a view of, and views of it."""
        changed = self._lineage(written)
        known = dict.fromkeys((*self._same, *self._base))
        return changed + [
            node for node in known if self._same.get(node) in changed or written in self._lineage(node)
        ]

    def _lineage(self, node: fx.Node) -> list[fx.Node]:
        lineage = [self._same.get(node, node)]
        while (base := self._base.get(lineage[-1])) is not None:
            lineage.append(base)
        return lineage


def region_at(node: fx.Node) -> int | None:
    """Where among the arguments the program of a no_grad or autocast region stands; None if it is none."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    if not str(node.target).startswith("wrap_with_"):
        return None
    return next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")


def aten_name(node: fx.Node) -> str:
    """The name of an operation, without overload or the underscore of one that works in place."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name.rpartition("::")[2] if schema else str(node.target)
    return name[:-1] if name.endswith("_") else name


def _shape(node: fx.Node) -> tuple[int, ...]:
    tensors = _tensors(node)
    return tuple(int(size) for size in tensors[0].shape) if tensors else ()


def _tensors(node: fx.Node) -> list[Tensor]:
    """Stand-ins of the tensors that are the operation's results."""
    return [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]
