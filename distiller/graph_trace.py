"""A model's forward pass as a flat list of aten operations, by `torch.export`.

Dropout and other operations that only pass their value on are left out, regions under
`torch.no_grad()` or autocast are opened, and a value that was changed in place is from
there on the value of the operation that changed it.
Knows nothing about modules, except in which module's forward each operation stands.
"""

from __future__ import annotations

import io
import logging
import operator
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from distiller.dummy_input import forward_arguments
from distiller.errors import GraphTraceError
from distiller.evaluation_mode import evaluating
from distiller.graph_facts import aten_macs, group_count, kernel_shape
from distiller.observation import unobserved

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
CREATED = {f"new_{kind}" for kind in ("empty", "full", "ones", "zeros")} | {
    f"{kind}_like" for kind in ("empty", "full", "ones", "zeros", "rand", "randn")
}
"""Operations that take shape, type and device from a tensor, nothing from its values."""


@dataclass(frozen=True, slots=True, eq=False)
class AtenCall:
    """One aten operation, or an input of the model (type "Input", empty stack).

    Attributes:
        type: a word of ONNX.
        stack: (key, raw module path) of the modules in whose forward it stands, the model first;
            the key differs from one call of a module to the next.
        reads: the tensors that it reads, each once, in the order of its arguments; parameters left out.
        depends_on_input: whether its result depends on the model's input.
        shape: shape of its result, of the first where there are several.
        name: of an input of the model, as its `forward` calls it.
        parameters: raw names of the parameters that it reads, each once.
        macs: multiply-accumulate operations, as `distiller.macs` counts them.
        kernel_shape: of a convolution or pooling, else empty.
        group: groups of a convolution, else None.
    """

    type: str
    stack: tuple[tuple[str, str], ...]
    reads: tuple[Read, ...]
    depends_on_input: bool
    shape: tuple[int, ...]
    name: str = ""
    parameters: tuple[str, ...] = ()
    macs: int = 0
    kernel_shape: tuple[int, ...] = ()
    group: int | None = None


class Read(NamedTuple):
    """A tensor that is read: which result of which operation, and the shape it has where it is read."""

    call: AtenCall
    index: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Trace:
    """The inputs, the operations in the order of execution, and what the model returns."""

    inputs: tuple[AtenCall, ...]
    calls: tuple[AtenCall, ...]
    outputs: tuple[Read, ...]


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
    placeholders = _placeholders(exported)
    outputs = _flatten(exported.graph_module, placeholders, calls)
    return Trace(
        inputs=tuple(value.call for value in placeholders if isinstance(value, Read)),
        calls=tuple(calls),
        outputs=tuple(value for value in outputs if isinstance(value, Read)),
    )


def export_program(
    model: nn.Module,
    dummy_input: Any,
    purpose: str,
    remedy: str,
    training: Collection[nn.Module] = (),
    any_batch: bool = False,
) -> torch.export.ExportedProgram:
    """The aten operations of one forward pass as `torch.export` gives them; takes and raises as `trace`.

    Args:
        training: modules that are in training mode meanwhile, all others being in evaluation mode.
        any_batch: the first dimension of the first argument, a tensor, is left open; two at the least.
    """
    arguments = forward_arguments(model, dummy_input)
    shapes = ({0: Dim("batch", min=2)}, *[None] * (len(arguments) - 1)) if any_batch else None
    try:
        with (
            unobserved(model),
            evaluating(model, training=training, is_decomposed=True),
            _unheard(),
        ):
            return torch.export.export(model, arguments, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise GraphTraceError(
            f"{type(model).__name__}: torch.export cannot trace it for {purpose}: {reason.strip()}; {remedy}"
        ) from error


@contextmanager
def _unheard() -> Iterator[None]:
    """Keep quiet what export says of a model, on the screen too: it does not help its user, and what matters
    of it is in the error."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = before


# A value of the exported program: which result of which operation it is; a text is a parameter, by
# its raw name; None is a constant or no tensor; a plain tuple is the results of a region.
_Value = Read | str | tuple[Any, ...] | None


def _placeholders(exported: torch.export.ExportedProgram) -> list[_Value]:
    """The values of the program's placeholders: the model's inputs, its parameters, None for its buffers."""
    inputs: set[Any] = set(exported.graph_signature.user_inputs)
    parameters = exported.graph_signature.inputs_to_parameters
    values: list[_Value] = []
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            is_input = node.name in inputs and _tensors(node)
            values.append(_input(node) if is_input else parameters.get(node.name))
    return values


def _input(node: fx.Node) -> Read:
    return Read(AtenCall("Input", (), (), True, _shape(node), name=node.name), 0, _shape(node))


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
            return tuple(_read(values, item) if isinstance(item, fx.Node) else None for item in results)
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
        if isinstance(value, Read):
            return value._replace(index=index, shape=_shape(node))
        return value[index] if isinstance(value, tuple) else value  # type: ignore[index]
    at = region_at(node)
    if at is not None:
        region = program.get_submodule(str(node.args[at].target))  # type: ignore[union-attr]
        operands = [values[n] if isinstance(n, fx.Node) else None for n in node.args[at + 1 :]]
        return _flatten(region, operands, calls)  # type: ignore[arg-type]
    name = aten_name(node)
    known = [value for n in node.all_input_nodes if (value := _read(values, n)) is not None]
    if name in _PASSED_ON:
        return known[0] if known else None
    if name in CREATED or not _tensors(node):
        return None
    reads = tuple(dict.fromkeys(value for value in known if isinstance(value, Read)))
    call = AtenCall(
        type=_type_of(name),
        stack=tuple((key, path) for key, (path, _) in node.meta.get("nn_module_stack", {}).items()),
        reads=reads,
        depends_on_input=any(read.call.depends_on_input for read in reads),
        shape=_shape(node),
        parameters=tuple(dict.fromkeys(value for value in known if isinstance(value, str))),
        macs=aten_macs(node),
        kernel_shape=kernel_shape(node),
        group=group_count(node),
    )
    calls.append(call)
    return Read(call, 0, call.shape)


def _read(values: dict[fx.Node, _Value], node: fx.Node) -> _Value:
    """The value of a node, with the shape that it has there: that of a view differs from its base's."""
    value = values.get(node)
    return value._replace(shape=_shape(node)) if isinstance(value, Read) else value


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


def is_operation_type(word: str) -> bool:
    """Whether some operation, or some layer of torch.nn, has this type in a graph."""
    aten_name = re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", word).lower()
    is_of_aten = any(hasattr(torch.ops.aten, name) for name in (aten_name, f"_{aten_name}"))
    return word in {"Input", *_TYPES.values()} or (word[:1].isupper() and (is_of_aten or hasattr(nn, word)))


def _type_of(aten_name: str) -> str:
    camel_case = "".join(word[:1].upper() + word[1:] for word in aten_name.split("_"))
    return _TYPES.get(aten_name, camel_case)


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
