import pytest
import torch
from torch import nn
from torch.nn import functional

from distiller.errors import UnknownNameError
from distiller.models import create_model, find_spec
from distiller.modules import EltwiseAdd


def on_meta(depth: int) -> nn.Module:
    with torch.device("meta"):
        return create_model(False, None, f"preact_resnet{depth}")


@pytest.mark.parametrize(
    ("depth", "count"),
    [(18, 11_695_796), (34, 21_811_380), (50, 25_595_060), (101, 44_639_412), (152, 60_329_140)],
)
def test_networks_have_the_sizes_of_gluons_resnet_v2(depth, count):
    """Its counts include running statistics and the normalization of three input channels, which is not here."""
    state = {
        name: value
        for name, value in on_meta(depth).state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert sum(value.numel() for value in state.values()) == count - 4 * 3


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_depth_is_the_number_of_convolutions_and_linear_layers(depth):
    layers = [
        name
        for name, module in on_meta(depth).named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not name.endswith("downsample")
    ]
    assert len(layers) == depth


def test_defect_preact_resnet182_is_preact_resnet152():
    """DEFECT of Distiller: it misspelt the name of the deepest one, which was not to be had."""
    assert find_spec("preact_resnet152").arch == "preact_resnet152"
    with pytest.raises(UnknownNameError, match="unknown architecture 'preact_resnet182'"):
        create_model(False, "imagenet", "preact_resnet182")


def test_layers_have_names_in_the_order_in_which_they_run():
    model = on_meta(50)
    assert [name for name, _ in model.named_children()] == [
        "conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4",
        "final_bn", "final_relu", "avgpool", "fc",
    ]  # fmt: skip
    assert [name for name, _ in model.layer1[0].named_children()] == [
        "pre_bn", "pre_relu", "conv1", "bn1", "relu1", "conv2", "bn2", "relu2", "conv3",
        "downsample", "residual_eltwiseadd",
    ]  # fmt: skip
    assert not [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.ReLU, EltwiseAdd)) and module.inplace
    ]


def test_a_bottleneck_adds_its_input_or_the_convolved_pre_activation():
    stage = create_model(False, "cifar10", "preact_resnet50").layer1.eval()
    for block in stage:
        nn.init.zeros_(block.conv3.weight)
    x = torch.randn(2, 64, 4, 4)
    first = stage[0](x)
    expected = functional.conv2d(stage[0].pre_bn(x).relu(), stage[0].downsample.weight)
    torch.testing.assert_close(first, expected)
    assert torch.equal(stage[1](first), first)
