import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distiller.errors import DistillerError
from distiller.graph import model_graph
from distiller.models import create_model
from distiller.names import named_modules
from distiller.pruning.activation_sites import find_activation
from distiller.pruning.activation_statistics import ActivationSite, observe


def find(model: nn.Module, layer: str) -> ActivationSite:
    return find_activation(model_graph(model, "a test"), dict(named_modules(model)), layer)


def seen_at(model: nn.Module, site: ActivationSite, images: torch.Tensor) -> torch.Tensor:
    """The activations that a site shows of one forward pass."""
    seen: list[torch.Tensor] = []
    module = dict(named_modules(model))[site.module_name]
    handle = observe(
        model, model, module, site.of_input, lambda x: seen.append((site.activation or torch.clone)(x))
    )
    model.train()(images)
    handle.remove()
    (activations,) = seen
    return activations


class Net(nn.Module):
    """conv - (whatever a test does) ; notes the activations that it computes itself."""

    def __init__(self, forward, **modules: nn.Module) -> None:
        super().__init__()
        self.input_shape = (2, 3, 6, 6)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.steps = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.steps(self, x)


def check(forward, where: str, of_input: bool, activations, **modules: nn.Module) -> None:
    """The site found, and that it shows what `activations(net, images)` computes by hand."""
    net = Net(forward, **modules)
    site = find(net, "conv")
    assert (site.module_name, site.of_input, site.channel_dim) == (where, of_input, -3)
    images = torch.randn(2, 3, 6, 6)
    expected = activations(net, images).detach()
    torch.testing.assert_close(seen_at(net, site, images), expected)


def test_behind_a_batch_norm_its_output_is_looked_at_and_the_relu_applied_anew():
    check(
        lambda net, x: net.relu(net.bn(net.conv(x))),
        "bn",
        False,
        lambda net, x: torch.relu(net.bn(net.conv(x))),
        bn=nn.BatchNorm2d(4),
        relu=nn.ReLU(),
    )


@pytest.mark.parametrize("inplace", [False, True])
def test_a_module_in_place_or_in_several_places_is_no_hindrance(inplace):
    def forward(net, x):
        return net.relu(net.other(net.relu(net.conv(x))))

    check(
        forward,
        "conv",
        False,
        lambda net, x: torch.relu(net.conv(x)),
        relu=nn.ReLU(inplace=inplace),
        other=nn.Conv2d(4, 4, 1),
    )


@pytest.mark.parametrize("function", [torch.relu, F.relu, F.relu_, torch.Tensor.relu])
def test_functions_are_activations_too(function):
    check(lambda net, x: function(net.conv(x)), "conv", False, lambda net, x: net.conv(x).clamp(min=0))


@pytest.mark.parametrize(
    ("module", "low", "high"), [(nn.ReLU6(), 0, 6), (nn.ReLU6(True), 0, 6), (nn.Hardtanh(0, 0.1), 0, 0.1)]
)
def test_relu6_as_a_module_is_applied_with_its_limits(module, low, high):
    check(
        lambda net, x: net.act(net.conv(x)),
        "conv",
        False,
        lambda net, x: net.conv(x).clamp(low, high),
        act=module,
    )


def test_a_functional_clamp_whose_limits_the_graph_does_not_say_is_seen_where_it_is_read():
    check(
        lambda net, x: net.next(F.relu6(net.conv(x))),
        "next",
        True,
        lambda net, x: net.conv(x).clamp(0, 6),
        next=nn.Conv2d(4, 4, 1),
    )


def test_behind_a_functional_addition_the_module_of_the_relu_is_looked_at():
    check(
        lambda net, x: net.relu(net.conv(x) + net.side(x)),
        "relu",
        False,
        lambda net, x: torch.relu(net.conv(x) + net.side(x)),
        side=nn.Conv2d(3, 4, 1),
        relu=nn.ReLU(inplace=True),
    )


def test_behind_functional_addition_and_relu_the_reader_is_looked_at():
    """As in the many ResNets that write F.relu(out + x)."""

    def forward(net, x):
        y = F.relu(net.conv(x) + net.side(x))
        return F.relu(net.next(y) + y)

    check(
        forward,
        "next",
        True,
        lambda net, x: torch.relu(net.conv(x) + net.side(x)),
        side=nn.Conv2d(3, 4, 1),
        next=nn.Conv2d(4, 4, 1),
    )


def test_dropout_has_no_part_in_the_activations():
    check(
        lambda net, x: net.relu(net.drop(net.conv(x))),
        "conv",
        False,
        lambda net, x: torch.relu(net.conv(x)),
        drop=nn.Dropout(0.9),
        relu=nn.ReLU(),
    )


