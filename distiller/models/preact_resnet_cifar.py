"""Pre-activation residual networks for 32x32 images, of 6n + 2 layers.

Knows nothing about data.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from distiller.models.spec import ModelSpec, register_model
from distiller.modules import EltwiseAdd


class PreactBasicBlock(nn.Module):
    """Two 3x3 convolutions, each after batch normalization and ReLU, and a shortcut around them.

    Args:
        in_channels: of the input.
        out_channels: of the output, at least `in_channels`.
        stride: of the first convolution.
        conv_downsample: what `downsample` is where the shape changes: a 1x1 convolution of the
            pre-activated input, or average pooling of the input itself with channels of zeros
            added on both sides.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, conv_downsample: bool) -> None:
        super().__init__()
        self.pre_bn = nn.BatchNorm2d(in_channels)
        self.pre_relu = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.preact_downsample = conv_downsample
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            if conv_downsample:
                self.downsample = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            else:
                self.downsample = _pool_and_pad(in_channels, out_channels, stride)
        self.residual_eltwiseadd = EltwiseAdd()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, h, w) -> (batch, out_channels, h / stride, w / stride)."""
        preact = self.pre_relu(self.pre_bn(x))
        out = self.conv2(self.relu(self.bn(self.conv1(preact))))
        if self.downsample is None:
            return self.residual_eltwiseadd(out, x)
        return self.residual_eltwiseadd(out, self.downsample(preact if self.preact_downsample else x))


class PreactResNetCifar(nn.Module):
    """Three stages of pre-activation blocks with 16, 32 and 64 channels.

    Args:
        num_classes: number of outputs.
        in_channels: 1 or 3.
        blocks: blocks per stage, n; the network has 6n + 2 layers.
        conv_downsample: whether the shortcuts that change the shape are convolutions; default
            pooling and padding, without parameters.

    Source: He et al., "Identity Mappings in Deep Residual Networks", 2016.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, blocks: int = 3, conv_downsample: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(16, 16, blocks, 1, conv_downsample)
        self.layer2 = _stage(16, 32, blocks, 2, conv_downsample)
        self.layer3 = _stage(32, 64, blocks, 2, conv_downsample)
        self.final_bn = nn.BatchNorm2d(64)
        self.final_relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, h, w) -> (batch, num_classes)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))  # (batch, 64, h / 4, w / 4)
        x = self.final_relu(self.final_bn(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _pool_and_pad(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    added = out_channels - in_channels
    return nn.Sequential(
        # The convolution of an odd size rounds up, too.
        nn.AvgPool2d(stride, ceil_mode=True),
        nn.ConstantPad3d((0, 0, 0, 0, added // 2, added - added // 2), 0.0),
    )


def _stage(
    in_channels: int, out_channels: int, blocks: int, stride: int, conv_downsample: bool
) -> nn.Sequential:
    first = PreactBasicBlock(in_channels, out_channels, stride, conv_downsample)
    others = (PreactBasicBlock(out_channels, out_channels, 1, conv_downsample) for _ in range(blocks - 1))
    return nn.Sequential(first, *others)


for _depth in (20, 32, 44, 56, 110):
    for _conv_downsample in (False, True):
        register_model(
            ModelSpec(
                f"preact_resnet{_depth}_cifar" + ("_conv_ds" if _conv_downsample else ""),
                partial(PreactResNetCifar, blocks=(_depth - 2) // 6, conv_downsample=_conv_downsample),
                "cifar10",
                (3, 32, 32),
                smallest_size=8,
            )
        )
