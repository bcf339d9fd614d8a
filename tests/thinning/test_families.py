"""Every family of torchvision and the whole zoo: thinned by 30 % of every group, they answer as when masked."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.maxvit import MaxVit
from torchvision.models.resnet import BasicBlock
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

from distiller.channel_groups import find_channel_groups
from distiller.models import create_model
from distiller.registry import MODELS
from tests.thinning.proof import check_thinning

# One member of each family, and the size of its images; those with auxiliary classifiers have them.
FAMILIES = {
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32, "efficientnet_v2_s": 32,
    "googlenet": 64, "inception_v3": 299, "maxvit_t": 224, "mnasnet0_5": 32, "mobilenet_v2": 32,
    "mobilenet_v3_small": 32, "regnet_y_400mf": 32, "resnet50": 32, "resnext50_32x4d": 32,
    "shufflenet_v2_x1_0": 32, "squeezenet1_1": 32, "swin_t": 64, "swin_v2_t": 64, "vgg11_bn": 32,
    "vit_b_16": 224, "wide_resnet50_2": 32,
}  # fmt: skip
ZOO = [name for name in MODELS if MODELS[name].dataset in ("cifar10", "mnist")]  # type: ignore[attr-defined]
QUICK = ("simplenet_cifar", "lenet5", "simplenet_v2_mnist", "plain20_cifar_nobn", "preact_resnet20_cifar_conv_ds",
         "resnet20_cifar")  # fmt: skip


def torchvision_model(arch: str) -> nn.Module:
    extra = {"init_weights": False} if arch in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(arch, weights=None, num_classes=10, **extra)


SMALL: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet": (partial(torchvision.models.ResNet, BasicBlock, [1, 1, 1, 1], num_classes=10), 32),
    "squeezenet": (partial(torchvision_model, "squeezenet1_1"), 32),
    "shufflenet": (
        partial(torchvision.models.ShuffleNetV2, [1, 2, 1], [24, 16, 32, 64, 32], num_classes=10), 32,
    ),
    "densenet": (
        partial(torchvision.models.DenseNet, 6, (2, 2), 8, bn_size=2, num_classes=10), 32,
    ),
    "convnext": (
        partial(
            torchvision.models.ConvNeXt, [CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)], num_classes=10
        ), 32,
    ),
    "vit": (partial(torchvision.models.VisionTransformer, 16, 4, 2, 4, 16, 24, num_classes=10), 16),
    "swin": (partial(SwinTransformer, [4, 4], 12, [2, 1], [3, 6], [2, 2], num_classes=10), 24),
    "swin_v2": (
        partial(
            SwinTransformer, [4, 4], 12, [2, 1], [3, 6], [2, 2], num_classes=10,
            block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2,
        ), 24,
    ),
    "maxvit": (
        partial(
            MaxVit, input_size=(32, 32), stem_channels=8, partition_size=2, block_channels=[12],
            block_layers=[1], head_dim=4, stochastic_depth_prob=0.0, num_classes=10,
        ), 32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", SMALL)
def test_a_small_member_of_a_family(family):
    build, size = SMALL[family]
    has_layers_of_its_own = family in ("convnext", "vit", "swin", "swin_v2", "maxvit")
    check_thinning(build, torch.randn(2, 3, size, size), rounds=2 if has_layers_of_its_own else 1)


def zoo_model(arch: str) -> nn.Module:
    return create_model(False, None, arch)


@pytest.mark.parametrize("arch", QUICK)
def test_a_model_of_the_zoo(arch):
    check_thinning(partial(zoo_model, arch), torch.randn(2, *zoo_model(arch).input_shape[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [name for name in ZOO if name not in QUICK])
def test_every_other_model_of_the_zoo(arch):
    check_thinning(partial(zoo_model, arch), torch.randn(2, *zoo_model(arch).input_shape[1:]))


@pytest.mark.slow
@pytest.mark.parametrize("arch, size", FAMILIES.items())
def test_every_family(arch, size):
    check_thinning(partial(torchvision_model, arch), torch.randn(2, 3, size, size), rounds=2)


def test_attention_of_a_single_head_leaves_the_channels_of_its_input_apart():
    model = MaxVit(
        input_size=(32, 32), stem_channels=8, partition_size=2, block_channels=[12], block_layers=[1],
        head_dim=12, stochastic_depth_prob=0.0, num_classes=10,
    )  # fmt: skip
    groups = find_channel_groups(model, torch.zeros(1, 3, 32, 32))
    attention = "blocks.0.layers.0.layers.grid_attention.attn_layer.1"
    [heads] = groups.of(f"{attention}.to_qkv.weight", 0)
    assert (heads.size, heads.reason) == (
        1,
        f"it is all that {attention}.to_qkv.weight has along dimension 0",
    )
    [stream] = groups.of(f"{attention}.to_qkv.weight", 1)
    assert (stream.size, stream.reason) == (12, None)
