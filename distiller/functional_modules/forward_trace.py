"""The forward of one module as a graph of operations, with its children's calls left as they are.

`torch.fx` runs the forward on stand-ins. Here a stand-in has a value, the one that it has for a recorded
call: sizes are known where the forward asks for them, and an addition of tensors is told from one of
sizes. Stand-ins are tensors and numbers alone; lists, tuples and dicts of them are what they are in the
forward. What the forward was traced for beyond that (a length, `x is None`, the outcome of a comparison
of sizes) becomes a check in the graph, which raises when it no longer holds. A forward whose course
depends on values of tensors, on the mode, or on gradients is not traced but refused.
Knows nothing about which operations become modules.
"""

from __future__ import annotations

import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from distiller.errors import first_line
from distiller.functional_modules.form_check import as_traced
from distiller.functional_modules.operation_names import CREATED, operation_name
from distiller.functional_modules.trace_patches import patched

VALUE, FROM_INPUT = "value", "from_input"
"""Keys of `Node.meta`: what the operation gave, and whether that depends on what the forward is given."""

_DEPENDS = "depends"  # key of Node.meta: what no course may depend on but a number does, in words
_ON_VALUES, _ON_MODE = "the values of tensors", "the mode (self.training)"
_OPAQUE = (torch.dtype, torch.device, torch.memory_format, torch.layout)
_FORM_WORDS = """
    __len__ device dim dtype element_size get_device is_complex is_contiguous is_cpu is_cuda
    is_ is_floating_point is_meta is_nested is_quantized is_sparse itemsize layout len ndim ndimension
    nelement numel requires_grad shape size stride storage_offset
"""
_FORM = frozenset(_FORM_WORDS.split())
_IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")


class Untraceable(Exception):
    """Why a forward cannot be traced, in words that follow `its forward`."""


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """What a module was called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def trace_forward(module: nn.Module, call: RecordedCall, name: str) -> fx.Graph:
    """The operations of `module`'s own forward in the order of execution.

    Args:
        module: its children are run; nothing of itself is changed.
        call: the call to trace; tensors in it may be written to.
        name: the module's name, for the checks' messages.

    Returns:
        A graph whose nodes have the entries VALUE and FROM_INPUT in `meta`.

    Raises:
        Untraceable: the forward's course depends on more than sizes and constants, or it does what a
            graph cannot hold.
    """
    forward = type(module).forward
    if (
        "forward" in vars(module)
        or not isinstance(forward, FunctionType)
        or isinstance(module, fx.GraphModule)
    ):
        raise Untraceable("is not that of its class, written in Python")
    tracer, state = _ForwardTracer(module, name), _State(module)
    try:
        with patched(tracer, forward.__globals__, type(module)):
            args, kwargs = tracer.arguments(forward, call)
            tracer.create_node("output", "output", (tracer.create_arg(forward(module, *args, **kwargs)),), {})
    except Untraceable:
        raise
    except Exception as error:
        if isinstance(error, TypeError) and _StandIn.__name__ in str(error):
            raise Untraceable("needs a size or a tensor's value as a plain number") from error
        raise Untraceable(f"cannot be traced ({type(error).__name__}: {first_line(error)})") from error
    finally:
        changed = state.restore()
    if changed:
        raise Untraceable(f"changes the attribute '{changed[0]}'")
    return tracer.graph


class _StandIn(fx.Proxy):
    """A tensor, a number, or a type or device of tensors."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        tracer: Any = self.tracer
        if callable(getattr(tracer.value(self), name)):
            return lambda *args, **kwargs: tracer.create_proxy("call_method", name, (self, *args), kwargs)
        return tracer.create_proxy("call_function", getattr, (self, name), {})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _in_place(name: str) -> Callable[[_StandIn, Any], Any]:
    in_place, plain = getattr(operator, f"i{name}"), getattr(operator, f"__{name}__")

    def method(self: _StandIn, other: Any) -> Any:
        tracer: Any = self.tracer
        function = in_place if isinstance(tracer.value(self), Tensor) else plain
        return tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in _IN_PLACE:
    setattr(_StandIn, f"__i{_name}__", _in_place(_name))


