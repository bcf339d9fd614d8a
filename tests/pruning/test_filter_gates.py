from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distiller.errors import DistillerError, GraphTraceError
from distiller.names import named_modules, named_parameters
from distiller.pruning.filter_gates import gate_parameters, graph_of_norms


class Net(nn.Module):
    """A forward of a test's own over modules of its own."""

    def __init__(self, forward, input_shape: tuple[int, ...] = (1, 3, 8, 8), **modules: nn.Module) -> None:
        super().__init__()
        self.input_shape = input_shape
        self.steps = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.steps(self, x)


def gate(model: nn.Module, param_name: str) -> tuple[str, ...]:
    names = [name for name, _ in named_parameters(model)]
    return gate_parameters(param_name, names, graph_of_norms(model, "a test"), dict(named_modules(model)))


def conv(**settings) -> nn.Conv2d:
    return nn.Conv2d(3, 4, 3, padding=1, **settings)


def has_scale(model: nn.Module) -> bool:
    """Whether the loss depends on the scale of the filters of `conv`."""
    out = model.double().train()(torch.randn(6, 3, 8, 8, dtype=torch.float64))
    (out * torch.randn(out.shape)).sum().backward()
    weight = model.get_parameter("conv.weight")
    assert weight.grad is not None
    parts = (weight * weight.grad).flatten(1)
    return bool((parts.sum(1).abs() > 1e-6 * parts.abs().sum(1)).any())


@pytest.mark.parametrize(
    ("forward", "norm"),
    [
        (lambda net, x: net.bn(net.conv(x)), nn.BatchNorm2d),
        (lambda net, x: net.bn(F.dropout(net.conv(x), training=net.training)), nn.BatchNorm2d),
        (lambda net, x: net.bn(torch.relu(net.conv(x))), nn.BatchNorm2d),
        (lambda net, x: net.bn(F.leaky_relu(net.conv(x))), nn.BatchNorm2d),
        (lambda net, x: net.bn(F.max_pool2d(F.avg_pool2d(net.conv(x), 2), 2)), nn.BatchNorm2d),
        (lambda net, x: net.bn(net.conv(x).mean((2, 3))), nn.BatchNorm1d),
        (lambda net, x: net.bn(F.adaptive_max_pool2d(net.conv(x), 1).flatten(1)), nn.BatchNorm1d),
        (lambda net, x: net.bn(net.conv(net.bn(net.conv(x))[:, :3])), nn.BatchNorm2d),
    ],
    ids="norm dropout relu leaky_relu pooling mean flattening called_twice".split(),
)
def test_a_norm_that_takes_the_scale_of_the_filters_away_is_the_gate(forward, norm):
    model = Net(forward, conv=conv(bias=False), bn=norm(4, eps=1e-12))
    assert gate(model, "conv.weight") == ("bn.weight", "bn.bias")
    assert not has_scale(model)


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.bn(torch.sigmoid(net.conv(x))),
        lambda net, x: net.bn(net.conv(x) + net.other(x)),
        lambda net, x: net.bn(torch.cat([net.conv(x)[:, :2], x[:, :2]], 1)),
        lambda net, x: net.conv(x) + net.bn(net.other(x)),
        lambda net, x: (lambda y: net.bn(y) + y)(net.conv(x)),
    ],
    ids="sigmoid sum concatenation none read_twice".split(),
)
def test_elsewhere_it_is_the_layers_own_weight_and_bias(forward):
    model = Net(forward, conv=conv(), other=conv(), bn=nn.BatchNorm2d(4))
    assert gate(model, "conv.weight") == ("conv.weight", "conv.bias")
    model.conv.bias = None  # type: ignore[assignment]
    assert gate(model, "conv.weight") == ("conv.weight",)
    assert has_scale(model)


