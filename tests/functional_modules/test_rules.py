import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distiller.functional_modules import to_modules
from distiller.functional_modules.rules import COMPUTING, rule_for
from distiller.modules import (
    BatchMatmul,
    Concat,
    EltwiseAdd,
    EltwiseDiv,
    EltwiseMult,
    EltwiseSub,
    Matmul,
    Mean,
    Stack,
)

CALLS = {
    "x + y": (lambda x: x + x, EltwiseAdd(), "Add"),
    "torch.add": (lambda x: torch.add(x, 2), EltwiseAdd(), "Add"),
    "x.sub": (lambda x: x.sub(x.mT.mT), EltwiseSub(), "Sub"),
    "3 - x": (lambda x: 3 - x, EltwiseSub(), "Rsub"),
    "3 * x": (lambda x: 3 * x, EltwiseMult(), "Mul"),
    "torch.multiply": (lambda x: torch.multiply(x, x), EltwiseMult(), "Mul"),
    "x / y": (lambda x: x / 3, EltwiseDiv(), "Div"),
    "torch.true_divide": (lambda x: torch.true_divide(x, x), EltwiseDiv(), "Div"),
    "torch.cat": (lambda x: torch.cat([x, x], dim=-1), Concat(-1), "Concat"),
    "torch.concat": (lambda x: torch.concat((x, x)), Concat(0), "Concat"),
    "torch.stack": (lambda x: torch.stack([x, x], 2), Stack(2), "Stack"),
    "x @ y": (lambda x: x @ x.mT, Matmul(), "MatMul"),
    "torch.matmul": (lambda x: torch.matmul(x, other=x.mT), Matmul(), "MatMul"),
    "torch.bmm": (lambda x: torch.bmm(x[0], mat2=x[0].mT), BatchMatmul(), "MatMul"),
    "torch.einsum": (lambda x: torch.einsum("abij,abkj->abik", x, x), Matmul(), "Einsum"),
    "einsum of a list": (lambda x: torch.einsum("abji,abjk -> abik", [x, x]), Matmul(), "Einsum"),
    "x.mean": (lambda x: x.mean([2, 3], keepdim=True), Mean((2, 3), True), "ReduceMean"),
    "torch.mean": (lambda x: torch.mean(x, -1), Mean(-1), "ReduceMean"),
    "mean of all": (lambda x: x.mean(), Mean(), "ReduceMean"),
    "F.relu": (lambda x: F.relu(x), nn.ReLU(), "Relu"),
    "x.relu": (lambda x: x.relu(), nn.ReLU(), "Relu"),
    "F.relu6": (lambda x: F.relu6(x), nn.ReLU6(), "Clip"),
    "F.hardtanh": (lambda x: F.hardtanh(x, -2, 3), nn.Hardtanh(-2, 3), "Clip"),
    "x.clamp": (lambda x: x.clamp(0, 6), nn.Hardtanh(0, 6), "Clip"),
    "torch.clip": (lambda x: torch.clip(x, min=-1.0, max=1.0), nn.Hardtanh(-1.0, 1.0), "Clip"),
    "F.hardswish": (lambda x: F.hardswish(x), nn.Hardswish(), "Hardswish"),
    "F.hardsigmoid": (lambda x: F.hardsigmoid(x), nn.Hardsigmoid(), "Hardsigmoid"),
    "F.leaky_relu": (lambda x: F.leaky_relu(x, 0.2), nn.LeakyReLU(0.2), "LeakyRelu"),
    "F.elu": (lambda x: F.elu(x, alpha=0.5), nn.ELU(0.5), "Elu"),
    "F.selu": (lambda x: F.selu(x), nn.SELU(), "Selu"),
    "F.silu": (lambda x: F.silu(x), nn.SiLU(), "Silu"),
    "F.mish": (lambda x: F.mish(x), nn.Mish(), "Mish"),
    "F.gelu": (lambda x: F.gelu(x, approximate="tanh"), nn.GELU("tanh"), "Gelu"),
    "torch.sigmoid": (lambda x: torch.sigmoid(x), nn.Sigmoid(), "Sigmoid"),
    "x.tanh": (lambda x: x.tanh(), nn.Tanh(), "Tanh"),
    "F.softplus": (lambda x: F.softplus(x, beta=2), nn.Softplus(2), "Softplus"),
    "F.softmax": (lambda x: F.softmax(x, dim=-1), nn.Softmax(-1), "Softmax"),
    "x.softmax": (lambda x: x.softmax(1), nn.Softmax(1), "Softmax"),
    "F.log_softmax": (lambda x: F.log_softmax(x, 1), nn.LogSoftmax(1), "LogSoftmax"),
    "F.avg_pool2d": (
        lambda x: F.avg_pool2d(x, 2, 1, 1, False, False),
        nn.AvgPool2d(2, 1, 1, False, False),
        "AveragePool",
    ),
    "pool of a size": (lambda x: F.avg_pool2d(x, x.shape[2:]), nn.AvgPool2d((4, 4)), "AveragePool"),
    "F.avg_pool1d": (lambda x: F.avg_pool1d(x[0], 2), nn.AvgPool1d(2), "AveragePool"),
    "F.max_pool2d": (
        lambda x: F.max_pool2d(x, (3, 2), padding=1),
        nn.MaxPool2d((3, 2), padding=1),
        "MaxPool",
    ),
    "F.adaptive_avg_pool2d": (
        lambda x: F.adaptive_avg_pool2d(x, (1, 1)),
        nn.AdaptiveAvgPool2d((1, 1)),
        "AveragePool",
    ),
    "F.adaptive_max_pool1d": (lambda x: F.adaptive_max_pool1d(x[0], 2), nn.AdaptiveMaxPool1d(2), "MaxPool"),
    "F.max_pool3d": (lambda x: F.max_pool3d(x, 2), nn.MaxPool3d(2), "MaxPool"),
}


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.function = function

    def forward(self, x):
        return self.function(self.first(x))


