"""Conversion to PyTorch's quantized modules, against the simulation."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from distiller.errors import QuantizationError
from distiller.export import pytorch_int8
from distiller.export.cpu_facts import CpuFacts
from distiller.export.pytorch_int8 import convert_distiller_ptq_model_to_pytorch
from distiller.modules import Concat, EltwiseAdd, EltwiseMult
from distiller.quantization import PostTrainLinearQuantizer
from tests.export.quantized_nets import FASTEST, Mixed, images, quantized

BACKENDS = [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]
pytestmark = [
    pytest.mark.skipif(not BACKENDS, reason="this PyTorch has no quantized backend"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel"),
]


def converted(model: nn.Module, x: torch.Tensor, backend: str = BACKENDS[0]) -> nn.Module:
    with pytest.warns(UserWarning, match=r"announces that a future release has no quantized tensors"):
        return convert_distiller_ptq_model_to_pytorch(model, x, backend)


def steps_apart(model: nn.Module, other: nn.Module, x: torch.Tensor, scale: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x) - other(x)).abs().max() / scale)


@pytest.fixture
def has_vnni(monkeypatch):
    monkeypatch.setattr(pytorch_int8, "cpu_facts", lambda: CpuFacts("CPU", ("AVX512-VNNI",)))


class Arithmetic(nn.Module):
    """Sums, products and concatenations, with and without a ReLU behind them; convolutions of 1, 2, 3 dimensions."""

    input_shape = (1, 2, 6)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(2, 4, 3, padding=1, bias=False)
        self.add, self.mult, self.cat = EltwiseAdd(), EltwiseMult(), Concat()
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.plain_add, self.three = EltwiseAdd(), EltwiseAdd()
        self.conv2 = nn.Conv2d(8, 3, 1, padding="same")
        self.conv3 = nn.Conv3d(3, 2, (1, 2, 1), stride=(1, 1, 2))
        self.up = nn.ConvTranspose2d(2, 2, 2, bias=False)
        self.tanh = nn.Tanh()
        self.average = nn.AvgPool2d(2)
        self.last = nn.Linear(2, 3)

    def forward(self, x):
        x = self.conv1(x)
        y = self.relu1(self.add(x, self.plain_add(x, x)))
        y = self.relu3(self.cat(y, self.relu2(self.mult(x, y))))
        y = self.conv2(self.three(y, y, y).view(-1, 8, 2, 3))
        y = self.conv3(y.unsqueeze(2)).squeeze(2)
        y = self.average(self.tanh(self.up(y)))
        return self.last(y.flatten(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("settings", [{}, {"mode": FASTEST, "per_channel_wts": True, "bits_parameters": 5}])
@pytest.mark.usefixtures("has_vnni")
def test_the_converted_model_computes_the_integers_of_the_simulation(backend, settings):
    model = quantized(Mixed(), **settings)
    x = images(model, 64)
    engine = torch.backends.quantized.engine
    result = converted(model, x[:1], backend)
    assert torch.backends.quantized.engine == engine
    assert steps_apart(model, result, x, model.fc.output_quant.scale) < 1.01
    kinds = [type(module).__name__ for module in result.modules()]
    assert (kinds.count("ConvReLU2d"), kinds.count("Conv2d"), kinds.count("Linear")) == (2, 3, 1)
    assert not any(isinstance(p, nn.Parameter) for p in result.parameters())


@pytest.mark.parametrize("mode", ["SYMMETRIC", "ASYMMETRIC_SIGNED"])
@pytest.mark.usefixtures("has_vnni")
def test_every_kind_of_layer_is_converted(mode):
    """Those that PyTorch has no quantized module for run on real numbers."""
    model = quantized(Arithmetic(), mode={"activations": mode, "weights": "SYMMETRIC"})
    x = images(model, 32)
    result = converted(model, x)
    assert steps_apart(model, result, x, model.last.output_quant.scale) < 2.01
    functions = {module.function for module in result.modules() if hasattr(module, "function")}
    assert functions == {"add_relu", "add", "mul_relu", "cat_relu"}


@pytest.mark.usefixtures("has_vnni")
def test_a_convolution_without_bias_is_converted():
    """DEFECT of Distiller: it copied the bias before it looked whether there was one, and failed."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False))
    x = torch.randn(4, 2, 5, 5)
    quantized(model, x)
    result = converted(model, x)
    assert steps_apart(model, result, x, model[0].output_quant.scale) < 1.01


@pytest.mark.usefixtures("has_vnni")
def test_layers_in_floating_point_get_real_numbers(tiny_cnn):
    x = torch.randn(8, 1, 8, 8)
    off = {"bits_activations": None, "bits_weights": None}
    model = quantized(tiny_cnn, x, overrides={"conv2": off, "relu2": off})
    result = converted(model, x)
    assert steps_apart(model, result, x, model.fc.output_quant.scale) < 1.01
    assert isinstance(result.model.conv2.module, nn.Conv2d)  # type: ignore[union-attr]


