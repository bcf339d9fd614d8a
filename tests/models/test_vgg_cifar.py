import pytest
import torch
from torch import nn

from distiller.models import create_model


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
@pytest.mark.parametrize("suffix", ["_cifar", "_bn_cifar"])
def test_depth_counts_the_original_three_linear_layers(depth, suffix):
    model = create_model(False, "cifar10", f"vgg{depth}{suffix}")
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(convolutions) == depth - 3
    assert len(norms) == (len(convolutions) if "bn" in suffix else 0)


@pytest.mark.parametrize(
    ("depth", "count"), [(11, 9_231_114), (13, 9_416_010), (16, 14_728_266), (19, 20_040_522)]
)
def test_networks_with_batch_norm_have_the_published_sizes(depth, count):
    model = create_model(False, "cifar10", f"vgg{depth}_bn_cifar")
    assert sum(p.numel() for p in model.parameters()) == count


def test_minivgg_has_one_convolution_a_stage_and_the_published_size():
    model = create_model(False, "cifar10", "minivgg_cifar")
    assert sum(p.numel() for p in model.parameters()) == 1_575_690
    assert len(model.features) == 20


@pytest.mark.parametrize("arch", ["vgg13_bn{}_cifar", "minivgg{}_cifar"])
@pytest.mark.parametrize(("suffix", "width"), [("_050", 2), ("_025", 4)])
def test_a_narrow_network_has_that_share_of_every_layers_channels(arch, suffix, width):
    whole = create_model(False, "cifar10", arch.format(""))
    narrow = create_model(False, "cifar10", arch.format(suffix))
    convolutions = [
        [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
        for model in (whole, narrow)
    ]
    assert [channels // width for channels in convolutions[0]] == convolutions[1]
    assert narrow.classifier.in_features == 512 // width


def test_convolutions_have_the_names_of_distiller():
    model = create_model(False, "cifar10", "vgg16_cifar")
    positions = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
    weights = [f"features.{position}.weight" for position in positions]
    assert [name for name, p in model.named_parameters() if p.dim() == 4] == weights
    assert [name for name, _ in model.named_children()] == ["features", "classifier"]


def test_larger_images_are_averaged():
    model = create_model(False, "cifar10", "vgg11_cifar").eval()
    features = torch.randn(1, 512, 2, 2)
    model.features = nn.Identity()
    torch.testing.assert_close(model(features), model.classifier(features.mean((2, 3))))
