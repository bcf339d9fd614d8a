"""Residual networks for 32x32 images with one early exit.

    layer1.2.relu2 -> average pooling 3x3 -> flatten -> linear

The layers have the names of the networks without exits; the exit's are below `layer1.2.relu2.branch_net`.
Knows nothing about when an image leaves.
"""

from __future__ import annotations

from torch import nn

from distiller.branch_points import attach_exits, exits_of
from distiller.models.resnet_cifar import ResNetCifar
from distiller.models.spec import ModelSpec, register_model

_CHANNELS, _POOL = 16, 3


class ResNetCifarEarlyExit(ResNetCifar):
    """`ResNetCifar` with an exit behind its third block.

    Args:
        num_classes: number of outputs.
        in_channels: 1 or 3.
        size: height and width of the images; the exit's linear layer has 16 (size / 3)^2 inputs, 1600 for 32.
        blocks: basic blocks per stage, n, from 3; the network has 6n + 2 layers.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, size: int = 32, blocks: int = 3) -> None:
        super().__init__(num_classes, in_channels, blocks)
        features = _CHANNELS * (size // _POOL) ** 2
        branch = nn.Sequential(nn.AvgPool2d(_POOL), nn.Flatten(), nn.Linear(features, num_classes))
        attach_exits(self, [("layer1.2.relu2", branch)])
        for point in exits_of(self):
            point.is_checked = True


def _register(depth: int) -> None:
    blocks = (depth - 2) // 6

    def build(num_classes: int, in_channels: int, size: int) -> nn.Module:
        return ResNetCifarEarlyExit(num_classes, in_channels, size, blocks)

    register_model(
        ModelSpec(
            f"resnet{depth}_cifar_earlyexit", build, "cifar10", (3, 32, 32), smallest_size=8, is_sized=True
        )
    )


for _depth in (20, 32, 44, 56, 110, 1202):
    _register(_depth)
