"""Residual networks for 32x32 images, of 6n + 2 layers.

Knows nothing about data.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from distiller.models.spec import ModelSpec, register_model
from distiller.modules import EltwiseAdd


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut around them.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: of the first convolution. Where the shape changes, the shortcut is a 1x1
            convolution of that stride with batch normalization (`downsample`).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        self.residual_eltwiseadd = EltwiseAdd()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, h, w) -> (batch, out_channels, h / stride, w / stride)."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu2(self.residual_eltwiseadd(shortcut, out))


class ResNetCifar(nn.Module):
    """Three stages of basic blocks with 16, 32 and 64 channels.

    Args:
        num_classes: number of outputs.
        in_channels: 1 or 3.
        blocks: basic blocks per stage, n; the network has 6n + 2 layers.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2015, section 4.2, but with
    a convolution in the shortcuts that change the shape.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, blocks: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, h, w) -> (batch, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))  # (batch, 16, h, w)
        x = self.layer3(self.layer2(self.layer1(x)))  # (batch, 64, h / 4, w / 4)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


for _depth in (20, 32, 44, 56):
    register_model(
        ModelSpec(
            f"resnet{_depth}_cifar",
            partial(ResNetCifar, blocks=(_depth - 2) // 6),
            "cifar10",
            (3, 32, 32),
            smallest_size=8,
        )
    )
