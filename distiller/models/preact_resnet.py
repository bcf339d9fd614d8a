"""Pre-activation residual networks for 224x224 images.

Knows nothing about data.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from distiller.models.preact_resnet_cifar import PreactBasicBlock
from distiller.models.spec import ModelSpec, register_model
from distiller.modules import EltwiseAdd

# Whether the blocks are bottlenecks, and how many blocks each of the four stages has.
_DEPTHS: dict[int, tuple[bool, tuple[int, int, int, int]]] = {
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
}


class PreactBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each after batch normalization and ReLU, and a shortcut around them.

    Args:
        in_channels: of the input.
        out_channels: of the output, a multiple of 4; the 3x3 convolution has a quarter of them.
        stride: of the 3x3 convolution. Where the shape changes, the shortcut is a 1x1 convolution
            of that stride on the pre-activated input (`downsample`).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        width = out_channels // 4
        self.pre_bn = nn.BatchNorm2d(in_channels)
        self.pre_relu = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.downsample: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.residual_eltwiseadd = EltwiseAdd()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, h, w) -> (batch, out_channels, h / stride, w / stride)."""
        preact = self.pre_relu(self.pre_bn(x))
        out = self.relu1(self.bn1(self.conv1(preact)))
        out = self.conv3(self.relu2(self.bn2(self.conv2(out))))
        return self.residual_eltwiseadd(out, x if self.downsample is None else self.downsample(preact))


class PreactResNet(nn.Module):
    """Four stages of pre-activation blocks with 64 to 512 channels; bottlenecks with four times as many.

    Args:
        num_classes: number of outputs.
        in_channels: 1 or 3.
        depth: 18, 34, 50, 101 or 152 layers.

    Source: He et al., "Identity Mappings in Deep Residual Networks", 2016.
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, depth: int = 18) -> None:
        super().__init__()
        bottleneck, blocks = _DEPTHS[depth]
        expansion = 4 if bottleneck else 1
        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.layer1 = _stage(64, 64 * expansion, blocks[0], 1, bottleneck)
        self.layer2 = _stage(64 * expansion, 128 * expansion, blocks[1], 2, bottleneck)
        self.layer3 = _stage(128 * expansion, 256 * expansion, blocks[2], 2, bottleneck)
        self.layer4 = _stage(256 * expansion, 512 * expansion, blocks[3], 2, bottleneck)
        self.final_bn = nn.BatchNorm2d(512 * expansion)
        self.final_relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * expansion, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, h, w) -> (batch, num_classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))  # (batch, 64, h / 4, w / 4)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (batch, 512 or 2048, h / 32, w / 32)
        x = self.final_relu(self.final_bn(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int, bottleneck: bool) -> nn.Sequential:
    block = PreactBottleneck if bottleneck else partial(PreactBasicBlock, conv_downsample=True)
    first = block(in_channels, out_channels, stride)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1) for _ in range(blocks - 1)))


for _depth in _DEPTHS:
    register_model(
        ModelSpec(
            f"preact_resnet{_depth}",
            partial(PreactResNet, depth=_depth),
            "imagenet",
            (3, 224, 224),
            # Below it the last two stages, at strides 16 and 32, see one position.
            smallest_size=17,
        )
    )
