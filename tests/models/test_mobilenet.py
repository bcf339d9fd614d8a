import pytest
import torch
from torch import nn

from distiller.model_summaries import total_macs
from distiller.models import create_model


@pytest.mark.parametrize(
    ("arch", "millions", "macs"),
    [
        ("mobilenet", 4.2, 569),
        ("mobilenet_075", 2.6, 325),
        ("mobilenet_050", 1.3, 149),
        ("mobilenet_025", 0.5, 41),
    ],
)
def test_networks_have_the_sizes_of_the_paper(arch, millions, macs):
    """Table 6 of "MobileNets", in millions."""
    model = create_model(False, None, arch)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
    assert round(total_macs(model, (1, 3, 224, 224)) / 1e6) == macs


def test_layers_have_the_names_of_distiller():
    model = create_model(False, None, "mobilenet")
    assert [name for name, _ in model.named_children()] == ["model", "fc"]
    layers = [type(layer) for layer in model.model]
    assert layers == [nn.Sequential] * 14 + [nn.AdaptiveAvgPool2d]
    convolution = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert [type(layer) for layer in model.model[0]] == convolution
    for separable in model.model[1:14]:
        assert [type(layer) for layer in separable] == 2 * convolution
        assert separable[0].groups == separable[0].in_channels == separable[0].out_channels
        assert separable[3].kernel_size == (1, 1)
        assert not separable[2].inplace


def test_an_untrained_network_passes_the_signal_on():
    """PyTorch's own start values leave 3e-11 of it, as batch normalization does nothing before training."""
    torch.manual_seed(0)
    model = create_model(False, "imagenet", "mobilenet").eval()
    with torch.no_grad():
        features = model.model[:14](torch.randn(1, 3, 224, 224))
    assert 0.1 < features.square().mean().sqrt() < 3


def test_dropout_changes_training_alone_and_no_names():
    plain = create_model(False, "cifar10", "mobilenet").eval()
    dropping = create_model(False, "cifar10", "mobilenet_v1_dropout").eval()
    dropping.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(dropping(x), plain(x))
    dropping.dropout.train()
    assert not torch.equal(dropping(x), plain(x))


@pytest.mark.parametrize("suffix", ["", "_050", "_025"])
def test_the_small_networks_are_the_others_with_a_first_stride_of_1(suffix):
    small = create_model(False, None, f"mobilenet{suffix}_cifar")
    large = create_model(False, "cifar10", f"mobilenet{suffix}")
    assert small.model[0][0].stride == (1, 1)
    small.load_state_dict(large.state_dict())
    small.model[0][0].stride = (2, 2)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(small.eval()(x), large.eval()(x))