def test_max_pooling_may_stand_before_the_relu():
    check(
        lambda net, x: F.relu(net.pool(net.conv(x))),
        "pool",
        False,
        lambda net, x: torch.relu(F.max_pool2d(net.conv(x), 2)),
        pool=nn.MaxPool2d(2),
    )


def test_of_two_activations_the_nearest_counts():
    """A pre-activation block: the addition feeds the next block's ReLU, and the next addition."""

    def forward(net, x):
        y = net.conv(x)
        return net.late(y + net.inner(net.near(y)))

    check(
        forward,
        "conv",
        False,
        lambda net, x: torch.relu(net.conv(x)),
        near=nn.ReLU(),
        inner=nn.Conv2d(4, 4, 1),
        late=nn.ReLU(),
    )


def test_linear_layers_have_their_channels_last():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
    model.input_shape = (2, 7, 3)  # type: ignore[assignment]
    site = find(model, "0")
    assert (site.module_name, site.channel_dim) == ("0", -1)


@pytest.mark.parametrize(
    ("arch", "dataset", "sites"),
    [
        (
            "resnet20_cifar",
            "cifar10",
            {
                "conv1": "bn1",
                "layer1.0.conv1": "layer1.0.bn1",
                "layer1.0.conv2": "layer1.0.residual_eltwiseadd",
                "layer2.0.downsample.0": "layer2.0.residual_eltwiseadd",
                "layer3.2.conv2": "layer3.2.residual_eltwiseadd",
            },
        ),
        ("preact_resnet20_cifar", "cifar10", {"layer1.0.conv1": "layer1.0.bn"}),
        ("simplenet_mnist", "mnist", {"conv1": "conv1", "conv2": "conv2", "fc1": "fc1"}),
        ("lenet5", "mnist", {"fc1": "fc1"}),
        ("mobilenet_v2", "imagenet", {"features.1.conv.0.0": "features.1.conv.0.1"}),
    ],
)
def test_models_of_the_zoo(arch, dataset, sites):
    model = create_model(False, dataset, arch, parallel=False)
    found = {layer: find(model, layer) for layer in sites}
    assert {layer: site.module_name for layer, site in found.items()} == sites
    assert not any(site.of_input for site in found.values())


def text_of(model: nn.Module, layer: str) -> str:
    with pytest.raises(DistillerError) as error:
        find(model, layer)
    return str(error.value)


def test_a_layer_without_an_activation_is_refused():
    model = create_model(False, "mnist", "lenet5", parallel=False)
    assert text_of(model, "conv1") == (
        "no ReLU follows 'conv1' (over batch norm, dropout, element-wise addition and max-pooling), "
        "got Conv 'conv2'; take a pruner that does not look at activations"
    )
    assert "got the output of the model; take" in text_of(model, "fc2")


@pytest.mark.parametrize("activation", [nn.LeakyReLU(), nn.Hardtanh(), nn.GELU()])
def test_activations_that_are_never_zero_are_none(activation):
    net = Net(lambda net, x: net.act(net.conv(x)), act=activation)
    assert text_of(net, "conv").startswith("no ReLU follows 'conv' (")


def test_an_activation_that_no_module_shows_is_refused():
    net = Net(lambda net, x: F.relu(net.conv(x) + x.sum()).sum())
    assert text_of(net, "conv") == (
        "the activation 'Relu' behind 'conv' cannot be seen: neither what feeds it nor what reads it is a "
        "module that is called once, nor is it itself; make it a module of its own, as nn.ReLU()"
    )


def test_a_layer_that_is_called_twice_is_refused():
    net = Net(lambda net, x: F.relu(net.conv(x)) + F.relu(net.conv(x + 1)))
    assert text_of(net, "conv") == (
        "the model must call 'conv' once for its activations to be known, got 2 calls; take a pruner that "
        "does not look at activations"
    )


def test_other_layers_are_refused():
    net = Net(lambda net, x: F.relu(net.up(net.conv(x))), up=nn.ConvTranspose2d(4, 2, 2))
    assert text_of(net, "up") == (
        "only filters of convolutions and linear layers have activations to rank by, got ConvTranspose2d 'up'"
    )


def test_a_batch_norm_that_is_shared_is_not_looked_at():
    def forward(net, x):
        return net.first(net.bn(net.conv(x))) + net.second(net.bn(net.side(x)))

    check(
        forward,
        "first",
        False,
        lambda net, x: torch.relu(net.bn(net.conv(x))),
        bn=nn.BatchNorm2d(4),
        side=nn.Conv2d(3, 4, 1),
        first=nn.ReLU(),
        second=nn.ReLU(),
    )
