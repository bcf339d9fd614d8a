"""Files in QDQ form against their simulation, in onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from distiller.errors import QuantizationError, UsageError
from distiller.export.integer_latency import optimized_graph
from distiller.export.integer_parity import compare_integer
from distiller.export.integer_view import integer_view
from distiller.export.onnx_parity import open_session
from distiller.export.qdq_export import check_integers, export_int8_onnx, int8_onnx, int8_onnx_bytes
from distiller.models import create_model
from distiller.quantization import PostTrainLinearQuantizer
from distiller.quantization.affine import LinearQuantMode as Mode
from distiller.quantization.training import (
    BinaryQuantizer,
    LSQQuantizer,
    PACTQuantizer,
    QuantAwareTrainRangeLinearQuantizer,
)
from tests.export.quantized_nets import FASTEST, Mixed, images, quantized, statistics
from tests.export.trained_nets import Residual, trained


def exported(model: nn.Module, x: torch.Tensor) -> onnx.ModelProto:
    proto = onnx.load_from_string(int8_onnx_bytes(model, x))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def integers(proto: onnx.ModelProto) -> list[np.ndarray]:
    tensors = [numpy_helper.to_array(tensor) for tensor in proto.graph.initializer]
    return [tensor for tensor in tensors if tensor.dtype == np.int8 and tensor.ndim > 1]


# every mode of activations and of weights, 8 bits and fewer, by tensor and by channel
@pytest.mark.parametrize(
    "activations,weights,bits,per_channel",
    [
        (Mode.SYMMETRIC, Mode.SYMMETRIC, (8, 8), False),
        (Mode.ASYMMETRIC_UNSIGNED, Mode.SYMMETRIC_RESTRICTED, (8, 4), True),
        (Mode.ASYMMETRIC_SIGNED, Mode.ASYMMETRIC_UNSIGNED, (6, 8), True),
        (Mode.SYMMETRIC_RESTRICTED, Mode.ASYMMETRIC_SIGNED, (4, 8), False),
        (Mode.ASYMMETRIC_UNSIGNED, Mode.ASYMMETRIC_SIGNED, (2, 3), True),
    ],
)
def test_onnxruntime_computes_the_integers_of_the_simulation(activations, weights, bits, per_channel):
    model = quantized(
        Mixed(),
        bits_activations=bits[0],
        bits_parameters=bits[1],
        mode={"activations": activations, "weights": weights},
        per_channel_wts=per_channel,
    )
    content = int8_onnx_bytes(model, images(model, 1))
    parity = compare_integer(model, content, images(model, 32).split(8), threads=1)
    assert parity.max_steps is not None
    assert parity.max_steps < 1.01
    for weight in integers(onnx.load_from_string(content)):
        assert int(weight.max()) - int(weight.min()) < 2 ** (
            bits[1] + 1
        )  # 0 may be in the middle of each channel
    assert optimized_graph(content).in_float == {}


def test_results_are_equal_where_every_number_is_exact():
    """Scales are powers of two and sums small: no rounding in floating point, and halves go to even."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in (model[0], model[3]):
            for parameter, scale in ((layer.weight, 1 / 16), (layer.bias, 1 / 64)):
                values = torch.randint(-127, 127, parameter.shape, generator=generator)
                values.view(-1)[0] = 127  # 127 / 16 over 127 steps
                parameter.copy_(values * scale)
    x = torch.randint(-127, 128, (64, 1, 3, 3), generator=generator) / 4
    x[0, 0, 0, 0] = 127 / 4
    stats = statistics(model, x)
    for name, top in (("0", 32.0), ("1", 32.0), ("2", 32.0), ("3", 512.0)):
        entries = [stats[name]["output"], *([] if name == "0" else [stats[name]["inputs"][0]])]
        for entry in entries:
            entry.update(min=-top * 127 / 128, max=top * 127 / 128)
    mode = "SYMMETRIC_RESTRICTED"
    PostTrainLinearQuantizer(model, mode=mode, model_activation_stats=stats).prepare_model(x)
    quantizers = [module for module in model.modules() if hasattr(module, "settings")]
    assert all(float(quantizer.scale.log2()) % 1 == 0 for quantizer in quantizers)
    content = int8_onnx_bytes(model.eval(), x[:1])
    with torch.no_grad():
        expected = model(x).numpy()
    got = open_session(content, 1).run(None, {"input": x.numpy()})[0]
    np.testing.assert_array_equal(got, expected)
    assert len(np.unique(got)) > 20