class _ForwardTracer(fx.Tracer):
    """Records what a forward does to stand-ins, and computes their values at once."""

    def __init__(self, root: nn.Module, name: str) -> None:
        super().__init__()
        self.root = root
        self.graph = fx.Graph()
        self.is_running = False
        self._name = name
        self._modules = {module: path for path, module in root.named_modules()}
        self._read: dict[str, _StandIn] = {}
        self._setting = _setting()

    def arguments(self, forward: Callable[..., Any], call: RecordedCall) -> tuple[list[Any], dict[str, Any]]:
        """What the forward is to be given."""
        parameters = list(inspect.signature(forward).parameters.values())
        bound = inspect.signature(forward).bind(self.root, *call.args, **call.kwargs)
        bound.apply_defaults()
        kinds = {parameter.kind for parameter in parameters}
        if {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.KEYWORD_ONLY} <= kinds:
            raise Untraceable("takes any number of arguments, and others by keyword only")
        nodes = {parameter: self._placeholder(parameter, bound) for parameter in parameters[1:]}
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for parameter, node in nodes.items():
            given = self._presented(node)
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                args += given
            elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
                kwargs.update(given)
            elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                kwargs[parameter.name] = given
            else:
                args.append(given)
            if parameter.default is None and given is not None:
                self.create_proxy("call_function", operator.is_, (node, None), {})
        return args, kwargs

    def create_proxy(
        self,
        kind: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str | None = None,
        type_expr: Any | None = None,
        proxy_factory_fn: Any = None,
    ) -> Any:
        """Record an operation; returns what the forward is to go on with."""
        return self._presented(self._recorded(kind, target, args, kwargs, name))

    def _recorded(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None = None
    ) -> fx.Node:
        if _setting() != self._setting:
            raise Untraceable("computes under a gradient or autocast mode of its own")
        node = self.create_node(kind, target, self.create_arg(args), self.create_arg(kwargs), name)  # type: ignore[arg-type]
        with self._values():
            node.meta[VALUE] = self._computed(node)
        name, inputs = operation_name(node), node.all_input_nodes
        is_form = kind != "call_module" and (name in _FORM or name in CREATED)
        node.meta[FROM_INPUT] = not is_form and any(other.meta[FROM_INPUT] for other in inputs)
        node.meta[_DEPENDS] = "" if is_form else max((_dependence(other) for other in inputs), default="")
        return node

    def create_arg(self, a: Any) -> Any:
        """An argument as the graph holds it."""
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, fx.Node):
            return a
        if isinstance(a, Tensor):
            return self._attribute(self._path_of(a)).node
        if isinstance(a, nn.Module):
            raise Untraceable(f"hands a {type(a).__name__} to a function")
        if isinstance(a, OrderedDict):
            return self._recorded("call_function", OrderedDict, (list(a.items()),), {})
        if hasattr(a, "_make"):  # a named tuple
            return self._recorded("call_function", type(a), tuple(a), {})
        return super().create_arg(a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The outcome of `if obj:`, where it is known to be the same for any input of this form."""
        if isinstance(self.value(obj), Tensor) or obj.node.meta[_DEPENDS]:
            raise Untraceable(f"depends on {_dependence(obj.node)}")
        return self.create_proxy("call_function", bool, (obj,), {})

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """`for row in tensor`: how often, only the tensor knows."""
        raise Untraceable("loops over the rows of a tensor")

    def called(self, module: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A call of a child, recorded; what is made by the way and has no state is traced through."""
        if module in self._modules and module is not self.root:
            return self.create_proxy("call_module", self._modules[module], args, kwargs)
        if any(True for _ in (*module.parameters(), *module.buffers())):
            raise Untraceable(f"calls a {type(module).__name__} that is not among its children")
        return call(module, *args, **kwargs)

    def read(self, module: nn.Module, name: str, value: Tensor) -> Any:
        """A parameter or buffer."""
        if module not in self._modules:
            return value
        return self._attribute(f"{self._modules[module]}.{name}".lstrip("."))

    def mode(self, module: nn.Module) -> Any:
        """`training`, of which the course may not depend, but dropout may."""
        if module not in self._modules:
            return vars(module)["training"]
        return self._attribute(f"{self._modules[module]}.training".lstrip("."), _ON_MODE)

    def value(self, stand_in: fx.Proxy) -> Any:
        """The value of a stand-in."""
        return stand_in.node.meta[VALUE]

    def call_function(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A function that is not PyTorch's, on numbers."""
        return self.create_proxy("call_function", function, args, kwargs)

    def _placeholder(self, parameter: inspect.Parameter, bound: inspect.BoundArguments) -> fx.Node:
        stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        default = () if parameter.default is parameter.empty else (parameter.default,)
        if default and not isinstance(default[0], (bool, int, float, str, type(None))):
            raise Untraceable(f"has a default for '{parameter.name}' that is not a plain value")
        node = self.create_node("placeholder", stars.get(parameter.kind, "") + parameter.name, default, {})
        node.meta.update({VALUE: bound.arguments[parameter.name], FROM_INPUT: True, _DEPENDS: ""})
        return node

    def _attribute(self, path: str, depends: str = "") -> _StandIn:
        if path not in self._read:
            node = self.create_node("get_attr", path, (), {})
            with self._values():
                node.meta[VALUE] = operator.attrgetter(path)(self.root)
            node.meta.update({FROM_INPUT: False, _DEPENDS: depends})
            self._read[path] = _StandIn(node, self)
        return self._read[path]

    def _path_of(self, tensor: Tensor) -> str:
        for module, path in self._modules.items():
            for held in (module._parameters, module._buffers, vars(module)):
                for name, value in held.items():
                    if value is tensor:
                        return f"{path}.{name}".lstrip(".")
        raise Untraceable("computes with a tensor that is made in it or is no attribute of a module")

    @contextmanager
    def _values(self) -> Iterator[None]:
        self.is_running = True
        try:
            yield
        finally:
            self.is_running = False

    def _computed(self, node: fx.Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda other: other.meta[VALUE])
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _presented(self, node: fx.Node) -> Any:
        """The result of an operation as the forward is to see it."""
        value = node.meta[VALUE]
        if isinstance(value, (Tensor, *_OPAQUE)):
            return _StandIn(node, self)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return _StandIn(node, self)
        if value is None:
            if node.op in ("placeholder", "call_module") or node.target is operator.getitem:
                self._check(node, None)
            return None
        if isinstance(value, (bool, str)):
            if node.meta[_DEPENDS]:
                raise Untraceable(f"depends on {node.meta[_DEPENDS]}")
            self._check(node, value)
            return value
        if type(value) in (dict, OrderedDict):
            self._check(self._known(list, node, list(value)), list(value))
            return type(value)((key, self._item(node, key)) for key in value)
        if isinstance(value, (tuple, list)):
            self._check(self._known(len, node, len(value)), len(value))
            items = [self._item(node, index) for index in range(len(value))]
            return _container_like(value, items)
        raise Untraceable(f"works with a {type(value).__name__}")

    def _item(self, node: fx.Node, key: Any) -> Any:
        return self.create_proxy("call_function", operator.getitem, (node, key), {})

    def _known(self, function: Callable[..., Any], node: fx.Node, value: Any) -> fx.Node:
        result = self.create_node("call_function", function, (node,), {})
        result.meta.update({VALUE: value, FROM_INPUT: False, _DEPENDS: ""})
        return result

    def _check(self, node: fx.Node, expected: Any) -> None:
        check = self.create_node("call_function", as_traced, (node, expected, self._name), {})
        check.meta.update({VALUE: None, FROM_INPUT: False, _DEPENDS: ""})


def _dependence(node: fx.Node) -> str:
    return _ON_VALUES if isinstance(node.meta[VALUE], Tensor) else node.meta[_DEPENDS]


def _container_like(value: Any, items: list[Any]) -> Any:
    if type(value) is list:
        return items
    if type(value) in (tuple, torch.Size):
        return tuple(items)
    if hasattr(value, "_make"):
        return value._make(items)
    if hasattr(value, "n_sequence_fields"):  # as torch.max gives: values and indices
        return type(value)(items)
    raise Untraceable(f"works with a {type(value).__name__}")


def _setting() -> tuple[bool, ...]:
    """What decides how operations are computed besides their arguments."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


class _State:
    """The attributes of a module and what the lists and dicts among them hold."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = dict(vars(module))
        self._held = {
            name: value.copy()
            for name, value in self._attributes.items()
            if isinstance(value, (list, dict, set))
        }

    def restore(self) -> list[str]:
        """Put everything back; returns the names of the attributes that had changed."""
        now, before = vars(self._module), self._attributes
        changed = [name for name in {**before, **now} if now.get(name, self) is not before.get(name, self)]
        for name in changed:
            now.pop(name, None)
        now.update(before)
        for name, held in self._held.items():
            container = before[name]
            if len(container) != len(held) or any(
                one is not other for one, other in zip(_flat(container), _flat(held), strict=True)
            ):
                changed.append(name)
                container.clear()
                container.extend(held) if isinstance(container, list) else container.update(held)
        return changed


def _flat(container: Any) -> list[Any]:
    return [*container, *container.values()] if isinstance(container, dict) else list(container)