@pytest.mark.usefixtures("has_vnni")
def test_the_model_stays_and_the_result_can_be_copied(tiny_cnn):
    x = torch.randn(4, 1, 8, 8)
    model = quantized(tiny_cnn, x)
    with torch.no_grad():
        before = model(x)
        result = converted(model, x)
        assert torch.equal(model(x), before)
        assert torch.equal(copy.deepcopy(result)(x), result(x))
    assert not result.training


@pytest.mark.parametrize("dot_products,bits", [(("AVX512-VNNI",), 8), ((), 7), (None, 7)])
def test_activations_have_one_bit_less_where_x86_has_no_vnni(dot_products, bits, monkeypatch):
    if "fbgemm" not in BACKENDS:
        pytest.skip("this PyTorch has no backend for x86")
    monkeypatch.setattr(pytorch_int8, "cpu_facts", lambda: CpuFacts("CPU", dot_products))
    model = nn.Sequential(nn.Linear(4, 3))
    x = torch.rand(16, 4)
    quantized(model, x, mode="ASYMMETRIC_UNSIGNED")
    inside = converted(model, x, "fbgemm").model[0].inputs[0]  # type: ignore[index,union-attr]
    scale = float(model[0].input_grids[0].scale)  # type: ignore[union-attr,index]
    assert inside.scale == pytest.approx(scale * 255 / (2**bits - 1))
    if "qnnpack" in BACKENDS:
        unchanged = converted(model, x, "qnnpack").model[0].inputs[0]  # type: ignore[index,union-attr]
        assert unchanged.scale == scale


def refusal(model: nn.Module, x: torch.Tensor, backend: str = BACKENDS[0]) -> str:
    with warnings.catch_warnings(), pytest.raises(QuantizationError) as caught:
        warnings.simplefilter("ignore")
        convert_distiller_ptq_model_to_pytorch(model, x, backend)
    return str(caught.value)


INSTEAD = "or export integers that do not need it: --export-int8 (export_int8_onnx)"


def test_a_backend_that_is_gone_is_told(tiny_cnn, monkeypatch):
    version = torch.__version__
    message = refusal(tiny_cnn, torch.randn(1, 1, 8, 8), "gone")
    assert message == (
        f"--qe-convert-pytorch: PyTorch {version} has no quantized backend 'gone' here, it has "
        f"{', '.join(BACKENDS)}; give one of them, {INSTEAD}"
    )
    monkeypatch.setattr(pytorch_int8, "_PACKAGES", ("torch.ao.nn.gone",))
    assert refusal(tiny_cnn, torch.randn(1, 1, 8, 8)) == (
        f"--qe-convert-pytorch: PyTorch {version} has no quantized modules any more "
        f"(No module named 'torch.ao.nn.gone'); take one that has, {INSTEAD}"
    )


def test_models_that_are_quantized_otherwise_are_refused(tiny_cnn):
    x = torch.randn(4, 1, 8, 8)
    assert refusal(tiny_cnn, x) == (
        "TinyCnn: PostTrainLinearQuantizer has quantized no layer of it; prepare it with that first "
        "(a trained model: --export-int8)"
    )
    model = quantized(copy.deepcopy(tiny_cnn), x, bits_activations=6)
    assert refusal(model, x) == (
        "conv1: PyTorch's backends compute with 8 bits, got 6; set bits_activations to 8, " + INSTEAD
    )
    weights_only = copy.deepcopy(tiny_cnn)
    PostTrainLinearQuantizer(weights_only, bits_activations=None).prepare_model(x)
    assert refusal(weights_only.eval(), x) == (
        "conv1: its activations are not quantized, and PyTorch's backends compute with 8 bits throughout; "
        "set bits_activations to 8, " + INSTEAD
    )
    dynamic = copy.deepcopy(tiny_cnn)
    PostTrainLinearQuantizer(dynamic).prepare_model(x)
    assert refusal(dynamic.eval(), x).startswith("conv1: its range is dynamic, that of each batch; ")


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        x = self.fc(x)
        return torch.atan(x) + x


@pytest.mark.filterwarnings("ignore:.*operations stay in floating point")
def test_operations_that_quantized_tensors_have_not_are_told():
    x = torch.randn(4, 4)
    message = refusal(quantized(Functional(), x), x)
    assert message.startswith("Functional: PyTorch cannot run it on quantized tensors: NotImplementedError: ")
    assert "'aten::atan" in message
    assert message.endswith(f"; make operations in its forward modules of distiller.modules, {INSTEAD}")


@pytest.mark.skipif("onednn" not in BACKENDS, reason="this PyTorch has no onednn")
def test_weights_that_a_backend_cannot_hold_are_told():
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    x = torch.randn(4, 2, 5, 5)
    quantized(model, x, mode="ASYMMETRIC_UNSIGNED")
    message = refusal(model, x, "onednn")
    assert message.startswith("0: the backend onednn cannot hold this layer: ")
    assert message.endswith(f"whose zero point must be 0; take another backend, {INSTEAD}")
