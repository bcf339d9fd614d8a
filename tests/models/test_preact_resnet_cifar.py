import pytest
import torch
from torch import nn
from torch.nn import functional

from distiller.model_summaries import total_macs
from distiller.models import create_model
from distiller.modules import EltwiseAdd


def test_layers_have_the_names_of_distiller():
    model = create_model(False, "cifar10", "preact_resnet20_cifar")
    assert [name for name, _ in model.named_children()] == [
        "conv1", "layer1", "layer2", "layer3", "final_bn", "final_relu", "avgpool", "fc",
    ]  # fmt: skip
    block = ["pre_bn", "pre_relu", "conv1", "bn", "relu", "conv2"]
    assert [name for name, _ in model.layer1[0].named_children()] == [*block, "residual_eltwiseadd"]
    assert [name for name, _ in model.layer2[0].named_children()] == [
        *block, "downsample", "residual_eltwiseadd",
    ]  # fmt: skip


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
@pytest.mark.parametrize("suffix", ["", "_conv_ds"])
def test_depth_is_the_number_of_convolutions_and_linear_layers(depth, suffix):
    model = create_model(False, "cifar10", f"preact_resnet{depth}_cifar{suffix}")
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    shortcuts = [name for name in layers if name.endswith("downsample")]
    assert len(layers) - len(shortcuts) == depth
    assert shortcuts == (["layer2.0.downsample", "layer3.0.downsample"] if suffix else [])


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_networks_have_the_sizes_of_the_paper(depth, millions):
    """Table 6 of "Deep Residual Learning": where batch normalization stands changes nothing here."""
    model = create_model(False, "cifar10", f"preact_resnet{depth}_cifar")
    digits = 1 if millions > 1 else 2
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, digits) == millions


def test_shortcuts_without_parameters_cost_nothing():
    # 3 and 18 convolutions of 442,368 and 2,359,296 MACs, the first of a stage half of that, and 640.
    expected = 442_368 + 16 * 2_359_296 + 2 * 1_179_648 + 640
    plain, with_convolutions = (
        total_macs(create_model(False, "cifar10", f"preact_resnet20_cifar{suffix}"), (1, 3, 32, 32))
        for suffix in ("", "_conv_ds")
    )
    assert plain == expected
    assert with_convolutions == expected + 2 * 131_072  # 16 * 32 * 16 * 16 = 32 * 64 * 8 * 8


def test_each_activation_and_addition_runs_once_a_pass_and_not_in_place():
    model = create_model(False, "cifar10", "preact_resnet32_cifar").eval()
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.ReLU, EltwiseAdd)):
            assert not module.inplace
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    model(torch.zeros(1, 3, 32, 32))
    assert len(calls) == 1 + 15 * 3
    assert set(calls.values()) == {1}


def test_the_shortcut_of_a_block_is_the_identity():
    block = create_model(False, "cifar10", "preact_resnet20_cifar").layer1[1].eval()
    x = torch.randn(2, 16, 4, 4)
    nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(x), x)


@pytest.mark.parametrize("size", [8, 7])
def test_a_shortcut_without_parameters_averages_and_adds_channels_of_zeros(size):
    block = create_model(False, "cifar10", "preact_resnet20_cifar").layer2[0].eval()
    x = torch.randn(2, 16, size, size)
    nn.init.zeros_(block.conv2.weight)
    out = block(x)
    assert out.shape == (2, 32, 4, 4)
    torch.testing.assert_close(out[:, 8:24, :3, :3], x[:, :, :6, :6].reshape(2, 16, 3, 2, 3, 2).mean((3, 5)))
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_a_convolution_in_the_shortcut_sees_the_pre_activated_input():
    block = create_model(False, "cifar10", "preact_resnet20_cifar_conv_ds").layer2[0].eval()
    x = torch.randn(2, 16, 8, 8)
    nn.init.zeros_(block.conv2.weight)
    expected = functional.conv2d(block.pre_bn(x).relu(), block.downsample.weight, stride=2)
    torch.testing.assert_close(block(x), expected)
