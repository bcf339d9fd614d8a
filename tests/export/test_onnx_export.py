"""What onnxruntime, and the checker of the onnx package, say of the files."""

from __future__ import annotations

import logging
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from distiller.channel_groups import find_channel_groups
from distiller.errors import DistillerError, GraphTraceError, QuantizationError, UnknownNameError, UsageError
from distiller.export import onnx_export
from distiller.export.onnx_export import export_img_classifier_to_onnx, export_onnx, with_softmax
from distiller.export.onnx_parity import check_onnx, open_session
from distiller.models import create_model
from distiller.models.word_language_model import RNNModel
from distiller.quantization import PostTrainLinearQuantizer
from distiller.thinning import apply_recipe, thinning_recipe
from tests.channel_groups.cutting import first_units, randomize
from tests.channel_groups.test_families import FAMILIES, network

ROOT = Path(__file__).resolve().parents[2]
SMALL = (2, 3, 8, 8)


class Odd(nn.Module):
    """A network whose forward is what a test gives it."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.function(x) * self.weight


class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x + 1
        return x - 1


def shape(value) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def exported(model: nn.Module, folder: Path) -> Path:
    path = export_onnx(model, folder / "m.onnx", torch.randn(1, 1, 8, 8))
    assert path == folder / "m.onnx"
    assert [file.name for file in folder.iterdir()] == ["m.onnx"]
    return path


def test_the_file_is_valid_and_takes_any_batch_size(tiny_cnn, tmp_path):
    path = exported(randomize(tiny_cnn), tmp_path)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 18)]
    assert [(value.name, shape(value)) for value in proto.graph.input] == [("input", ["batch", 1, 8, 8])]
    assert [(value.name, shape(value)) for value in proto.graph.output] == [("output", ["batch", 4])]
    parity = check_onnx(path, tiny_cnn, torch.randn(2, 1, 8, 8), batch_sizes=(1, 3, 5), threads=1)
    assert parity.batch_sizes == (1, 3, 5)
    assert 0 <= parity.relative_difference < 1e-5
    assert parity.argmax_agreement == 1

    # weights keep their names, and no path of the machine gets into the file
    names = {tensor.name for tensor in proto.graph.initializer}
    assert {"conv1.weight", "conv2.weight", "conv2.bias", "fc.weight", "fc.bias"} <= names
    content = path.read_bytes()
    assert str(ROOT).encode() not in content
    assert b"site-packages" not in content
    assert b"conv2" in content


def test_modes_weights_and_random_numbers_are_as_before(tiny_cnn, tmp_path):
    tiny_cnn.bn1.eval()
    before = {name: value.clone() for name, value in tiny_cnn.state_dict().items()}
    images, state = torch.randn(1, 1, 8, 8), torch.get_rng_state()
    path = export_onnx(tiny_cnn, tmp_path / "m.onnx", images)
    check_onnx(path, tiny_cnn, images)
    assert (tiny_cnn.training, tiny_cnn.bn1.training, tiny_cnn.conv1.training) == (True, False, True)
    assert all(torch.equal(value, before[name]) for name, value in tiny_cnn.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled()
    assert logging.root.manager.disable == logging.NOTSET


def test_nothing_is_printed(tmp_path, capfd):
    with pytest.raises(GraphTraceError):
        export_onnx(Branching(), tmp_path / "m.onnx", torch.randn(SMALL))
    export_onnx(Odd(torch.relu), tmp_path / "m.onnx", torch.randn(SMALL))
    assert capfd.readouterr() == ("", "")


def test_a_classifier_gets_a_softmax_unless_it_is_not_wanted(tmp_path):
    model = create_model(False, "mnist", "lenet5", parallel=False)
    images = torch.randn(3, *model.input_shape[1:])
    path = export_img_classifier_to_onnx(model, tmp_path / "m.onnx", "mnist")
    (output,) = open_session(path).run(None, {"input": images.numpy()})
    assert output.sum(1) == pytest.approx(1)
    with with_softmax(model):
        check_onnx(path, model, images)
    assert model(images).sum(1).tolist() != pytest.approx([1] * 3)
    logits = export_img_classifier_to_onnx(
        model, tmp_path / "l.onnx", None, add_softmax=False, input_names=["images"], opset_version=20
    )
    check_onnx(logits, model, images)
    proto = onnx.load(logits)
    assert (proto.graph.input[0].name, proto.opset_import[0].version) == ("images", 20)


def test_a_classifier_of_unknown_shape_is_refused(tiny_cnn, tmp_path):
    with pytest.raises(UnknownNameError, match="dummy input: unknown data set 'mnits'; did you mean 'mnist'"):
        export_img_classifier_to_onnx(tiny_cnn, tmp_path / "m.onnx", "mnits")
    del tiny_cnn.input_shape
    with pytest.raises(UsageError, match="dummy input: neither data set nor input_shape given; give one"):
        export_img_classifier_to_onnx(tiny_cnn, tmp_path / "m.onnx", None)
    assert list(tmp_path.iterdir()) == []


def test_the_word_model_takes_any_batch_size_in_its_second_dimension(tmp_path):
    model = RNNModel(20, 6, 6, 2, tied=True)
    dummy = (torch.randint(0, 20, (5, 3)), model.init_hidden(3))
    path = export_onnx(model, tmp_path / "m.onnx", dummy, batch_dim=1)
    assert check_onnx(path, model, dummy, batch_dim=1, batch_sizes=(1, 4)).relative_difference < 1e-5
    shapes = [shape(value) for value in onnx.load(path).graph.input]
    assert shapes == [[5, "batch"], [2, "batch", 6], [2, "batch", 6]]


class Mixed(nn.Module):
    """Layers that thinning turns into others: layer norm and attention, 4 heads of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.hidden = nn.Linear(8, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.fc(torch.relu(self.hidden(x))).mean(1)


def test_a_thinned_model_is_exported():
    model, images = randomize(Mixed()), torch.randn(SMALL)
    groups = find_channel_groups(model, images[:1])
    apply_recipe(model, thinning_recipe(model, groups, first_units(groups.removable())))
    assert any(type(module).__name__.startswith("Thinned") for module in model.modules())
    data = onnx_export.onnx_bytes(model, images)
    assert check_onnx(data, model, images).relative_difference < 1e-5


def test_an_operation_that_onnx_lacks_is_named(tmp_path):
    with pytest.raises(DistillerError) as error:
        export_onnx(Odd(torch.special.bessel_j0), tmp_path / "m.onnx", torch.randn(SMALL))
    assert str(error.value) == (
        "Odd: cannot be exported to ONNX: ONNX has no operation for prims.bessel_j0; "
        "replace it in the model's forward"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_branch_on_a_value_is_shown(tmp_path):
    with pytest.raises(GraphTraceError) as error:
        export_onnx(Branching(), tmp_path / "m.onnx", torch.randn(SMALL))
    start, _, end = str(error.value).partition(" (")
    assert start == (
        "Branching: torch.export cannot trace it for ONNX: what it does depends on the values of a tensor"
    )
    assert end.endswith(": if x.sum() > 0:); use torch.where or torch.cond")
    assert end.startswith(f"{__file__}:")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "function, told",
    [
        (
            lambda x: x.reshape(2, -1),
            "its forward does not take every batch size, it was traced with 2; take",
        ),
        (lambda x: x @ torch.ones(3, 3), "RuntimeError: "),
    ],
)
def test_a_forward_that_cannot_be_traced_is_told_with_the_reason(tmp_path, function, told):
    (tmp_path / "m.onnx").write_bytes(b"old")
    with pytest.raises(GraphTraceError) as error:
        export_onnx(Odd(function), tmp_path / "m.onnx", torch.randn(SMALL))
    assert str(error.value).startswith(f"Odd: torch.export cannot trace it for ONNX: {told}")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_a_quantized_model_is_refused(tiny_cnn, tmp_path):
    quantizer = PostTrainLinearQuantizer(tiny_cnn.eval(), bits_activations=None)
    quantizer.prepare_model(torch.randn(1, 1, 8, 8))
    with pytest.raises(QuantizationError) as error:
        export_onnx(tiny_cnn, tmp_path / "m.onnx", torch.randn(1, 1, 8, 8))
    assert str(error.value) == (
        "TinyCnn: cannot be exported to ONNX in floating point, where its quantization is only simulated; "
        "write its integers (export_int8_onnx, --export-int8), or export the model from before quantization"
    )


def test_a_model_above_the_size_of_a_file_is_refused(tiny_cnn, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_MAX_BYTES", 1000)
    size = sum(4 * p.numel() for p in tiny_cnn.parameters()) + 2 * 4 * 4 + 8
    with pytest.raises(DistillerError) as error:
        export_onnx(tiny_cnn, tmp_path / "m.onnx", torch.randn(1, 1, 8, 8))
    told = f"one ONNX file holds at most 1,000 bytes, its weights are {size:,}"
    assert str(error.value) == f"TinyCnn: cannot be exported to ONNX: {told}"


def test_a_file_that_cannot_be_written_is_told_before_the_export(tmp_path):
    def never_called(x):
        raise AssertionError

    (tmp_path / "file").touch()
    for path, told in (
        (tmp_path, f"{tmp_path}: is a folder; give the name of a file"),
        (tmp_path / "no/m.onnx", f"{tmp_path}/no/m.onnx: cannot be written, No such file or directory; "
         f"make the folder {tmp_path}/no first"),
        (tmp_path / "file/m.onnx", f"{tmp_path}/file/m.onnx: cannot be written, Not a directory; "
         f"make the folder {tmp_path}/file first"),
    ):  # fmt: skip
        with pytest.raises(UsageError) as error:
            export_onnx(Odd(never_called), path, torch.randn(SMALL))
        assert str(error.value) == told


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"opset_version": 17}, "export_onnx: opset_version must be at least 18, got 17"),
        ({"opset_version": 99}, "export_onnx: this PyTorch cannot write opset_version 99, only 18"),
        ({"input_names": ["a", "b"]}, "export_onnx: input_names must be 1 different names, one for each input, got a, b"),
        ({"output_names": []}, "export_onnx: output_names must be 1 different names, one for each output, got none"),
    ],
)  # fmt: skip
def test_a_setting_that_does_not_fit_is_refused(tmp_path, settings, told):
    with pytest.raises(UsageError) as error:
        export_onnx(Odd(torch.relu), tmp_path / "m.onnx", torch.randn(SMALL), **settings)
    assert str(error.value) == told


