"""One module's forward: each functional operation of it that a module can stand for becomes a module's call.

The new modules are children of the module, named after the function: `add`, `add_1`, `cat`, `relu`, in the
order of the forward. What the module gives for the recorded calls is compared with what it gave before.
Knows nothing about the model around the module.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from distiller.errors import first_line
from distiller.evaluation_mode import buffers_kept
from distiller.functional_modules.form_check import OtherForm, as_traced
from distiller.functional_modules.forward_trace import (
    FROM_INPUT,
    VALUE,
    RecordedCall,
    Untraceable,
    trace_forward,
)
from distiller.functional_modules.in_place import SharedMemory
from distiller.functional_modules.operation_names import CREATED, MOVEMENT, operation_name, plain_name
from distiller.functional_modules.recorded_calls import ComputingModule, copied
from distiller.functional_modules.rewritten_class import rewritten_class
from distiller.functional_modules.rules import COMPUTING, NoModule, Rule, is_tensor, rule_for
from distiller.modules import Matmul

_OF_A_NUMBER = {"sub": "Rsub", "div": "Reciprocal"}
_CLOSE = 1e-5  # of values that are not equal bit for bit, relative to the largest


@dataclass(slots=True)
class Conversion:
    """What became of the operations of one forward.

    Attributes:
        name: canonical name of the module.
        module: whose forward it is.
        cls: its class before.
        modules: child by name, for each new one.
        operations: the names of the functions that it computes with, each once.
        sites: name of the child that is called now, by the operation's name in the forward: `Add`, `Add_1`.
        left: reason by the names of the functions that are left.
    """

    name: str
    module: nn.Module
    cls: type[nn.Module]
    operations: tuple[str, ...] = ()
    modules: dict[str, nn.Module] = field(default_factory=dict)
    sites: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def undo(self) -> None:
        """Give the module its own forward back, and no more children than it had."""
        self.module.__class__ = self.cls
        for name in self.modules:
            delattr(self.module, name)


def convert_forward(found: ComputingModule) -> Conversion:
    """Rewrite a module's forward; the module stays as it is where nothing of it can be converted.

    Args:
        found: the module, in evaluation mode, and what it was called with.

    Raises:
        Untraceable: why it is left as it is, in words that follow `its forward`.
    """
    module = found.module
    graph = _traced(found)
    rewriting = _Rewriting(module, graph, found.name)
    conversion = rewriting.run()
    conversion.operations = found.operations
    if not conversion.sites:
        return conversion
    new = rewritten_class(type(module), graph, found.name, rewriting.output_is_new)
    expected = [_result(module, call) for call in found.calls]
    for name, child in conversion.modules.items():
        module.add_module(name, child.train(module.training))
    module.__class__ = new
    try:
        results = [_result(module, call) for call in found.calls]
    except Exception as error:
        conversion.undo()
        is_other_form = isinstance(error, OtherForm)
        what = "is run in more than one way" if is_other_form else "fails when it is written with modules"
        raise Untraceable(f"{what} ({first_line(error)})") from error
    if not all(map(rewriting.is_same, expected, results)):
        conversion.undo()
        raise Untraceable("gives other values when it is written with modules")
    return conversion


def _traced(found: ComputingModule) -> fx.Graph:
    """The forward's graph, the same with and without gradients."""
    graphs = []
    for with_gradients in (True, False):
        with torch.set_grad_enabled(with_gradients):
            graphs.append(trace_forward(found.module, copied(found.calls[0]), found.name))
    if len({graph.python_code("self").src for graph in graphs}) > 1:
        raise Untraceable("depends on whether gradients are wanted")
    return graphs[-1]