@pytest.mark.parametrize("call", CALLS)
def test_each_function_becomes_the_module_that_stands_for_it(call):
    function, module, word = CALLS[call]
    model, x = nn.Sequential(Calls(function)).eval(), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        expected = model(x)
        report = to_modules(model, x)
        assert torch.equal(model(x), expected)
    ((site, name),) = report.modules.items()
    assert site == f"0.{word}"
    assert repr(model.get_submodule(name)) == repr(module)
    assert report.left == ()


REFUSED = {
    "add": (lambda x: torch.add(x, x, alpha=2), "it has a factor (alpha)"),
    "div": (lambda x: torch.div(x, x, rounding_mode="floor"), None),
    "clamp": (lambda x: x.clamp(min=0), "its bounds are not two numbers"),
    "softmax": (lambda x: F.softmax(x, dim=-1, dtype=torch.float64), "it has no dimension, or a type"),
    "mean": (lambda x: x.mean(1, dtype=torch.float64), "it has a type"),
    "einsum": (lambda x: torch.einsum("abij->abji", x) * 1, "it is not a product of two matrices"),
    "exp": (lambda x: x.exp(), "no module stands for it"),
    "conv2d": (lambda x: F.conv2d(x, torch.ones(1, 4, 1, 1)), "no module stands for it"),
    "linear": (
        lambda x: F.linear(x, torch.ones(1, 4)),
        "its weights are not those of a linear layer among the children",
    ),
}


@pytest.mark.parametrize("name", [name for name in REFUSED if REFUSED[name][1] is not None])
def test_a_call_that_no_module_makes_is_left(name):
    function, reason = REFUSED[name]
    report = to_modules(nn.Sequential(Calls(function)), torch.randn(2, 3, 4, 4))
    assert [(left.operations, left.reason) for left in report.left] == [((name,), reason)]


def test_an_argument_that_no_module_takes_is_named():
    report = to_modules(nn.Sequential(Calls(REFUSED["div"][0])), torch.randn(2, 3, 4, 4))
    assert report.left[0].reason.startswith("no module takes its arguments (")
    assert "rounding_mode" in report.left[0].reason


def test_a_function_in_place_whose_module_works_out_of_place_only_is_left():
    def forward(x):
        view = x.view(-1)
        x.sigmoid_()
        return x * view[0]

    report = to_modules(nn.Sequential(Calls(forward)), torch.randn(2, 3, 4, 4))
    assert [left.reason for left in report.left] == [
        "it works in place, and something else reads the overwritten tensor"
    ]


def test_a_setting_taken_from_a_size_is_checked():
    model = nn.Sequential(Calls(lambda x: F.avg_pool2d(x, x.size(3)))).eval()
    to_modules(model, torch.randn(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"inputs of another form \(4 then, 6 now\)"):
        model(torch.randn(2, 3, 6, 6))


def test_every_rule_has_a_word_of_the_graph():
    assert all(rule_for(name).word[0].isupper() for name in COMPUTING - {"einsum", "linear"})
    assert rule_for("exp") is None
