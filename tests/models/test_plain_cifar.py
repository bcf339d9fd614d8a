import torch
from torch import nn

from distiller.model_summaries import total_macs
from distiller.models import create_model


def test_the_network_is_resnet20_without_its_shortcuts():
    plain = create_model(False, "cifar10", "plain20_cifar").state_dict()
    residual = create_model(False, "cifar10", "resnet20_cifar").state_dict()
    assert [(name, value.shape) for name, value in plain.items()] == [
        (name, value.shape) for name, value in residual.items() if "downsample" not in name
    ]


def test_weights_are_as_many_as_distiller_logs():
    model = create_model(False, "cifar10", "plain20_cifar")
    assert sum(p.numel() for p in model.parameters() if p.dim() > 1) == 268_336
    # The published 40.6 M of ResNet-20 with shortcuts that have no parameters.
    assert total_macs(model, (1, 3, 32, 32)) == 40_551_040


def test_each_layer_of_a_block_has_a_name_and_runs_once():
    block = create_model(False, "cifar10", "plain20_cifar").layer1[0]
    ran: list[str] = []
    for name, module in block.named_children():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    block(torch.zeros(1, 16, 8, 8))
    assert ran == ["conv1", "bn1", "relu1", "conv2", "bn2", "relu2"]


def test_without_batch_normalization_the_convolutions_have_biases():
    with_norms = create_model(False, "cifar10", "plain20_cifar")
    without = create_model(False, "cifar10", "plain20_cifar_nobn")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in without.modules())
    for name, module in with_norms.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            assert not without.get_submodule(name).bias.any()
