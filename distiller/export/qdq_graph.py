"""An ONNX graph that is being rewritten: constants by value, kinds of nodes, and what is left over goes.

Knows nothing about quantization.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

_DIGITS = "abcdefghijklmnopqrstuvwxyz"
_WINDOWS = ("Conv", "ConvTranspose", "MaxPool", "AveragePool")
_WINDOW_DEFAULTS = {"dilations": 1, "strides": 1, "pads": 0}  # along each axis; they are in no schema


class GraphWriter:
    """The nodes of a graph, written anew one after the other in an order that can be run.

    Args:
        proto: the model; `finish` changes it.

    Attributes:
        nodes: those written.
        readers: the nodes of the original graph that read a tensor, by its name.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        graph = proto.graph
        self._proto = proto
        self.nodes: list[NodeProto] = []
        self.readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self._ranks = {
            value.name: len(value.type.tensor_type.shape.dim)
            for value in (*graph.value_info, *graph.input, *graph.output)
            if value.type.tensor_type.HasField("shape")
        }
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._constants: dict[tuple[Any, ...], str] = {}
        self._makers: dict[str, NodeProto] = {}
        self._fresh = (f"new_{i}" for i in count())

    def constant(self, name: str) -> NDArray[Any] | None:
        """The values of a constant, None if the tensor is none."""
        made_by = self._makers.get(name)
        if made_by is not None and made_by.op_type == "Constant":
            tensor = attribute(made_by, "value")
        else:
            tensor = self._tensors.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def add_constant(self, values: NDArray[Any]) -> str:
        """The name of a constant with these values, of this type and shape; one for all that are equal."""
        values = np.asarray(values, order="C")
        key = (values.dtype.str, values.shape, values.tobytes())
        if key not in self._constants:
            name = next(self._fresh)
            self._tensors[name] = numpy_helper.from_array(values, name)
            self._constants[key] = name
        return self._constants[key]

    def add(
        self,
        op: str,
        inputs: Sequence[str],
        output: str | None = None,
        name: str = "",
        attributes: Mapping[str, Any] | None = None,
    ) -> str:
        """Write a node with one output; its name, made up if none is given."""
        output = output or next(self._fresh)
        self.keep(helper.make_node(op, list(inputs), [output], name=name or None, **(attributes or {})))
        return output

    def keep(self, node: NodeProto) -> None:
        """Write a node as it is."""
        self.nodes.append(node)
        self._makers.update(dict.fromkeys(node.output, node))

    def maker(self, name: str) -> NodeProto | None:
        """The written node with this output."""
        return self._makers.get(name)

    def rank(self, name: str) -> int | None:
        """How many dimensions a tensor of the original graph has, None if unknown."""
        return self._ranks.get(name)

    def finish(self) -> onnx.ModelProto:
        """The model with these nodes, without what nothing reads, names short, notes and defaults left out.

        Inputs and outputs keep their names.
        """
        graph = self._proto.graph
        outputs = [value.name for value in graph.output]
        nodes = _needed(self.nodes, outputs)
        used = {name for node in nodes for name in node.input} | set(outputs)
        names = _short_names(nodes, {value.name for value in graph.input} | set(outputs))
        tensors = []
        for name, tensor in self._tensors.items():
            if name in used:
                tensor.name = names.get(name, name)
                tensor.doc_string = ""
                del tensor.metadata_props[:]
                tensors.append(tensor)
        taken: set[str] = set()
        for node in nodes:
            node.name = "" if node.name in taken else node.name  # a layer that is called again
            taken.add(node.name)
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
            node.doc_string = ""
            del node.metadata_props[:]
            _leave_out_defaults(node)
        for field, items in (("node", nodes), ("initializer", tensors)):
            graph.ClearField(field)  # type: ignore[arg-type]
            getattr(graph, field).extend(items)
        graph.ClearField("value_info")
        domains = {node.domain for node in nodes}
        kept = [opset for opset in self._proto.opset_import if opset.domain in domains or not opset.domain]
        self._proto.ClearField("opset_import")
        self._proto.opset_import.extend(kept)
        return self._proto


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute."""
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _needed(nodes: Iterable[NodeProto], outputs: Iterable[str]) -> list[NodeProto]:
    needed, kept = set(outputs), []
    for node in reversed(list(nodes)):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]


def _leave_out_defaults(node: NodeProto) -> None:
    """Take attributes off a node that say what holds without them."""
    if not onnx.defs.has(node.op_type, node.domain):
        return
    known = onnx.defs.get_schema(node.op_type, node.domain).attributes
    for item in list(node.attribute):
        value = helper.get_attribute_value(item)
        default = known[item.name].default_value if item.name in known else None
        says = default is not None and default.type and helper.get_attribute_value(default) == value
        steps = _WINDOW_DEFAULTS.get(item.name) if node.op_type in _WINDOWS else None
        if says or (steps is not None and all(step == steps for step in value)):
            node.attribute.remove(item)


def _short_names(nodes: Sequence[NodeProto], fixed: set[str]) -> dict[str, str]:
    """A name of a few letters for every tensor, in the order of use."""
    tensors = dict.fromkeys(name for node in nodes for name in (*node.input, *node.output))
    letters = (name for i in count() if (name := _letters(i)) not in fixed)
    return {name: next(letters) for name in tensors if name and name not in fixed}


def _letters(number: int) -> str:
    name = ""
    while True:
        number, digit = divmod(number, len(_DIGITS))
        name = _DIGITS[digit] + name
        if number == 0:
            return name
        number -= 1
