"""How long an integer model takes next to the same model in floating point, and what holds it up.

Knows nothing about data: the input is random.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from distiller.errors import DistillerError, first_line
from distiller.export.cpu_facts import CpuFacts, cpu_facts
from distiller.export.latency import Latency, measure_latencies
from distiller.export.onnx_parity import open_session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_TINY_S = 1e-3
_TO_INTEGERS = ("QLinear", "QGemm", "QuantizeLinear", "DynamicQuantize", "ConvInteger")
_TO_REALS = ("DequantizeLinear", "MatMulIntegerToFloat")
_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")
_MOVING = frozenset(
    ["Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Shape", "Slice", "Split"]
)
_ALSO_MOVING = frozenset(["Squeeze", "Transpose", "Unsqueeze", "ReorderInput", "ReorderOutput"])
_LAYERS = ("QLinearConv", "QGemm", "QLinearMatMul")
_FROM_BATCHES = (
    "; a trained model's tensors get one from batches that its export is given, and quantize_activations "
    "where training quantized only weights"
)
_WEIGHT, _WEIGHT_ZERO_POINT = 3, 5  # among their inputs


@dataclass(frozen=True, slots=True)
class OptimizedGraph:
    """What onnxruntime makes of an integer model before it runs it.

    Attributes:
        kernels: nodes by their kind.
        in_float: of these, those that compute in floating point.
        clips: Clips of integers: grids that are smaller than their 8 bits.
        weights_off_zero: layers whose weights have zero points other than 0.
    """

    kernels: Mapping[str, int]
    in_float: Mapping[str, int]
    clips: int
    weights_off_zero: int


@dataclass(frozen=True, slots=True)
class IntegerLatency:
    """Wall times of one model in three forms, measured in turns.

    Attributes:
        float_onnx: onnxruntime, in floating point.
        int8_onnx: onnxruntime, in integers.
        torch_float: PyTorch, in floating point.
        cpu: the processor.
        graph: what onnxruntime made of the integer model.
        can_get_grids: whether its tensors without a grid would get one from batches given to its export.
    """

    float_onnx: Latency
    int8_onnx: Latency
    torch_float: Latency
    cpu: CpuFacts
    graph: OptimizedGraph
    can_get_grids: bool = False

    @property
    def speedup(self) -> float:
        """Time of floating point over time of integers, both in onnxruntime."""
        return self.float_onnx.median_s / self.int8_onnx.median_s

    def reasons(self) -> list[str]:
        """What keeps the integer model from being faster, most weighty first; empty if nothing is known."""
        found, graph = [], self.graph
        if self.cpu.dot_products == ():
            found.append(
                "the processor has no instructions for sums of 8-bit products (VNNI, AMX, ARM dot product)"
            )
        elif self.cpu.dot_products is None:
            found.append("whether the processor has instructions for sums of 8-bit products is not known")
        if graph.in_float:
            nodes = ", ".join(f"{count} {kind}" for kind, count in sorted(graph.in_float.items()))
            found.append(
                f"onnxruntime computes in floating point: {nodes} (it has no kernel of integers for them, or "
                f"what they read or make is on no grid{_FROM_BATCHES if self.can_get_grids else ''})"
            )
        conversions = sum(graph.kernels.get(kind, 0) for kind in _CONVERSIONS)
        if conversions > 2:
            found.append(f"{conversions} conversions between integers and real numbers are left")
        if graph.weights_off_zero:
            found.append(
                f"the weights of {graph.weights_off_zero} layers have zero points (a symmetric mode has none)"
            )
        if graph.clips:
            found.append(
                f"{graph.clips} outputs are clipped, their grids do not fill 8 bits (so with a ReLU in a "
                "symmetric mode)"
            )
        if self.float_onnx.median_s < _TINY_S:
            found.append(
                f"the model is so small ({1e3 * self.float_onnx.median_s:.2g} ms in fp32) that starting an "
                "operation weighs as much as its arithmetic"
            )
        return found

    def verdict(self) -> str:
        """One sentence: how much faster integers are here; where they are not, why."""
        setting = f"batch {self.int8_onnx.batch_size}, threads: {self.int8_onnx.threads}, {self.cpu}"
        if self.speedup > 1:
            return f"int8 is {self.speedup:.2f} times as fast as fp32 in onnxruntime ({setting})"
        why = "; ".join(self.reasons()) or "nothing in its graph says why"
        return f"int8 is not faster than fp32 in onnxruntime, {self.speedup:.2f} times ({setting}): {why}"


def integer_latency(
    model: nn.Module,
    float_onnx: str | Path | bytes,
    int8_onnx: str | Path | bytes,
    input_shape: Sequence[int],
    batch_size: int = 1,
    *,
    threads: int = 1,
    can_get_grids: bool = False,
    warmup: int = 2,
    min_time: float = 0.5,
    max_repeats: int = 1000,
) -> IntegerLatency:
    """Time forward passes of three forms of a model on the CPU, in turns, as `measure_latencies` does.

    Args:
        model: in floating point, on the CPU; takes one tensor.
        float_onnx: what `export_onnx` wrote from it, or the content.
        int8_onnx: what `export_int8_onnx` wrote from it after quantization, or the content.
        input_shape: of one image, without the batch: (channels, height, width).
        batch_size: images in a pass.
        threads: that each of the three uses within an operation; torch's own setting is put back.
        can_get_grids: of a trained model that was exported without batches, or with weights alone quantized
            and without `quantize_activations`: this is named where tensors are on no grid.
        warmup: as in `measure_latencies`, and so are the arguments below.
        min_time: seconds for each form.
        max_repeats: passes of each form at most.

    Raises:
        DistillerError: onnxruntime cannot read or run a file.
    """
    forms = [_InOnnxruntime(source, threads) for source in (float_onnx, int8_onnx)]
    with _torch_threads(threads):
        float_time, int8_time, torch_time = measure_latencies(
            [*forms, model],
            input_shape,
            batch_size,
            warmup=warmup,
            min_time=min_time,
            max_repeats=max_repeats,
        )
    graph = optimized_graph(int8_onnx)
    return IntegerLatency(float_time, int8_time, torch_time, cpu_facts(), graph, can_get_grids)


def optimized_graph(source: str | Path | bytes) -> OptimizedGraph:
    """What onnxruntime makes of a model in QDQ form on this machine's CPU.

    Raises:
        DistillerError: onnxruntime cannot read it.
    """
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "optimized.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = file
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        try:
            onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise DistillerError(f"ONNX model: onnxruntime cannot read it: {first_line(error)}") from error
        return _read(onnx.load(file).graph)


class _InOnnxruntime(nn.Module):
    """A file as a module, to take turns with others."""

    def __init__(self, source: str | Path | bytes, threads: int) -> None:
        super().__init__()
        self._session: InferenceSession = open_session(source, threads)
        self._input = self._session.get_inputs()[0].name

    def forward(self, x: Tensor) -> object:
        try:
            return self._session.run(None, {self._input: x.numpy()})
        except Exception as error:
            raise DistillerError(f"ONNX model: onnxruntime cannot run it: {first_line(error)}") from error


def _read(graph: onnx.GraphProto) -> OptimizedGraph:
    constants = {tensor.name: tensor for tensor in graph.initializer}
    integers = {name for name, tensor in constants.items() if tensor.data_type != onnx.TensorProto.FLOAT}
    in_float: Counter[str] = Counter()
    clips = weights_off_zero = 0
    for node in graph.node:
        if node.op_type.startswith(_TO_INTEGERS) or (
            node.op_type not in _TO_REALS and node.input and node.input[0] in integers
        ):
            integers.update(node.output)
            clips += node.op_type == "Clip"
        elif node.op_type not in _MOVING | _ALSO_MOVING | set(_TO_REALS):
            in_float[node.op_type] += 1
        if node.op_type in _LAYERS and node.input[_WEIGHT] in constants:
            zero_points = constants.get(node.input[_WEIGHT_ZERO_POINT])
            weights_off_zero += zero_points is not None and bool(np.any(numpy_helper.to_array(zero_points)))
    kernels = Counter(node.op_type for node in graph.node)
    return OptimizedGraph(dict(kernels), dict(in_float), clips, weights_off_zero)


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
