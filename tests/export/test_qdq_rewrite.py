"""Marked graphs, written down by hand, after integers took the marks' places."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx.parser
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from distiller.export.integer_latency import optimized_graph
from distiller.export.integer_view import Grid, IntegerLayer
from distiller.export.onnx_parity import open_session
from distiller.export.qdq_marks import Marks
from distiller.export.qdq_rewrite import with_integers

HEAD = '<ir_version: 10, opset_import: ["" : 18, "distiller" : 1]>\n'
UNSIGNED = Grid(0.25, 0, 0, 255)
SIGNED = Grid(0.25, 0, -128, 127)
RELU = Grid(0.25, 0, 0, 127)
X = np.random.default_rng(0).normal(0, 40, (2, 3, 6, 6)).astype(np.float32)


def rewritten(graph: str, grids: list[Grid], weights: list[IntegerLayer] | None = None) -> onnx.ModelProto:
    proto, _ = with_integers(onnx.parser.parse_model(HEAD + graph), Marks(grids, weights or []))
    onnx.checker.check_model(proto, full_check=True)
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 18)]
    return proto


def kinds(proto: onnx.ModelProto) -> str:
    short = {"QuantizeLinear": "Q", "DequantizeLinear": "DQ"}
    return " ".join(short.get(node.op_type, node.op_type) for node in proto.graph.node)


def run(proto: onnx.ModelProto, x: np.ndarray = X) -> np.ndarray:
    later = onnx.ModelProto()
    later.CopyFrom(proto)
    later.opset_import[0].version = 19  # the first that the reference computes; the operators are the same
    return np.asarray(ReferenceEvaluator(later).run(None, {"x": x})[0])


def rounded(x: np.ndarray, grid: Grid) -> np.ndarray:
    q = np.clip(np.rint(x / np.float32(grid.scale)) + grid.zero_point, grid.qmin, grid.qmax)
    return ((q - grid.zero_point) * np.float32(grid.scale)).astype(np.float32)


def layer(weight: np.ndarray, scale: np.ndarray, axis: int | None = 0) -> IntegerLayer:
    return IntegerLayer(
        "layer",
        torch.from_numpy(weight.astype(np.int8)),
        torch.from_numpy(scale.astype(np.float32)),
        torch.zeros(scale.shape, dtype=torch.int8),
        axis,
        None,
    )


def unary(*lines: str, output: str = "float[n, 3, 6, 6] y") -> str:
    return f"g (float[n, 3, 6, 6] x) => ({output}) {{\n" + "\n".join(lines) + "\n}"


def test_a_grid_of_eight_bits_is_saturation_alone():
    for grid in (UNSIGNED, SIGNED, Grid(0.5, -3, -128, 127), Grid(0.5, 200, 0, 255)):
        proto = rewritten(unary("y = distiller.Grid <index = 0> (x)"), [grid])
        assert kinds(proto) == "Q DQ"
        np.testing.assert_array_equal(run(proto), rounded(X, grid))


def test_smaller_grids_are_clipped_as_integers_at_one_end():
    for grid in (RELU, Grid(2.0, 0, -8, 7), Grid(2.0, 1, 0, 3), Grid(4.0, 0, -1, 1)):
        proto = rewritten(unary("y = distiller.Grid <index = 0> (x)"), [grid])
        assert kinds(proto) == "Q Clip DQ"
        np.testing.assert_array_equal(run(proto), rounded(X, grid))


def test_a_relu_before_a_grid_that_begins_at_zero_is_its_saturation():
    graph = unary("r = Relu (x)", "y = distiller.Grid <index = 0> (r)")
    proto = rewritten(graph, [UNSIGNED])
    assert kinds(proto) == "Q DQ"
    np.testing.assert_array_equal(run(proto), rounded(X, UNSIGNED))
    assert kinds(rewritten(graph, [SIGNED])) == "Relu Q DQ"


def test_a_relu_behind_a_grid_is_a_clip_of_integers_or_nothing():
    graph = unary("q = distiller.Grid <index = 0> (x)", "y = Relu (q)")
    proto = rewritten(graph, [SIGNED])
    assert kinds(proto) == "Q Clip DQ"
    np.testing.assert_array_equal(run(proto), np.maximum(rounded(X, SIGNED), 0))
    assert kinds(rewritten(graph, [UNSIGNED])) == "Q DQ"


def test_a_clip_between_grids_of_one_scale_is_one_of_integers():
    graph = unary(
        "lo = Constant <value = float {0.0}> ()",
        "hi = Constant <value = float {6.0}> ()",
        "q = distiller.Grid <index = 0> (x)",
        "c = Clip (q, lo, hi)",
        "y = distiller.Grid <index = 1> (c)",
    )
    for before, after in ((SIGNED, SIGNED), (SIGNED, UNSIGNED), (UNSIGNED, SIGNED)):
        proto = rewritten(graph, [before, after])
        assert kinds(proto) == "Q Clip DQ"
        np.testing.assert_array_equal(run(proto), np.clip(rounded(X, before), 0, 6))
    proto = rewritten(graph, [SIGNED, Grid(0.2, 0, 0, 255)])
    assert kinds(proto) == "Constant Constant Q DQ Clip Max Q DQ"
    top = 6 / 255  # the integers end where the clip does
    ends_there = [Grid(top, 0, 0, 255), Grid(top, 0, 0, 255)]
    assert kinds(rewritten(graph, ends_there)) == "Q DQ"


def test_a_clip_beyond_what_the_next_grid_has_is_its_end():
    graph = unary(
        "lo = Constant <value = float {-9.0}> ()",
        "hi = Constant <value = float {-6.0}> ()",
        "q = distiller.Grid <index = 0> (x)",
        "c = Clip (q, lo, hi)",
        "y = distiller.Grid <index = 1> (c)",
    )
    proto = rewritten(graph, [SIGNED, UNSIGNED])
    np.testing.assert_array_equal(run(proto), np.zeros_like(X))
    proto = rewritten(graph, [SIGNED, Grid(0.25, 0, -30, 30)])
    np.testing.assert_array_equal(run(proto), np.clip(rounded(X, SIGNED), -7.5, -6))


def test_a_second_grid_of_the_same_scale_is_a_clip_or_nothing():
    graph = unary("q = distiller.Grid <index = 0> (x)", "y = distiller.Grid <index = 1> (q)")
    assert kinds(rewritten(graph, [SIGNED, SIGNED])) == "Q DQ"
    assert kinds(rewritten(graph, [RELU, SIGNED])) == "Q Clip DQ"  # the one of the ReLU's grid
    proto = rewritten(graph, [SIGNED, RELU])
    assert kinds(proto) == "Q Clip DQ"
    np.testing.assert_array_equal(run(proto), rounded(X, RELU))


def test_two_roundings_stay_two():
    """onnxruntime would make one of them, to a grid of its own."""
    second = Grid(0.3, 0, -128, 127)
    graph = unary("q = distiller.Grid <index = 0> (x)", "y = distiller.Grid <index = 1> (q)")
    proto = rewritten(graph, [SIGNED, second])
    assert kinds(proto) == "Q DQ LeakyRelu Q DQ"
    expected = rounded(rounded(X, SIGNED), second)
    np.testing.assert_array_equal(run(proto), expected)
    content = proto.SerializeToString()
    np.testing.assert_array_equal(np.asarray(open_session(content, 1).run(None, {"x": X})[0]), expected)
    assert optimized_graph(content).in_float == {}  # from grid to grid by a table


def test_readers_that_round_to_one_grid_share_its_integers():
    lines = ("a = distiller.Grid <index = 0> (x)", "b = distiller.Grid <index = 0> (x)", "y = Add (a, b)")
    proto = rewritten(unary(*lines), [UNSIGNED])
    assert kinds(proto) == "Q DQ DQ Add"
    np.testing.assert_array_equal(run(proto), 2 * rounded(X, UNSIGNED))


def test_operations_that_move_values_are_between_grids():
    graph = unary(
        "q = distiller.Grid <index = 0> (x)",
        "p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (q)",
        "t = Transpose <perm = [0, 2, 3, 1]> (p)",
        "y = Flatten (t)",
        output="float[n, 27] y",
    )
    proto = rewritten(graph, [SIGNED])
    assert kinds(proto) == "Q DQ MaxPool Q DQ Transpose Q DQ Flatten Q DQ"
    expected = rounded(X, SIGNED).reshape(2, 3, 3, 2, 3, 2).max((3, 5)).transpose(0, 2, 3, 1).reshape(2, -1)
    np.testing.assert_array_equal(run(proto), expected)


def test_pieces_of_a_split_are_each_on_the_grid():
    graph = unary(
        "q = distiller.Grid <index = 0> (x)",
        "a, b, c = Split <axis = 1, num_outputs = 3> (q)",
        "y = Add (a, c)",
        output="float[n, 1, 6, 6] y",
    )
    proto = rewritten(graph, [SIGNED])
    assert kinds(proto) == "Q DQ Split Q DQ Q DQ Add"
    on_grid = rounded(X, SIGNED)
    np.testing.assert_array_equal(run(proto), on_grid[:, :1] + on_grid[:, 2:])


def test_indices_of_a_pooling_are_not_quantized():
    graph = unary(
        "q = distiller.Grid <index = 0> (x)",
        "p, i = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (q)",
        "f = Cast <to = 1> (i)",
        "y = Add (p, f)",
        output="float[n, 3, 3, 3] y",
    )
    assert kinds(rewritten(graph, [SIGNED])) == "Q DQ MaxPool Cast Add"


def test_means_over_all_positions_get_the_name_that_runtimes_know():
    quantize = "q = distiller.Grid <index = 0> (x)"
    kept = unary(
        "a = Constant <value = int64[2] {-1, -2}> ()",
        quantize,
        "m = ReduceMean <keepdims = 1> (q, a)",
        "y = distiller.Grid <index = 1> (m)",
        output="float[n, 3, 1, 1] y",
    ).replace("{\n", "<float[n, 3, 6, 6] q> {\n", 1)
    expected = rounded(X, SIGNED).mean((2, 3), dtype=np.float32)
    proto = rewritten(kept, [SIGNED, UNSIGNED])
    assert kinds(proto) == "Q DQ GlobalAveragePool Q DQ"
    np.testing.assert_array_equal(run(proto)[..., 0, 0], rounded(expected, UNSIGNED))

    dropped = kept.replace("keepdims = 1", "keepdims = 0").replace("3, 1, 1] y", "3] y")
    proto = rewritten(dropped, [SIGNED, UNSIGNED])
    assert kinds(proto) == "Q DQ GlobalAveragePool Q DQ Flatten Q DQ"
    np.testing.assert_array_equal(run(proto), rounded(expected, UNSIGNED))

    over_channels = kept.replace("{-1, -2}", "{1, 2}").replace("3, 1, 1] y", "1, 1, 6] y")
    assert kinds(rewritten(over_channels, [SIGNED, UNSIGNED])) == "Constant Q DQ ReduceMean Q DQ"


def test_a_grid_behind_a_change_of_shape_is_before_it_as_well():
    graph = unary("s = Sigmoid (x)", "f = Flatten (s)", "y = distiller.Grid <index = 0> (f)")
    proto = rewritten(graph.replace("[n, 3, 6, 6] y", "[n, 108] y"), [Grid(1 / 255, 0, 0, 255)])
    assert kinds(proto) == "Sigmoid Q DQ Flatten Q DQ"


WEIGHT = np.array([[10, -20, 127], [-128, 3, 0]])
SCALE = np.array([0.5, 0.25])
LINEAR = """g (float[n, 3] x) => (float[n, 2] y) <float[2, 3] w = {0, 0, 0, 0, 0, 0}, float[2] b = {0.3, -7.7}> {
   q = distiller.Grid <index = 0> (x)
   v = distiller.Weight <index = 0> (w)
   y = Gemm <transB = 1> (q, v, b)
}"""
ROWS = X[0, :, :, 0].T.copy()


def test_a_layer_has_integers_for_its_weight_and_bias():
    proto = rewritten(LINEAR, [SIGNED], [layer(WEIGHT, SCALE)])
    assert kinds(proto) == "Q DQ DQ DQ Gemm"
    tensors = [numpy_helper.to_array(tensor) for tensor in proto.graph.initializer]
    assert sorted(str(tensor.dtype) for tensor in tensors if tensor.ndim) == [
        *["float32"] * 2,
        "int32",
        *["int8"] * 2,
    ]
    bias = next(tensor for tensor in tensors if tensor.dtype == np.int32)
    np.testing.assert_array_equal(bias, np.rint([0.3 / 0.125, -7.7 / 0.0625]))
    expected = rounded(ROWS, SIGNED) @ (WEIGHT * SCALE[:, None]).T + bias * [0.125, 0.0625]
    _, biases = with_integers(onnx.parser.parse_model(HEAD + LINEAR), Marks([SIGNED], [layer(WEIGHT, SCALE)]))
    np.testing.assert_array_equal(biases["layer"], np.float32(bias * [0.125, 0.0625]))
    np.testing.assert_allclose(run(proto, ROWS), expected, rtol=1e-6)
    assert proto.graph.node[-1].name == "layer"


def test_a_bias_without_room_is_the_largest_that_has():
    graph = LINEAR.replace("{0.3, -7.7}", "{3e38, -3e38}")
    proto = rewritten(graph, [SIGNED], [layer(WEIGHT, SCALE)])
    bias = next(numpy_helper.to_array(t) for t in proto.graph.initializer if t.data_type == 6)
    largest_products = 3 * 255 * 255
    assert bias.tolist() == [2**31 - 1 - largest_products, -(2**31 - 1 - largest_products)]


def test_a_layer_in_floating_point_computes_its_weight_once_and_has_its_bias_as_it_is():
    """A DequantizeLinear would be computed in each run."""
    graph = LINEAR.replace("distiller.Grid <index = 0>", "Relu")
    symmetric = layer(WEIGHT, SCALE)
    proto = rewritten(graph, [], [symmetric])
    assert kinds(proto) == "Relu Cast Mul Gemm"
    expected = np.maximum(ROWS, 0) @ (WEIGHT * SCALE[:, None]).T + [0.3, -7.7]
    np.testing.assert_allclose(run(proto, ROWS), expected, rtol=1e-5)

    zero_point = torch.tensor([3, -4], dtype=torch.int8)
    proto = rewritten(graph, [], [dataclasses.replace(symmetric, zero_point=zero_point)])
    assert kinds(proto) == "Relu Cast Sub Mul Gemm"
    weight = (WEIGHT - zero_point.numpy()[:, None]) * SCALE[:, None]
    np.testing.assert_allclose(run(proto, ROWS), np.maximum(ROWS, 0) @ weight.T + [0.3, -7.7], rtol=1e-5)

    transposed = graph.replace("(q, v, b)", "(q, t, b)").replace("transB = 1", "transB = 0")
    transposed = transposed.replace("y =", "t = Transpose (v)\n y =")
    np.testing.assert_allclose(run(rewritten(transposed, [], [symmetric]), ROWS), expected, rtol=1e-5)


def test_a_weight_in_floating_point_stays_that():
    """onnxruntime would round the weights of layers whose inputs are on grids."""
    graph = """g (float[n, 3] x) => (float[n, 2] y)
    <float[2, 3] w = {0.1, 0.22, 0.333, 0.4444, 0.55555, 7.0}, float[2] b = {0.3, -7.7}> {
       q = distiller.Grid <index = 0> (x)
       g = Gemm <transB = 1> (q, w, b)
       y = distiller.Grid <index = 1> (g)
    }"""
    fine = Grid(2**-7, 128, 0, 255)
    proto = rewritten(graph, [Grid(0.5, 0, -2, 1), fine])
    assert kinds(proto) == "Q Clip DQ Max Gemm Q DQ"
    expected = run(proto, ROWS)
    session = open_session(proto.SerializeToString(), 1)
    assert len(np.unique(expected)) > 4
    np.testing.assert_array_equal(np.asarray(session.run(None, {"x": ROWS})[0]), expected)


def test_a_convolutions_bias_has_integers_only_where_the_convolution_can():
    """Without a grid behind it runtimes compute it in floating point, and then the bias may be exact."""
    graph = """g (float[n, 1, 3, 1] x) => (float[n, 2, 1, 1] y)
    <float[2, 1, 3, 1] w = {0, 0, 0, 0, 0, 0}, float[2] b = {0.3, -7.7}> {
       q = distiller.Grid <index = 0> (x)
       v = distiller.Weight <index = 0> (w)
       y = Conv (q, v, b)
    }"""
    weight = layer(WEIGHT.reshape(2, 1, 3, 1), SCALE)
    assert kinds(rewritten(graph, [SIGNED], [weight])) == "Q DQ Cast Mul Conv"
    quantized = graph.replace("y = Conv (q, v, b)", "c = Conv (q, v, b) y = distiller.Grid <index = 1> (c)")
    assert kinds(rewritten(quantized, [SIGNED, SIGNED], [weight])) == "Q DQ DQ DQ Conv Q DQ"
    behind_relu = quantized.replace("y =", "r = Relu (c) y =").replace("> (c)", "> (r)")
    assert kinds(rewritten(behind_relu, [SIGNED, UNSIGNED], [weight])) == "Q DQ DQ DQ Conv Q DQ"


def test_a_transposed_convolution_is_in_floating_point_for_runtimes_have_no_other():
    graph = """g (float[n, 3, 2, 2] x) => (float[n, 2, 2, 2] y) <float[3, 2, 1, 1] w = {0, 0, 0, 0, 0, 0}> {
       q = distiller.Grid <index = 0> (x)
       v = distiller.Weight <index = 0> (w)
       c = ConvTranspose (q, v)
       y = distiller.Grid <index = 0> (c)
    }"""
    weight = layer(WEIGHT.T.reshape(3, 2, 1, 1), SCALE, axis=1)
    proto = rewritten(graph, [SIGNED], [weight])
    assert kinds(proto) == "Q DQ Max Cast Mul ConvTranspose Q DQ"
    x = X[:, :, :2, :2]
    expected = np.einsum("nihw,oi->nohw", rounded(x, SIGNED), (WEIGHT * SCALE[:, None]).astype(np.float32))
    np.testing.assert_allclose(run(proto, x), rounded(expected, SIGNED))


def test_a_product_with_a_transposed_weight_and_a_sum():
    graph = LINEAR.replace(
        "y = Gemm <transB = 1> (q, v, b)",
        "t = Transpose <perm = [1, 0]> (v)\n m = MatMul (q, t)\n y = Add (m, b)",
    )
    for weight in (layer(WEIGHT, SCALE), layer(WEIGHT, np.array(0.5), axis=None)):
        proto = rewritten(graph, [SIGNED], [weight])
        assert kinds(proto) == "Q DQ DQ MatMul Add"
        scale = weight.scale.numpy().reshape(-1, 1) * np.ones((2, 1))
        expected = rounded(ROWS, SIGNED) @ (WEIGHT * scale).T + [0.3, -7.7]
        np.testing.assert_allclose(run(proto, ROWS), expected, rtol=1e-5)


def test_a_layer_that_is_called_twice_has_one_name_and_one_weight():
    graph = """g (float[n, 2] x) => (float[n, 2] y) <float[2, 2] w = {0, 0, 0, 0}> {
       q = distiller.Grid <index = 0> (x)
       v = distiller.Weight <index = 0> (w)
       m = Gemm <transB = 1> (q, v)
       r = distiller.Grid <index = 0> (m)
       v2 = distiller.Weight <index = 0> (w)
       y = Gemm <transB = 1> (r, v2)
    }"""
    proto = rewritten(graph, [SIGNED], [layer(WEIGHT[:, :2], SCALE)])
    assert [node.name for node in proto.graph.node if node.op_type == "Gemm"] == ["layer", ""]
    assert [tensor.data_type for tensor in proto.graph.initializer if len(tensor.dims) == 2] == [3]


def test_rows_of_an_embedding_are_found_as_integers():
    graph = """g (int64[n] x) => (float[n, 3] y) <float[2, 3] w = {0, 0, 0, 0, 0, 0}> {
       v = distiller.Weight <index = 0> (w)
       y = Gather (v, x)
    }"""
    proto = rewritten(graph, [], [layer(WEIGHT, np.array(0.5), axis=None)])
    assert kinds(proto) == "Gather DQ"
    np.testing.assert_array_equal(run(proto, np.array([1, 0, 1])), WEIGHT[[1, 0, 1]] * 0.5)
