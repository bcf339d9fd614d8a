"""What onnxruntime fuses of an integer model, beside what it computes without fusing anything."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from distiller.export.integer_latency import optimized_graph
from distiller.export.integer_parity import compare_integer
from distiller.export.integer_view import Grid
from distiller.export.onnx_parity import open_session
from distiller.export.qdq_export import int8_onnx_bytes
from distiller.functional_modules import to_modules
from tests.export.quantized_nets import images, quantized
from tests.export.test_qdq_rewrite import rewritten

FUSED = {
    "Sigmoid (q)": "QLinearSigmoid",
    "LeakyRelu <alpha = 0.1> (q)": "QLinearLeakyRelu",
    "GlobalAveragePool (q)": "QLinearGlobalAveragePool",
    "AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (q)": "QLinearAveragePool",
    "Concat <axis = 1> (q, r)": "QLinearConcat",
    "Where (c, q, r)": "QLinearWhere",
    "Mul (q, r)": "QLinearMul",
    "Add (q, r)": "QLinearAdd",
    "MatMul (q, r)": "QLinearMatMul",
    "Softmax <axis = 1> (q)": None,  # its sums overflow where a step of its result is below about 1/256
    "LogSoftmax <axis = 1> (q)": None,
    "Tanh (q)": None,
    "ReduceMean (q, i)": None,
    "Max (q, r)": None,
    "Sub (q, r)": None,
}


def fitting(values: np.ndarray, is_symmetric: bool, share: float) -> Grid:
    """The grid over a share of the range of values."""
    lo, hi = (share * float(end) for end in (min(values.min(), 0), max(values.max(), 0)))
    if is_symmetric:
        return Grid(max(-lo, hi) / 127.5, 0, -128, 127)
    return Grid((hi - lo) / 255, round(-lo * 255 / (hi - lo)), 0, 255)


@pytest.mark.parametrize("is_symmetric", [False, True])
@pytest.mark.parametrize("operation,kernel", FUSED.items())
def test_what_onnxruntime_makes_of_an_operation_is_at_most_a_step_away(operation, kernel, is_symmetric):
    """QLinearSoftmax was up to 255 away."""
    x = np.random.default_rng(1).normal(0, 2, (2, 3, 6, 6)).astype(np.float32)
    y = (-0.3 * x[::-1, ::-1]).copy()
    grids = [fitting(x, is_symmetric, 1.0), fitting(y, is_symmetric, 1.0)]
    graph = f"""g (float[2, 3, 6, 6] x, float[2, 3, 6, 6] x2) => (float[a, b, c, d] y) {{
       i = Constant <value = int64[1] {{-1}}> ()
       q = distiller.Grid <index = 0> (x)
       r = distiller.Grid <index = 1> (x2)
       c = Greater (x, x2)
       o = {operation}
       y = %s
    }}"""
    feed = {"x": x, "x2": y}
    plain = onnxruntime.SessionOptions()
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL

    def unoptimized(proto: onnx.ModelProto) -> np.ndarray:
        return np.asarray(
            onnxruntime.InferenceSession(proto.SerializeToString(), plain).run(None, feed)[0]  # type: ignore[index]
        )

    values = unoptimized(rewritten(graph % "Identity (o)", grids))
    for share in (1.0, 0.5):
        grid = fitting(values, is_symmetric, share)
        proto = rewritten(graph % "distiller.Grid <index = 2> (o)", [*grids, grid])
        content = proto.SerializeToString()
        found = np.asarray(open_session(content, 1).run(None, feed)[0])
        assert np.abs(found - unoptimized(proto)).max() <= 1.01 * grid.scale
        fused = [kind for kind in optimized_graph(content).kernels if kind.startswith("QLinear")]
        assert fused == ([] if kernel is None else [kernel])


class Attention(nn.Module):
    """One head over four by four tokens, whose softmax gives small numbers, and a gate."""

    input_shape = (1, 1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(1, 8, 3, padding=1), nn.AvgPool2d(2)
        self.q, self.k, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 5)

    def forward(self, x):
        tokens = self.attention(x)[1]
        return self.fc(torch.cat([tokens.mean(1), torch.nn.functional.leaky_relu(tokens)[:, 0]], 1))

    def attention(self, x):
        x = self.pool(self.conv(x))
        x = (torch.sigmoid(x) * x).flatten(2).transpose(1, 2)
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(1, 2) / 3, -1)
        return weights, weights @ x


class Weights(Attention):
    """What the softmax gives."""

    def forward(self, x):
        return self.attention(x)[0]


def attending(model: nn.Module, mode: str) -> nn.Module:
    to_modules(model.eval(), images(model, 1))  # so that every operation has a grid
    return quantized(model, mode=mode, per_channel_wts=True)


@pytest.mark.parametrize("mode", ["ASYMMETRIC_UNSIGNED", "SYMMETRIC"])
@pytest.mark.filterwarnings("ignore:not quantized, since the model does not call them")
def test_onnxruntimes_softmax_of_integers_is_not_let_in(mode):
    """Its sums overflow where a step of its result is below about 1/256: most were 0."""
    model = attending(Weights(), mode)
    x = images(model, 16)
    content = int8_onnx_bytes(model, x[:1])
    parity = compare_integer(model, content, [x], threads=1)
    assert parity.output_scale is not None
    assert parity.output_scale < 1 / 400
    assert parity.max_steps is not None
    assert parity.max_steps < 1.01
    assert "QLinearSoftmax" not in optimized_graph(content).kernels


@pytest.mark.parametrize("mode", ["ASYMMETRIC_UNSIGNED", "SYMMETRIC"])
def test_a_network_with_attention_agrees_with_the_simulation(mode):
    model = attending(Attention(), mode)
    x = images(model, 64)
    parity = compare_integer(model, int8_onnx_bytes(model, x[:1]), [x], threads=1)
    assert parity.max_steps is not None
    assert parity.max_steps < 3.01
    assert parity.agreement >= 0.98
