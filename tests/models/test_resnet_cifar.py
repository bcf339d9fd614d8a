from pathlib import Path

import pytest
import torch
from torch import nn

from distiller.models import create_model
from distiller.modules import EltwiseAdd

CHECKPOINT = (
    Path(__file__).resolve().parents[2] / "../shared/compat/checkpoints/checkpoint_trained_dense.pth.tar"
)


def test_layers_have_the_names_of_distiller():
    model = create_model(False, "cifar10", "resnet20_cifar")
    block = ["conv1", "bn1", "relu1", "conv2", "bn2", "relu2"]
    assert [name for name, _ in model.named_children()] == [
        "conv1", "bn1", "relu", "layer1", "layer2", "layer3", "avgpool", "fc",
    ]  # fmt: skip
    assert [name for name, _ in model.layer1[0].named_children()] == [*block, "residual_eltwiseadd"]
    assert [name for name, _ in model.layer2[0].named_modules()][1:] == [
        *block, "downsample", "downsample.0", "downsample.1", "residual_eltwiseadd",
    ]  # fmt: skip


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_depth_is_the_number_of_convolutions_and_linear_layers(depth):
    model = create_model(False, "cifar10", f"resnet{depth}_cifar")
    layers = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and "downsample" not in name
    ]
    assert len(layers) == depth


def test_each_activation_and_addition_runs_once_a_pass_and_not_in_place():
    model = create_model(False, "cifar10", "resnet32_cifar").eval()
    calls: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.ReLU, EltwiseAdd)):
            assert not module.inplace
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))
    model(torch.zeros(1, 3, 32, 32))
    assert len(calls) == 1 + 15 * 3
    assert set(calls.values()) == {1}


def test_the_block_adds_its_input_to_what_the_convolutions_give():
    block = create_model(False, "cifar10", "resnet20_cifar").layer1[0].eval()
    x = torch.randn(2, 16, 4, 4)
    nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(x), x.relu())


@pytest.mark.skipif(
    not CHECKPOINT.exists(), reason=f"shared/compat/checkpoints/{CHECKPOINT.name} is not there"
)
def test_parameters_are_those_of_a_checkpoint_of_distiller():
    theirs = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)["state_dict"]
    ours = create_model(False, "cifar10", "resnet20_cifar").state_dict()
    # Batch normalization did not count its batches when the file was written.
    shapes = [(name, tuple(x.shape)) for name, x in ours.items() if not name.endswith("num_batches_tracked")]
    assert shapes == [(name.removeprefix("module."), tuple(x.shape)) for name, x in theirs.items()]
