"""What the latency benchmark asks for and says, on figures made up."""

from __future__ import annotations

import onnx
import torch
from torch import nn

from benchmarks import int8_latency
from distiller.export.cpu_facts import CpuFacts
from distiller.export.integer_latency import IntegerLatency, OptimizedGraph, optimized_graph
from distiller.export.latency import Latency

VNNI, OLD = CpuFacts("New", ("AVX512-VNNI",)), CpuFacts("Old", ())
FINE = OptimizedGraph({"QLinearConv": 3, "QuantizeLinear": 1, "DequantizeLinear": 1}, {}, 0, 0)


def measured(float_ms: float, int8_ms: float, cpu: CpuFacts = VNNI) -> IntegerLatency:
    a, b, c = (Latency(milliseconds / 1e3, 0, 1, 5, 1, 1, "cpu") for milliseconds in (float_ms, int8_ms, 40))
    return IntegerLatency(a, b, c, cpu, FINE)


def test_resnets_have_a_bar_at_batch_1_on_processors_that_multiply_integers():
    assert int8_latency.bar_of("resnet50", 1, VNNI) == 2.5
    cases = [("resnet50", 8, VNNI), ("mobilenet_v2", 1, VNNI), ("resnet18", 1, OLD)]
    cases.append(("resnet18", 1, CpuFacts("Unknown", None)))
    assert [int8_latency.bar_of(*case) for case in cases] == [None] * 4


def test_what_is_not_faster_or_misses_its_bar_is_explained():
    line = "  batch 1: onnxruntime fp32 30.00 ms, int8 10.00 ms, 3.00x as fast; PyTorch fp32 40.00 ms"
    assert int8_latency.lines(measured(30, 10), 2.5) == [line]
    assert int8_latency.lines(measured(30, 20), None)[1:] == []
    assert int8_latency.lines(measured(30, 20), 2.5)[1:] == [
        "    why: nothing in its graph; is the machine busy?"
    ]
    assert int8_latency.lines(measured(30, 31, OLD), None)[1:] == [
        "    why: the processor has no instructions for sums of 8-bit products (VNNI, AMX, ARM dot product)"
    ]


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))

    def forward(self, x):
        x = self[1](self[0](x))
        return (x + self[2](x)).mean((2, 3))


def test_all_of_the_integer_form_is_integers(monkeypatch):
    monkeypatch.setattr(int8_latency, "create_model", lambda *args, **settings: Small())
    model, in_float, in_integers = int8_latency.three_forms("small", 8)
    assert optimized_graph(in_integers).in_float == {}
    assert "Conv" in {node.op_type for node in onnx.load_from_string(in_float).graph.node}
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 8)
