"""The plain network of 20 layers for 32x32 images: a ResNet-20 without shortcuts.

Knows nothing about data.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from distiller.models.spec import ModelSpec, register_model


class PlainBlock(nn.Module):
    """Two 3x3 convolutions, each followed by batch normalization, if wanted, and ReLU.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: of the first convolution.
        batch_norm: whether there is batch normalization; without, the convolutions have biases.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, batch_norm: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=not batch_norm)
        self.bn1 = nn.BatchNorm2d(out_channels) if batch_norm else None
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=not batch_norm)
        self.bn2 = nn.BatchNorm2d(out_channels) if batch_norm else None
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, h, w) -> (batch, out_channels, h / stride, w / stride)."""
        x = self.relu1(_normalized(self.bn1, self.conv1(x)))
        return self.relu2(_normalized(self.bn2, self.conv2(x)))


class PlainCifar(nn.Module):
    """Three stages of plain blocks with 16, 32 and 64 channels.

    Args:
        num_classes: number of outputs.
        in_channels: 1 or 3.
        blocks: blocks per stage, n; the network has 6n + 2 layers.
        batch_norm: whether each convolution is followed by batch normalization.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2015, section 4.2.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, blocks: int = 3, batch_norm: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=not batch_norm)
        self.bn1 = nn.BatchNorm2d(16) if batch_norm else None
        self.relu = nn.ReLU()
        self.layer1 = _stage(16, 16, blocks, 1, batch_norm)
        self.layer2 = _stage(16, 32, blocks, 2, batch_norm)
        self.layer3 = _stage(32, 64, blocks, 2, batch_norm)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, h, w) -> (batch, num_classes)."""
        x = self.relu(_normalized(self.bn1, self.conv1(x)))  # (batch, 16, h, w)
        x = self.layer3(self.layer2(self.layer1(x)))  # (batch, 64, h / 4, w / 4)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _normalized(batch_norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if batch_norm is None else batch_norm(x)


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int, batch_norm: bool) -> nn.Sequential:
    first = PlainBlock(in_channels, out_channels, stride, batch_norm)
    others = (PlainBlock(out_channels, out_channels, 1, batch_norm) for _ in range(blocks - 1))
    return nn.Sequential(first, *others)


for _batch_norm in (True, False):
    register_model(
        ModelSpec(
            "plain20_cifar" if _batch_norm else "plain20_cifar_nobn",
            partial(PlainCifar, blocks=3, batch_norm=_batch_norm),
            "cifar10",
            (3, 32, 32),
            smallest_size=8,
        )
    )
