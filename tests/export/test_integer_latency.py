"""What is said of three forms of a model, and of graphs that onnxruntime has optimized."""

from __future__ import annotations

import dataclasses

import onnx.parser
import pytest
import torch
from torch import nn

from distiller.errors import DistillerError
from distiller.export.cpu_facts import CpuFacts
from distiller.export.integer_latency import IntegerLatency, OptimizedGraph, integer_latency, optimized_graph
from distiller.export.latency import Latency

FLOAT = """<ir_version: 10, opset_import: ["" : 18]>
g (float[n, 2, 4, 4] x) => (float[n, 2, 4, 4] y) { y = Relu (x) }"""
INT8 = """<ir_version: 10, opset_import: ["" : 18]>
g (float[n, 2, 4, 4] x) => (float[n, 2, 4, 4] y)
<float s = {0.1}, uint8 z = {0}, uint8 top = {127}, int8 wz = {ZERO},
 int8[2, 2, 1, 1] w = {1, 2, 3, 4}> {
   q = QuantizeLinear (x, s, z)
   d = DequantizeLinear (q, s, z)
   wd = DequantizeLinear (w, s, wz)
   c = Conv (d, wd)
   cq = QuantizeLinear (c, s, z)
   cc = Clip (cq, , top)
   e = DequantizeLinear (cc, s, z)
   ERF
   y = DequantizeLinear (q2, s, z)
}"""
STAYS_INTEGER = "e2 = MaxPool <kernel_shape = [1, 1]> (e) q2 = QuantizeLinear (e2, s, z)"
FLOAT_BETWEEN = "e2 = Erf (e) q2 = QuantizeLinear (e2, s, z)"


def content(text: str, zero: str = "0", between: str = STAYS_INTEGER) -> bytes:
    return onnx.parser.parse_model(text.replace("ZERO", zero).replace("ERF", between)).SerializeToString()


def latency(milliseconds: float) -> Latency:
    return Latency(milliseconds / 1e3, 0, 1, 5, 1, 2, "cpu")


def measured(float_ms: float, int8_ms: float, cpu: CpuFacts, graph: OptimizedGraph) -> IntegerLatency:
    return IntegerLatency(latency(float_ms), latency(int8_ms), latency(9), cpu, graph)


FINE = OptimizedGraph({"QLinearConv": 3, "QuantizeLinear": 1, "DequantizeLinear": 1}, {}, 0, 0)
VNNI = CpuFacts("Some CPU", ("AVX512-VNNI",))


def test_a_graph_of_integers_has_nothing_in_floating_point():
    graph = optimized_graph(content(INT8))
    assert graph.kernels["QLinearConv"] == 1
    assert graph.in_float == {}
    assert (graph.clips, graph.weights_off_zero) == (1, 0)


def test_what_onnxruntime_computes_in_floating_point_is_counted(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(content(INT8, zero="3", between=FLOAT_BETWEEN))
    graph = optimized_graph(path)
    assert graph.in_float == {"Erf": 1}
    assert (graph.clips, graph.weights_off_zero) == (1, 1)
    assert graph.kernels["DequantizeLinear"] == 2
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_three_forms_are_measured_with_the_threads_asked_for():
    before = torch.get_num_threads()
    found = integer_latency(
        nn.ReLU(), content(FLOAT), content(INT8), (2, 4, 4), 3, threads=2, warmup=0, min_time=0.0
    )
    for time in (found.float_onnx, found.int8_onnx, found.torch_float):
        assert time.median_s > 0
        assert (time.repeats, time.batch_size, time.threads, time.device) == (1, 3, 2, "cpu")
    assert torch.get_num_threads() == before
    assert found.speedup == found.float_onnx.median_s / found.int8_onnx.median_s
    assert found.graph.kernels["QLinearConv"] == 1
    assert found.cpu.name


def test_the_verdict_is_one_sentence():
    assert measured(12.0, 4.0, VNNI, FINE).verdict() == (
        "int8 is 3.00 times as fast as fp32 in onnxruntime (batch 1, threads: 2, Some CPU (AVX512-VNNI))"
    )
    graph = OptimizedGraph({"DequantizeLinear": 9, "QuantizeLinear": 4}, {"Conv": 2, "Add": 1}, 5, 7)
    assert measured(0.5, 1.0, CpuFacts("Old", ()), graph).verdict() == (
        "int8 is not faster than fp32 in onnxruntime, 0.50 times (batch 1, threads: 2, Old (no VNNI, AMX or "
        "ARM dot product)): the processor has no instructions for sums of 8-bit products (VNNI, AMX, ARM dot "
        "product); onnxruntime computes in floating point: 1 Add, 2 Conv (it has no kernel of integers "
        "for them, or what they read or make is on no grid); 13 conversions "
        "between integers and real numbers are left; the weights of 7 layers have zero points (a symmetric mode has none); 5 "
        "outputs are clipped, their grids do not fill 8 bits (so with a ReLU in a symmetric mode); the model "
        "is so small (0.5 ms in fp32) that starting an operation weighs as much as its arithmetic"
    )


def test_batches_are_advised_only_where_they_help():
    """They were also for models that were quantized after training, whose export does not look at them."""
    graph = OptimizedGraph({}, {"Conv": 2}, 0, 0)
    plain = measured(5, 6, VNNI, graph)
    told = "onnxruntime computes in floating point: 2 Conv (it has no kernel of integers for them, or what they read or make is on no grid"
    assert plain.reasons() == [f"{told})"]
    assert dataclasses.replace(plain, can_get_grids=True).reasons() == [
        f"{told}; a trained model's tensors get one from batches that its export is given, and "
        "quantize_activations where training quantized only weights)"
    ]


def test_where_nothing_is_known_that_is_said():
    assert measured(5, 6, VNNI, FINE).verdict().endswith(": nothing in its graph says why")
    unknown = measured(5, 6, CpuFacts("M", None), FINE).reasons()
    assert unknown == ["whether the processor has instructions for sums of 8-bit products is not known"]
    assert measured(5, 1, VNNI, FINE).reasons() == []


def test_files_that_cannot_be_read_or_run_are_told():
    with pytest.raises(DistillerError, match=r"^ONNX model: onnxruntime cannot read it: "):
        optimized_graph(b"nothing")
    with pytest.raises(DistillerError, match=r"^ONNX model: onnxruntime cannot run it: "):
        integer_latency(nn.ReLU(), content(FLOAT), content(INT8), (3, 4, 4), min_time=0.0)