def test_nothing_of_resnet18s_blocks_stays_in_floating_point():
    """What onnxruntime makes of them: convolutions and sums of integers only."""
    whole = create_model(False, "imagenet", "resnet18", parallel=False)
    begin = nn.Sequential(whole.conv1, whole.bn1, whole.relu, whole.maxpool)  # type: ignore[arg-type]
    model = nn.Sequential(begin, whole.layer1[1], whole.layer2[0])  # type: ignore[index]
    x = torch.randn(2, 3, 32, 32)
    content = int8_onnx_bytes(quantized(model, x, mode=FASTEST, per_channel_wts=True), x)
    graph = optimized_graph(content)
    assert graph.in_float == {}
    assert (graph.kernels["QLinearConv"], graph.kernels["QLinearAdd"]) == (6, 2)
    assert (graph.kernels["QuantizeLinear"], graph.kernels["DequantizeLinear"]) == (1, 1)
    assert (graph.clips, graph.weights_off_zero) == (0, 0)


def test_the_file_has_ordinary_operators_any_batch_size_and_nothing_of_this_machine(tmp_path):
    model = quantized(Mixed())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = export_int8_onnx(model, tmp_path / "m.onnx", images(model, 3))
    assert path == tmp_path / "m.onnx"
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    proto = onnx.load(path)
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 18)]
    assert {node.op_type for node in proto.graph.node} == {
        *["QuantizeLinear", "DequantizeLinear", "Clip", "Conv", "Add", "Concat", "MaxPool"],
        *["GlobalAveragePool", "Reshape", "Gemm"],
    }
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.input]
    assert shapes == [["batch", 3, 12, 12]]
    assert [value.name for value in (*proto.graph.input, *proto.graph.output)] == ["input", "output"]
    names = [node.name for node in proto.graph.node if node.name]
    assert names == ["conv", "block.conv1", "block.conv2", "block.shortcut", "side", "fc"]
    content = path.read_bytes()
    assert b".py" not in content
    assert b"wrapped_module" not in content
    session = open_session(path, 1)
    for count in (1, 2, 5):
        assert np.asarray(session.run(None, {"input": images(model, count).numpy()})[0]).shape == (count, 5)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    named = int8_onnx_bytes(model, images(model, 1), input_names=["image"], output_names=["logits"])
    graph = onnx.load_from_string(named).graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["image", "logits"]


def test_resnet20s_file_is_at_most_three_tenths_of_its_parameters_in_floating_point():
    model = create_model(False, "cifar10", "resnet20_cifar", parallel=False)
    parameters = sum(4 * parameter.numel() for parameter in model.parameters())
    settings = {"mode": "ASYMMETRIC_UNSIGNED", "per_channel_wts": True}  # all that can be in a file
    content = int8_onnx_bytes(quantized(model, images(model, 2), **settings), images(model, 1))
    assert len(content) < 0.28 * parameters


def test_weights_alone_are_integers_too(tiny_cnn):
    x = torch.randn(4, 1, 8, 8)
    PostTrainLinearQuantizer(tiny_cnn, bits_activations=None, bits_parameters=4).prepare_model(x)
    proto = exported(tiny_cnn.eval(), x)
    kinds = [node.op_type for node in proto.graph.node]
    assert (kinds.count("Cast"), kinds.count("Mul"), kinds.count("DequantizeLinear")) == (3, 3, 0)
    assert len(integers(proto)) == 3
    parity = compare_integer(tiny_cnn, proto.SerializeToString(), [x], threads=1)
    assert parity.output_scale is None
    assert parity.max_difference < 1e-5