def test_a_layer_that_the_model_also_returns_has_its_own():
    model = Net(lambda net, x: (lambda y: (y, net.bn(y)))(net.conv(x)), conv=conv(), bn=nn.BatchNorm2d(4))
    assert gate(model, "conv.weight") == ("conv.weight", "conv.bias")


@pytest.mark.parametrize(("shape", "found"), [((5, 7), "norm"), ((2, 4, 7), "layer")])
def test_behind_a_linear_layer_on_sequences_a_norm_has_other_channels(shape, found):
    model = Net(lambda net, x: net.norm(net.layer(x)), shape, layer=nn.Linear(7, 4), norm=nn.BatchNorm1d(4))
    assert gate(model, "layer.weight") == (f"{found}.weight", f"{found}.bias")


def test_filters_without_an_output_of_their_own_have_their_weights_alone():
    """The first dimension of a transposed convolution's weight is that of its inputs."""
    model = Net(
        lambda net, x: net.bn(net.up(x)).sum() + net.rnn(x[0])[0].sum(),
        up=nn.ConvTranspose2d(3, 3, 3),
        bn=nn.BatchNorm2d(3),
        rnn=nn.LSTM(8, 2),
    )
    for name in ("up.weight", "rnn.weight_ih_l0"):
        assert gate(model, name) == (name,)
    assert gate(Net(None, layer=nn.Embedding(3, 4)), "layer.weight") == ("layer.weight",)


def test_a_norm_without_beta_is_a_gate_of_gamma():
    model = Net(lambda net, x: net.bn(net.conv(x)), conv=conv(), bn=nn.BatchNorm2d(4))
    model.bn.bias = None  # type: ignore[assignment]
    assert gate(model, "conv.weight") == ("bn.weight",)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: model])
def test_names_are_canonical(wrap):
    model = nn.Sequential(conv(), nn.BatchNorm2d(4))
    model.input_shape = (1, 3, 8, 8)  # type: ignore[assignment]
    assert gate(wrap(model), "0.weight") == ("1.weight", "1.bias")


def test_a_model_without_norms_is_not_traced():
    def depends_on_values(net, x):
        return net.conv(x) if x.sum() > 0 else x

    assert graph_of_norms(Net(depends_on_values, conv=conv()), "a test") is None
    with pytest.raises(GraphTraceError, match="for a test"):
        graph_of_norms(Net(depends_on_values, conv=conv(), bn=nn.BatchNorm2d(4)), "a test")


NO_GAMMA = (
    "the batch norm '{}' behind it has no gamma of its own to rank by; make it a module with affine=True, or "
    "take a pruner that does not look at gradients"
)
NOT_ALONE = (
    "the batch norm 'bn' must be behind every call of 'conv', and behind nothing else, for its gamma to tell "
    "about the filters; give each layer one of its own, or take a pruner that does not look at gradients"
)


@pytest.mark.parametrize(
    ("forward", "text"),
    [
        (lambda net, x: net.plain(net.conv(x)), NO_GAMMA.format("plain")),
        (
            lambda net, x: F.batch_norm(net.conv(x), None, None, training=True),
            NO_GAMMA.format("BatchNormalization"),
        ),
        (lambda net, x: net.bn(net.conv(x)) + net.bn(net.other(x)), NOT_ALONE),
        (lambda net, x: net.bn(net.conv(x)) + torch.sigmoid(net.conv(x)), NOT_ALONE),
        (lambda net, x: net.bn(net.conv(x)) + net.bn2(net.conv(x)), NOT_ALONE),
    ],
    ids="not_affine function shared only_once two_norms".split(),
)
def test_norms_that_do_not_tell_about_the_filters_are_refused(forward, text):
    model = Net(
        forward,
        conv=conv(),
        other=conv(),
        plain=nn.BatchNorm2d(4, affine=False),
        bn=nn.BatchNorm2d(4),
        bn2=nn.BatchNorm2d(4),
    )
    with pytest.raises(DistillerError) as error:
        gate(model, "conv.weight")
    assert str(error.value) == text
