"""From an exported graph with marks to one of QuantizeLinear, DequantizeLinear and ordinary operators.

What is between a DequantizeLinear and a QuantizeLinear a runtime can compute in integers. So grids are
carried over operations that only move values or choose among them, biases become int32 at the
accumulator's scale, and clipping is done by the integers' own ends or on integers.
Knows nothing about models in PyTorch.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto

from distiller.export.integer_view import Grid
from distiller.export.qdq_graph import GraphWriter, attribute
from distiller.export.qdq_marks import DOMAIN, GRID, INDEX, Marks

# Their outputs' elements are elements of their first input; padding of a pooling never wins.
_VALUES_MOVED = frozenset(
    [
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "MaxPool",
        "Reshape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    ]
)
_RESHAPING = frozenset(["Flatten", "Reshape", "Squeeze"])
_LAYERS = frozenset(["Conv", "ConvTranspose", "Gemm", "MatMul"])
_WITHOUT_OUTPUT_GRID = frozenset(["Gemm", "MatMul"])  # run in integers also if their output stays real
_FLOAT = int(onnx.TensorProto.FLOAT)
_UINT8_MAX = 255
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class _Stream:
    """A tensor on a grid: the tensor of its integers (uint8), the grid, and the ends that occur."""

    integers: str
    grid: Grid
    lo: int
    hi: int


@dataclass(frozen=True, slots=True)
class _Weight:
    """A weight as it is read, perhaps transposed."""

    name: str
    values: NDArray[np.int8]
    scale: NDArray[np.float32]
    zero_point: NDArray[np.int8]
    axis: int | None


def with_integers(
    proto: onnx.ModelProto, marks: Marks
) -> tuple[onnx.ModelProto, dict[str, NDArray[np.float32]]]:
    """The model in QDQ form.

    Args:
        proto: exported from a model with marks; it is changed.
        marks: what its marks stand for.

    Returns:
        The model; and by layer the real values of the biases that were rounded to integers, without those
        of layers that have several (since they are called on inputs of several scales).
    """
    rewriter = _Rewriter(GraphWriter(proto), marks)
    for node in proto.graph.node:
        rewriter.rewrite(node)
    biases = {name: found[0] for name, found in rewriter.biases.items() if len(found) == 1}
    return rewriter.graph.finish(), biases


class _Rewriter:
    def __init__(self, graph: GraphWriter, marks: Marks) -> None:
        self.graph = graph
        self.biases: dict[str, list[NDArray[np.float32]]] = {}
        self._marks = marks
        self._streams: dict[str, _Stream] = {}
        self._quantized: dict[tuple[str, Grid], _Stream] = {}
        self._weights: dict[str, _Weight] = {}

    def rewrite(self, node: NodeProto) -> None:
        """Write what takes the node's place."""
        node.name = ""
        if node.domain == DOMAIN:
            mark = self._quantize if node.op_type == GRID else self._load_weight
            mark(node.input[0], node.output[0], attribute(node, INDEX))
            return
        first = node.input[0] if node.input else ""
        if first in self._weights and node.op_type == "Transpose":
            self._transpose_weight(node)
        elif first in self._weights and node.op_type == "Gather" and self._weights[first].axis is None:
            self._look_up(node)
        elif first in self._streams and node.op_type == "Relu":
            stream = self._streams[first]
            self._clip(stream, stream.grid.zero_point, stream.hi, node.output[0])
        elif first in self._streams and node.op_type in _VALUES_MOVED and _returns_values(node):
            self._move(node)
        elif first in self._streams and self._is_global_average(node):
            self._average(node)
        elif node.op_type in _LAYERS and self._has_constant_weight(node):
            self._compute(node)
        elif node.op_type == "Softmax":
            # onnxruntime's softmax of integers overflows where a step of its result is below about 1/256, and
            # is a step off elsewhere.
            node.input[0] = self._apart(first)
            self.graph.keep(node)
        else:
            self.graph.keep(node)

    def _quantize(self, x: str, output: str, index: int) -> None:
        """QuantizeLinear, perhaps Clip, DequantizeLinear; at most a Clip where x has this scale already."""
        grid = self._marks.grids[index].unsigned
        if x in self._streams and self._streams[x].grid.scale == grid.scale:
            offset = self._streams[x].grid.zero_point - grid.zero_point
            self._clip(self._streams[x], offset, offset + grid.qmax, output)
            return
        made_by = self.graph.maker(x)
        if made_by is not None and made_by.op_type in _RESHAPING:  # so that what is before it is quantized
            moved = copy.deepcopy(made_by)
            moved.input[0], moved.output[0] = f"{output}/before", output
            self._quantize(made_by.input[0], moved.input[0], index)
            self._move(moved)
            return
        if made_by is not None and made_by.op_type == "Relu" and grid.zero_point == 0:
            x = made_by.input[0]  # 0 is the smallest integer
        elif made_by is not None and (clipped := self._clipped(made_by, grid)) is not None:
            self._clip(*clipped, output)
            return
        if (x, grid) not in self._quantized:
            apart = self._unchanged(x) if x in self._streams else self._apart(x)
            integers = self.graph.add("QuantizeLinear", [apart, *self._grid_constants(grid)])
            self._quantized[x, grid] = _Stream(integers, grid, 0, _UINT8_MAX)
        self._clip(self._quantized[x, grid], 0, grid.qmax, output)

    def _unchanged(self, x: str) -> str:
        """x, which is on a grid, by an operation that runtimes compute by a table of the 256 integers.

        So onnxruntime goes from one grid to another in integers, and rounds twice (see `_apart`).
        """
        return self.graph.add("LeakyRelu", [x], attributes={"alpha": 1.0})

    def _apart(self, x: str) -> str:
        """x, but if it is on a grid no DequantizeLinear's output: the maximum with its smallest number.

        onnxruntime makes one rounding of two that follow each other, to a third grid (DoubleQDQPairsRemover),
        also where it drops a ReLU or Clip between them; and it rounds the weights of layers whose inputs are
        on grids by itself (WeightBiasQuantization).
        """
        before, made_by = x, self.graph.maker(x)
        while made_by is not None and made_by.op_type in ("Relu", "Clip"):
            before, made_by = made_by.input[0], self.graph.maker(made_by.input[0])
        stream = self._streams.get(before)
        if stream is None:
            return x
        lowest = (stream.lo - stream.grid.zero_point) * np.float32(stream.grid.scale)
        return self.graph.add("Max", [x, self.graph.add_constant(np.float32(lowest))])  # type: ignore[arg-type]

    def _clip(self, stream: _Stream, lo: int, hi: int, output: str) -> None:
        """`output` becomes the real numbers of the stream's integers, none below `lo` and above `hi`."""
        if lo <= stream.lo and hi >= stream.hi:
            self._dequantize(stream, output)
            return
        ends = [self._uint8(lo) if lo > stream.lo else "", self._uint8(hi) if hi < stream.hi else ""]
        integers = self.graph.add("Clip", [stream.integers, *ends] if ends[1] else [stream.integers, ends[0]])
        left = (min(max(end, lo), hi) for end in (stream.lo, stream.hi))
        self._dequantize(_Stream(integers, stream.grid, *left), output)

    def _dequantize(self, stream: _Stream, output: str) -> None:
        self.graph.add("DequantizeLinear", [stream.integers, *self._grid_constants(stream.grid)], output)
        self._streams[output] = stream

    def _clipped(self, clip: NodeProto, grid: Grid) -> tuple[_Stream, int, int] | None:
        """The integers that a Clip of a stream, quantized to its own scale again, comes down to."""
        stream = self._streams.get(clip.input[0]) if clip.op_type == "Clip" else None
        if stream is None or stream.grid.scale != grid.scale:
            return None
        found = [0, _UINT8_MAX]
        for i, name in enumerate(clip.input[1:]):
            value = self.graph.constant(name)
            if value is not None:
                found[i] = int(np.rint(np.float32(value) / np.float32(grid.scale))) + stream.grid.zero_point
            elif name:
                return None
        offset = stream.grid.zero_point - grid.zero_point
        lo, hi = (min(max(end, offset), offset + grid.qmax) for end in found)
        return stream, lo, hi

    def _move(self, node: NodeProto) -> None:
        """The node on real numbers, its outputs on the grid of its input."""
        stream = self._streams[node.input[0]]
        outputs = list(node.output)
        moved = [f"{name}/moved" for name in outputs]
        node.output[:] = moved
        self.graph.keep(node)
        constants = self._grid_constants(stream.grid)
        for before, output in zip(moved, outputs, strict=True):
            integers = self.graph.add("QuantizeLinear", [before, *constants])
            self._dequantize(dataclasses.replace(stream, integers=integers), output)

    def _load_weight(self, _x: str, output: str, index: int) -> None:
        layer = self._marks.weights[index]
        tensors = (layer.weight.numpy(), layer.scale.numpy(), layer.zero_point.numpy())
        self._put_weight(_Weight(layer.name, *tensors, layer.axis), output)

    def _put_weight(self, weight: _Weight, output: str) -> None:
        tensors = (weight.values, weight.scale, weight.zero_point)
        inputs = [self.graph.add_constant(values) for values in tensors]
        attributes = {} if weight.axis is None else {"axis": weight.axis}
        self.graph.add("DequantizeLinear", inputs, output, attributes=attributes)
        self._weights[output] = weight

    def _transpose_weight(self, node: NodeProto) -> None:
        weight = self._weights[node.input[0]]
        order = list(attribute(node, "perm", range(weight.values.ndim)[::-1]))
        axis = None if weight.axis is None else order.index(weight.axis)
        values = np.ascontiguousarray(weight.values.transpose(order))
        self._put_weight(dataclasses.replace(weight, values=values, axis=axis), node.output[0])

    def _look_up(self, node: NodeProto) -> None:
        """Rows of an embedding: found as integers, so that not all of them become real numbers each time."""
        made_by = self.graph.maker(node.input[0])
        assert made_by is not None
        node.input[0], constants = made_by.input[0], made_by.input[1:]
        output, node.output[0] = node.output[0], f"{node.output[0]}/rows"
        self.graph.keep(node)
        self.graph.add("DequantizeLinear", [node.output[0], *constants], output)

    def _has_constant_weight(self, node: NodeProto) -> bool:
        return node.input[1] in self._weights or self.graph.constant(node.input[1]) is not None

    def _compute(self, node: NodeProto) -> None:
        """A layer, in integers where runtimes can; it is called as in the model."""
        stream, weight = self._streams.get(node.input[0]), self._weights.get(node.input[1])
        is_quantized_next = self._is_quantized_next(node.output[0])
        has_kernel = node.op_type in _WITHOUT_OUTPUT_GRID or (node.op_type == "Conv" and is_quantized_next)
        if weight is not None:
            node.name = weight.name
        if stream is not None and weight is not None and has_kernel:
            if len(node.input) > 2:
                node.input[2] = self._bias(node.input[2], stream, weight)
        else:
            if stream is not None and is_quantized_next:
                node.input[0] = self._apart(node.input[0])
            if weight is not None:
                node.input[1] = self._in_reals(weight)
        self.graph.keep(node)

    def _in_reals(self, weight: _Weight) -> str:
        """A weight for a layer in floating point: computed once, when the file is loaded.

        (A DequantizeLinear is left to each run, onnxruntime takes it for part of an integer kernel.)
        """
        along = [-1 if i == weight.axis else 1 for i in range(weight.values.ndim)]
        tensor = self.graph.add("Cast", [self.graph.add_constant(weight.values)], attributes={"to": _FLOAT})
        if weight.zero_point.any():
            zero_point = weight.zero_point.astype(np.float32)
            zero_point = zero_point.reshape(along) if weight.axis is not None else zero_point
            tensor = self.graph.add("Sub", [tensor, self.graph.add_constant(zero_point)])
        scale = weight.scale.reshape(along) if weight.axis is not None else weight.scale
        return self.graph.add("Mul", [tensor, self.graph.add_constant(scale)])

    def _is_quantized_next(self, name: str) -> bool:
        """Whether the tensor gets a grid at once, so that a convolution can run in integers."""
        readers = self.graph.readers.get(name, [])
        return any(
            node.domain == DOMAIN
            or (node.op_type in ("Relu", "Clip") and self._is_quantized_next(node.output[0]))
            for node in readers
        )

    def _bias(self, name: str, stream: _Stream, weight: _Weight) -> str:
        """A constant bias as int32 at the accumulator's scale, if there is room beside the products."""
        bias = self.graph.constant(name)
        if bias is None or bias.dtype != np.float32:
            return name
        scale = np.asarray(np.float32(stream.grid.scale) * weight.scale)  # as the runtime multiplies them
        products = weight.values.size // bias.size * _UINT8_MAX**2
        room = max(_INT32_MAX - products, _INT32_MAX // 2)
        integers = np.rint(bias.astype(np.float64) / scale).clip(-room, room).astype(np.int32)
        self.biases.setdefault(weight.name, []).append(
            (integers * scale.astype(np.float64)).astype(np.float32)
        )
        inputs = [self.graph.add_constant(integers), self.graph.add_constant(scale)]
        return self.graph.add("DequantizeLinear", inputs, attributes={"axis": 0} if scale.ndim else {})

    def _average(self, mean: NodeProto) -> None:
        """A mean over everything behind the channels by the name that runtimes compute in integers."""
        if attribute(mean, "keepdims", 1):
            self.graph.add("GlobalAveragePool", [mean.input[0]], mean.output[0])
        else:
            average = self.graph.add("GlobalAveragePool", [mean.input[0]])
            self.graph.add("Flatten", [average], mean.output[0])

    def _is_global_average(self, node: NodeProto) -> bool:
        rank = self.graph.rank(node.input[0])
        if node.op_type != "ReduceMean" or rank is None:
            return False
        axes = self.graph.constant(node.input[1]) if len(node.input) > 1 else None
        found = attribute(node, "axes") if axes is None else axes.tolist()
        return rank > 2 and sorted(axis % rank for axis in found or ()) == list(range(2, rank))

    def _grid_constants(self, grid: Grid) -> tuple[str, str]:
        return self.graph.add_constant(np.float32(grid.scale)), self._uint8(grid.zero_point)  # type: ignore[arg-type]

    def _uint8(self, value: int) -> str:
        return self.graph.add_constant(np.array(value, np.uint8))


def _returns_values(node: NodeProto) -> bool:
    return node.op_type != "MaxPool" or len(node.output) == 1  # the other output are indices