def test_an_example_without_samples_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"ONNX: the input must have a sample, got shape \(0, 3\)"):
        export_onnx(Odd(torch.relu), tmp_path / "m.onnx", torch.zeros(0, 3))


CIFAR_AND_MNIST = [
    *((arch, "mnist") for arch in ("lenet_300_100", "simplenet_mnist", "simplenet_v2_mnist")),
    *((arch, "cifar10") for arch in (
        "resnet20_cifar", "preact_resnet20_cifar", "preact_resnet20_cifar_conv_ds", "plain20_cifar",
        "plain20_cifar_nobn", "simplenet_cifar", "vgg11_bn_cifar", "vgg11_cifar",
    )),
]  # fmt: skip


def agree(model: nn.Module, images: torch.Tensor) -> None:
    parity = check_onnx(onnx_export.onnx_bytes(model, images), model, images, threads=1)
    assert parity.relative_difference < 1e-4
    assert parity.argmax_agreement == 1


def test_squeezenet():
    agree(network("squeezenet1_1"), torch.randn(2, 3, 32, 32))


@pytest.mark.slow
@pytest.mark.parametrize("arch, dataset", CIFAR_AND_MNIST)
def test_every_small_network(arch, dataset):
    model = randomize(create_model(False, dataset, arch, parallel=False))
    agree(model, torch.randn(2, *model.input_shape[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("arch, size", [*FAMILIES.items(), ("resnet18", 32)])
def test_every_family_of_torchvision(arch, size):
    agree(network(arch), torch.randn(2, 3, size, size))