class _Rewriting:
    """Nodes of a graph, one after the other, made calls of modules."""

    def __init__(self, module: nn.Module, graph: fx.Graph, name: str) -> None:
        self._module, self._graph, self._name = module, graph, name
        self._memory = SharedMemory(graph, module, COMPUTING)
        self._conversion = Conversion(name, module, type(module))
        self._words: Counter[str] = Counter()
        self._is_exact = True
        self.output_is_new = False

    def run(self) -> Conversion:
        """Convert what can be converted."""
        for node in list(self._graph.nodes):
            if node.op not in ("call_function", "call_method") or not _computes(node):
                self._memory.pass_by(node)
                continue
            name, is_in_place = plain_name(operation_name(node))
            try:
                self._convert(node, name, is_in_place)
            except NoModule as reason:
                self._conversion.left[name] = str(reason)
                self._memory.pass_by(node)
        self.output_is_new = self._memory.output_is_new()
        return self._conversion

    def is_same(self, expected: Any, got: Any) -> bool:
        """Whether two results of the forward are equal, as far as the rules promise."""
        ones, form = pytree.tree_flatten(expected)
        others, other_form = pytree.tree_flatten(got)
        return form == other_form and all(map(self._is_equal, ones, others))

    def _is_equal(self, one: Any, other: Any) -> bool:
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            return type(one) is type(other) and one == other
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return False
        tolerance = 0.0 if self._is_exact or not one.numel() else _CLOSE * one.abs().max().item()
        return torch.allclose(one, other, rtol=0, atol=tolerance, equal_nan=True)

    def _convert(self, node: fx.Node, name: str, is_in_place: bool) -> None:
        if name == "linear":
            site = self._site("Gemm")
            self._call(node, self._linear_layer(node), node.args[:1], site)
        elif name == "einsum":
            site = self._site("Einsum")
            self._call(node, self._new("matmul", Matmul()), self._factors(node), site)
        elif (rule := rule_for(name)) is not None:
            site = self._site(self._word(node, name, rule.word))
            child, operands = self._built(node, rule)
            is_kept = self._is_kept_in_place(node, child, operands[0], is_in_place)
            self._call(node, self._new(name, child), operands, site, is_kept)
            self._is_exact = self._is_exact and rule.is_exact
        else:
            raise NoModule("no module stands for it")

    def _built(self, node: fx.Node, rule: Rule) -> tuple[nn.Module, Sequence[Any]]:
        """The module that the rule makes of a call, and what it is to be called with."""
        arguments = node.args, node.kwargs
        if not rule.takes_numbers:
            arguments = map_arg(arguments, lambda other: self._setting(node, other))
        try:
            return rule.build(*arguments[0], **arguments[1])
        except TypeError as error:
            raise NoModule(f"no module takes its arguments ({error})") from error

    def _setting(self, node: fx.Node, argument: fx.Node) -> Any:
        """An argument that is a setting: the number that it was, which is checked in each call."""
        if is_tensor(argument):
            return argument
        value = argument.meta[VALUE]
        if not isinstance(value, (int, float)) or argument.target == "training":
            raise NoModule("it has a setting that is computed")
        with self._graph.inserting_before(node):
            check = self._graph.call_function(as_traced, (argument, value, self._name))
        check.meta.update({VALUE: None, FROM_INPUT: False})
        return value

    def _is_kept_in_place(self, node: fx.Node, child: nn.Module, written: Any, is_in_place: bool) -> bool:
        """Whether the module has to write into its first operand, as the function did."""
        is_in_place = is_in_place or getattr(child, "inplace", False) is True
        if is_in_place:
            self._memory.read_result_instead(node, written)
        is_kept = is_in_place and not self._memory.may_be_new(node, written)
        if is_kept and not hasattr(child, "inplace"):
            raise NoModule("it works in place, and something else reads the overwritten tensor")
        if hasattr(child, "inplace"):
            child.inplace = is_kept  # type: ignore[assignment]
        return is_kept

    def _linear_layer(self, node: fx.Node) -> str:
        """The child whose weight and bias a functional linear layer uses."""
        given = inspect.signature(_linear).bind(*node.args, **node.kwargs).arguments
        weight, bias = given["weight"], given.get("bias")
        path = _path(weight).removesuffix(".weight")
        layer = self._module.get_submodule(path) if path != _path(weight) else None
        expected = f"{path}.bias" if layer is not None and layer.bias is not None else ""
        if type(layer) is not nn.Linear or _path(bias) != expected:
            raise NoModule("its weights are not those of a linear layer among the children")
        return path

    def _factors(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The two factors of a matrix product that is written as an einsum, transposed as it takes."""
        equation, *operands = node.args
        operands = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
        transposed = _matrix_product(str(equation)) if len(operands) == 2 else None  # type: ignore[arg-type]
        if transposed is None:
            raise NoModule("it is not a product of two matrices")
        with self._graph.inserting_before(node):
            return tuple(  # type: ignore[return-value]
                self._graph.call_method("transpose", (operand, -2, -1)) if is_turned else operand
                for operand, is_turned in zip(operands, transposed, strict=True)  # type: ignore[arg-type]
            )

    def _new(self, name: str, child: nn.Module) -> str:
        """A free name among the module's attributes for a new child."""
        candidates = chain([name], (f"{name}_{number}" for number in count(1)))
        taken = self._conversion.modules
        free = next(c for c in candidates if c not in taken and not hasattr(self._module, c))
        taken[free] = child
        return free

    def _word(self, node: fx.Node, name: str, word: str) -> str:
        """The type that a graph gives an operation: `1 - x` and `1 / x` have their own."""
        if name in _OF_A_NUMBER and not (node.args and is_tensor(node.args[0])):
            self._words["Mul"] += name == "div"  # by what is divided
            return _OF_A_NUMBER[name]
        return word

    def _site(self, word: str) -> str:
        """What a graph calls the next operation of this type."""
        number = self._words[word]
        self._words[word] += 1
        return f"{word}_{number}" if number else word

    def _call(
        self, node: fx.Node, path: str, operands: Sequence[Any], site: str, is_kept_in_place: bool = False
    ) -> None:
        """Make the node a call of a child."""
        self._memory.pass_by(node) if is_kept_in_place else self._memory.made_new(node)
        node.op, node.target = "call_module", path
        node.args, node.kwargs = tuple(operands), {}
        self._conversion.sites[site] = path


def _computes(node: fx.Node) -> bool:
    """Whether a node is an operation on data of floating point that does more than to move them."""
    name = plain_name(operation_name(node))[0]
    value = node.meta[VALUE]
    is_real = isinstance(value, Tensor) and value.is_floating_point()
    return is_real and node.meta[FROM_INPUT] and name not in MOVEMENT and name not in CREATED


def _linear(input: Any, weight: Any, bias: Any = None) -> None:
    """The arguments of `torch.nn.functional.linear`."""


def _path(argument: Any) -> str:
    """The name of the parameter that an argument is; empty if it is none."""
    return str(argument.target) if isinstance(argument, fx.Node) and argument.op == "get_attr" else ""


def _matrix_product(equation: str) -> tuple[bool, bool] | None:
    """Whether either factor of `bij,bjk->bik` stands there transposed; None if it is another sum."""
    factors, _, result = equation.replace(" ", "").partition("->")
    one, _, other = factors.partition(",")
    batch, rows, columns = result[:-2], result[-2:-1], result[-1:]
    for middle in set(one) & set(other) - set(result):
        found = []
        for factor, plain in ((one, rows + middle), (other, middle + columns)):
            if factor not in (batch + plain, batch + plain[::-1]) or len(set(factor)) < len(factor):
                return None
            found.append(factor != batch + plain)
        return found[0], found[1]
    return None


def _result(module: nn.Module, call: RecordedCall) -> Any:
    """What a module's forward gives for a call, the same for the same forward where it draws numbers."""
    call = copied(call)
    torch.manual_seed(0)
    with buffers_kept(module):
        return type(module).forward(module, *call.args, **call.kwargs)