def test_activations_alone_are_refused():
    """A file came of them in which every layer computed in floating point."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    x = torch.randn(64, 2, 4, 4)
    quantized(model, x, bits_parameters=None)
    for check in (check_integers, int8_onnx_bytes):
        with pytest.raises(QuantizationError) as caught:
            check(model, x)
        assert str(caught.value) == (
            "Sequential: no weight in it is quantized, so runtimes would compute all of its 2 layers in floating "
            "point; give weights 2 to 8 bits (bits_weights, --qe-bits-wts), or write it in floating point "
            "(export_onnx, --export-onnx)"
        )


class Odd(nn.Module):
    """Calls a layer twice, has a ReLU6, a linear layer on three dimensions and functional operations."""

    input_shape = (1, 4, 6)

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.relu6 = nn.ReLU6()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.last = nn.Linear(3, 2, bias=False)

    def forward(self, x):
        x = self.relu6(self.twice(self.twice(x)))
        x = torch.max_pool1d(self.conv(x).relu(), 2)
        return self.last(x.transpose(1, 2).transpose(1, 2)).mean(1)


@pytest.mark.parametrize("mode", ["SYMMETRIC", "ASYMMETRIC_UNSIGNED"])
def test_shared_layers_three_dimensions_and_functional_operations(mode):
    model = quantized(Odd(), mode=mode, per_channel_wts=True)
    proto = exported(model, images(model, 1))
    names = [node.name for node in proto.graph.node if node.name]
    assert sorted(names) == ["conv", "last", "twice"]
    assert "Relu" not in {node.op_type for node in proto.graph.node}
    assert len(integers(proto)) == 3
    parity = compare_integer(model, proto.SerializeToString(), [images(model, 16)], threads=1)
    assert parity.max_difference <= float(model.last.output_quant.scale) * 1.01


def test_an_embeddings_rows_are_integers():
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3))
    x = torch.randint(20, (6, 2))
    proto = exported(quantized(model, x), x)
    assert proto.graph.node[0].op_type == "Gather"
    assert {w.shape for w in integers(proto)} == {(20, 8), (8, 3)}
    with torch.no_grad():
        expected = model(x).numpy()
    got = open_session(proto.SerializeToString(), 1).run(None, {"input": x.numpy()})[0]
    assert np.abs(np.asarray(got) - expected).max() <= float(model[1].output_quant.scale) * 1.01


def test_the_simulation_of_a_model_quantized_after_training_is_the_model():
    model = quantized(nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3))
    found = int8_onnx(model, torch.randn(1, 3))
    assert found.simulation is model
    assert found.content == int8_onnx_bytes(model, torch.randn(1, 3))


def test_a_trained_model_comes_out_with_batch_norms_folded_and_biases_rounded(tiny_cnn):
    """At 3 bits the accumulator's unit is so wide that rounding the biases is seen; the simulation has it too."""
    x = torch.randn(64, 1, 8, 8)
    quantizer = LSQQuantizer(tiny_cnn, None, bits_activations=3, bits_weights=3)
    quantizer.prepare_model(x)
    tiny_cnn.train()(x)
    before = {name: tensor.clone() for name, tensor in tiny_cnn.eval().state_dict().items()}
    found = int8_onnx(tiny_cnn, x)
    proto = onnx.load_from_string(found.content)
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    assert len(integers(proto)) == 3
    parity = compare_integer(found.simulation, found.content, [x], threads=1)
    assert parity.max_difference < 1e-5
    conv, grid = found.simulation.conv1, found.simulation.conv1.input_quantizer
    scale = {layer.name: layer.scale for layer in integer_view(tiny_cnn, x).layers.values()}["conv1"]
    steps = conv.bias.detach() / (grid.scale * scale)
    torch.testing.assert_close(steps, steps.round(), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        difference = (found.simulation(x) - tiny_cnn(x)).abs().max()
    assert 1e-4 < difference < 0.5
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_cnn.state_dict().items())


LOW = {"bits_activations": 4, "bits_weights": 4}


