"""Every family of torchvision: units cut out by hand, or masked, change nothing but the size."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from distiller.channel_groups import ChannelGroup, find_channel_groups
from distiller.macs import count_macs
from tests.channel_groups.cutting import cut, first_units, masked, randomize, relative_difference

FAMILIES = {
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32, "efficientnet_v2_s": 32,
    "googlenet": 64, "inception_v3": 75, "maxvit_t": 224, "mnasnet0_5": 32, "mobilenet_v2": 32,
    "mobilenet_v3_small": 32, "regnet_y_400mf": 32, "resnext50_32x4d": 32, "shufflenet_v2_x1_0": 32,
    "swin_t": 64, "swin_v2_t": 64, "vgg11_bn": 32, "vit_b_16": 224,
}  # fmt: skip


def network(arch: str) -> nn.Module:
    extra = {"init_weights": False, "aux_logits": False} if arch in ("googlenet", "inception_v3") else {}
    model = randomize(torchvision.models.get_model(arch, weights=None, **extra))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "layer_scale" in name or name == "heads.head.weight":  # next to nothing, and zero, at first
                param.normal_(0, 0.3)
    return model


def can_be_cut_by_hand(group: ChannelGroup) -> bool:
    """Not what a layer norm would notice, nor heads: how many there are stands in the modules' code."""
    return not group.normalized_by and not any(
        part in member.name for member in group.members for part in ("in_proj", "qkv")
    )


def check(arch: str, size: int) -> None:
    model, x = network(arch), torch.randn(2, 3, size, size)
    groups = find_channel_groups(model, x[:1])
    assert groups.macs() == sum(layer.macs for layer in count_macs(model, x[:1]))

    everything = first_units(groups.removable())
    all_members, makers = (masked(model, groups, everything, makers_only) for makers_only in (False, True))
    assert relative_difference(all_members, makers, x) < 1e-5

    removed = first_units(filter(can_be_cut_by_hand, groups.removable()))
    smaller = cut(model, groups, removed)
    assert relative_difference(model, smaller, x) > 1e-3
    assert relative_difference(masked(model, groups, removed), smaller, x) < 1e-5
    assert sum(layer.macs for layer in count_macs(smaller, x[:1])) == groups.macs(removed)


def test_resnet18_has_the_2880_units_of_a_hand_count():
    groups = find_channel_groups(torchvision.models.resnet18(), torch.zeros(1, 3, 32, 32))
    # stream and the inner layers of both blocks, in four stages; the stem is of the first stream
    expected = [64, 64, 64, 128, 128, 128, 256, 256, 256, 512, 512, 512]
    assert sorted(group.size for group in groups.removable()) == expected
    assert sum(expected) == 64 * 3 + 128 * 3 + 256 * 3 + 512 * 3 == 2880


@pytest.mark.parametrize("arch", ["resnet18", "squeezenet1_1"])
def test_a_family(arch):
    check(arch, 32)


@pytest.mark.slow
@pytest.mark.parametrize("arch, size", FAMILIES.items())
def test_every_other_family(arch, size):
    check(arch, size)


def test_a_densenet_keeps_its_layers_apart():
    model = torchvision.models.DenseNet(growth_rate=5, block_config=(2, 3), num_init_features=8, bn_size=2)
    sizes = [group.size for group in find_channel_groups(model, torch.zeros(1, 3, 32, 32)).removable()]
    # stem 8; each layer 10 inside and 5 that it adds; between the blocks (8 + 2 * 5) / 2
    assert sorted(sizes) == sorted([8, *[10, 5] * 2, 9, *[10, 5] * 3])


def test_the_stream_of_a_shufflenet_is_one_unit_and_its_inner_layers_are_many():
    groups = find_channel_groups(torchvision.models.shufflenet_v2_x0_5(), torch.zeros(1, 3, 32, 32))
    [inner] = groups.of("stage3.1.branch2.0.weight", 0)
    assert (inner.is_removable, inner.size) == (True, 48)
    [stream] = groups.of("stage3.1.branch2.5.weight", 0)
    assert stream.reason == "it is all that stage3.0.branch1.2.weight has along dimension 0"
