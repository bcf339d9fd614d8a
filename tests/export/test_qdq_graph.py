"""Graphs that are written anew."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser

from distiller.export.qdq_graph import GraphWriter, attribute

MODEL = """
<ir_version: 10, opset_import: ["" : 18, "other" : 1]>
g (float[n, 4] input) => (float[n, 2] output)
<float[2, 2] w = {1., 2., 3., 4.}, float[1] unused = {5.}, float[n, 2] long_name_of_a_tensor>
{
   c = Constant <value = float {7.}> ()
   left, right = Split <axis = 1, num_outputs = 2> (input)
   [matmul] long_name_of_a_tensor = MatMul (left, w)
   [matmul] output = MatMul (long_name_of_a_tensor, w)
   unread = Relu (right)
}
"""


def writer() -> GraphWriter:
    proto = onnx.parser.parse_model(MODEL)
    graph = GraphWriter(proto)
    for node in proto.graph.node:
        graph.keep(node)
    return graph


def test_what_nothing_reads_is_left_out():
    proto = writer().finish()
    assert [node.op_type for node in proto.graph.node] == ["Split", "MatMul", "MatMul"]
    assert len(proto.graph.initializer) == 1
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 18)]
    assert not proto.graph.value_info
    onnx.checker.check_model(proto, full_check=True)


def test_names_are_short_and_different_but_those_of_inputs_and_outputs_stay():
    proto = writer().finish()
    assert [list(node.input) for node in proto.graph.node] == [["input"], ["a", "c"], ["d", "c"]]
    assert [list(node.output) for node in proto.graph.node] == [["a", "b"], ["d"], ["output"]]
    assert [node.name for node in proto.graph.node] == ["", "matmul", ""]


def test_hundreds_of_tensors_get_as_many_names():
    graph = GraphWriter(onnx.parser.parse_model(MODEL.replace("float[n, 2] output", "float[n, 4] output")))
    name = "input"
    for _ in range(800):
        name = graph.add("Relu", [name])
    graph.add("Relu", [name], "output")
    nodes = graph.finish().graph.node
    names = {node.output[0] for node in nodes}
    assert len(names) == len(nodes) == 801
    assert max(map(len, names - {"output"})) == 3


def test_equal_constants_are_one():
    graph = writer()
    first = graph.add_constant(np.zeros(3, np.float32))
    assert graph.add_constant(np.zeros(3, np.float32)) == first
    others = [np.zeros(3, np.int32), np.zeros((3, 1), np.float32), np.full(3, -0.0, np.float32)]
    assert len({first, *(graph.add_constant(values) for values in others)}) == 4


def test_facts_about_tensors():
    graph = writer()
    np.testing.assert_array_equal(graph.constant("w"), [[1, 2], [3, 4]])
    assert graph.constant("c") == 7
    assert graph.constant("left") is None
    assert graph.rank("long_name_of_a_tensor") == 2
    assert graph.rank("left") is None
    maker = graph.maker("right")
    assert maker is not None
    assert attribute(maker, "axis") == 1
    assert attribute(maker, "no_such", "default") == "default"
    assert graph.maker("input") is None


def test_attributes_that_say_what_holds_without_them_are_left_out():
    proto = onnx.parser.parse_model("""
<ir_version: 10, opset_import: ["" : 18]>
g (float[n, 2, 4, 4] input) => (float[n, 2, 2, 2] output)
<float[2, 1, 3, 3] w>
{
   a = Conv <auto_pad = "NOTSET", dilations = [1, 1], group = 2, kernel_shape = [3, 3], pads = [1, 1, 1, 1],
             strides = [1, 1]> (input, w)
   output = MaxPool <ceil_mode = 0, kernel_shape = [2, 2], pads = [0, 0, 0, 0], strides = [2, 2]> (a)
}
""")
    graph = GraphWriter(proto)
    for node in proto.graph.node:
        graph.keep(node)
    conv, pool = graph.finish().graph.node
    assert {item.name for item in conv.attribute} == {"group", "kernel_shape", "pads"}
    assert {item.name for item in pool.attribute} == {"kernel_shape", "strides"}