@pytest.mark.parametrize(
    "kind,settings",
    [
        (LSQQuantizer, {**LOW, "overrides": {"conv|fc": {"bits_weights": 8, "bits_activations": 8}}}),
        (PACTQuantizer, LOW),
        (QuantAwareTrainRangeLinearQuantizer, {"bits_activations": 8, "bits_weights": 8}),
        (BinaryQuantizer, {}),
    ],
)
def test_with_batches_nothing_of_a_trained_network_stays_in_floating_point(kind, settings):
    """Its sums are functional ones; what is returned computes what the file does."""
    model = trained(Residual(adds=False), kind, **settings)
    x = images(model, 256)
    before = repr(model)
    found = int8_onnx(model, x[:1], batches=x[:128].split(32), quantize_activations=True)
    assert repr(model) == before
    assert "second.add" not in found.added_grids
    assert set(found.added_grids) >= {"first.conv2", "second.conv2", "second.side"}
    graph = optimized_graph(found.content)
    assert graph.in_float == {}
    assert (graph.kernels["QLinearConv"], graph.kernels["QLinearAdd"]) == (6, 2)
    parity = compare_integer(found.simulation, found.content, x.split(64), threads=1)
    assert parity.agreement >= 0.995
    with torch.no_grad():
        same = (found.simulation(x).argmax(1) == model(x).argmax(1)).float().mean()
    assert same > 0.85  # of random networks at 4 bits, whose decisions are close


def test_without_batches_sums_stay_in_floating_point_and_so_do_activations_that_were_not_asked_for():
    model = trained(Residual(), PACTQuantizer, **LOW)
    plain = int8_onnx(model, images(model, 1))
    assert plain.added_grids == ()
    assert {"Add", "Conv"} <= set(optimized_graph(plain.content).in_float)
    binary = trained(Residual(), BinaryQuantizer)
    x = images(binary)
    found = int8_onnx(binary, x[:1], batches=[x])
    assert found.added_grids == ()
    assert found.content == int8_onnx_bytes(binary, x[:1])


def test_batches_do_not_change_what_was_quantized_after_training():
    model = quantized(nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3))
    x = torch.randn(1, 3)
    found = int8_onnx(model, x, batches=[x], quantize_activations=True)
    assert found.simulation is model
    assert found.content == int8_onnx_bytes(model, x)


@pytest.mark.parametrize(
    "settings,message",
    [
        (
            {"bits_activations": 16},
            "conv.output_quant: its integers have 16 bits, an integer model has at most 8; "
            "give it fewer (bits_activations)",
        ),
        (
            {"bits_parameters": 12},
            "conv: weight: its integers have 12 bits, an integer model has at most 8; give it fewer (bits_weights)",
        ),
        (
            {"scale_approx_mult_bits": 8},
            "conv: scale_approx_mult_bits: runtimes change the scale exactly, the approximation "
            "cannot be exported; leave it out (no --qe-scale-approx-bits)",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:accumulators of 32 bits")
def test_what_has_no_integers_is_refused(settings, message):
    with pytest.raises(QuantizationError) as caught:
        int8_onnx_bytes(quantized(Mixed(), **settings), torch.randn(1, 3, 12, 12))
    assert str(caught.value) == message


def test_dynamic_ranges_are_refused(tiny_cnn):
    x = torch.randn(1, 1, 8, 8)
    PostTrainLinearQuantizer(tiny_cnn).prepare_model(x)
    with pytest.raises(QuantizationError, match=r"^conv1.*: its range is dynamic, that of each batch; an"):
        int8_onnx_bytes(tiny_cnn.eval(), x)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UsageError) as caught:
        export_int8_onnx(nn.Linear(2, 2), tmp_path, torch.randn(1, 2))
    assert str(caught.value) == f"{tmp_path}: is a folder; give the name of a file"
    missing = tmp_path / "none" / "m.onnx"
    model = quantized(nn.Sequential(nn.Linear(2, 2)), torch.randn(3, 2))
    with pytest.raises(UsageError, match=r"cannot be written, .*; make the folder .*none first$"):
        export_int8_onnx(model, missing, torch.randn(1, 2))
