"""A large convolutional teacher with four hidden linear layers, and its small student, for 32x32 images.

Knows nothing about data or distillation.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from distiller.models.spec import ModelSpec, register_model

_HIDDEN = (3000, 2000, 2000, 1000)


class WidthChannelPool(nn.Module):
    """The mean of each two neighbours in width and in channels: (b, c, h, w) -> (b, c // 2, h, w // 2).

    What the source's window of (2, 2) on (batch, height, width, channel) amounts to. The sizes that are
    published for its networks are those with this pooling.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(batch, c, h, w) -> (batch, c // 2, h, w // 2)."""
        return functional.avg_pool2d(x.transpose(1, 2), 2).transpose(1, 2)


class HaikuCifar(nn.Module):
    """Two 5x5 convolutions, each with ReLU, pooling over width and channels, and ReLU; then linear layers.

    Args:
        num_classes: number of outputs.
        in_channels: 1 or 3.
        size: height and width of the images, a multiple of 4.
        hidden: sizes of the hidden linear layers.

    Source: brandhsu's nn-compress-haiku.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        size: int = 32,
        hidden: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 18, 5, padding=2)
        self.relu1 = nn.ReLU()
        self.pool1 = WidthChannelPool()
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(9, 48, 5, padding=2)
        self.relu3 = nn.ReLU()
        self.pool2 = WidthChannelPool()
        self.relu4 = nn.ReLU()
        sizes = (24 * size * (size // 4), *hidden, num_classes)
        self.linears = nn.Sequential()
        for index, (inputs, outputs) in enumerate(pairwise(sizes), start=1):
            self.linears.append(nn.Linear(inputs, outputs))
            if index < len(sizes) - 1:
                self.linears.append(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, size, size) -> (batch, num_classes)."""
        x = self.relu2(self.pool1(self.relu1(self.conv1(x))))  # (batch, 9, size, size / 2)
        x = self.relu4(self.pool2(self.relu3(self.conv2(x))))  # (batch, 24, size, size / 4)
        return self.linears(torch.flatten(x, 1))


for _arch, _hidden in (("haiku_teacher", _HIDDEN), ("haiku_student", ())):
    for _suffix, _dataset, _shape in (("_cifar", "cifar10", (3, 32, 32)), ("_mnist", "mnist", (1, 28, 28))):
        register_model(
            ModelSpec(
                f"{_arch}{_suffix}",
                partial(HaikuCifar, size=_shape[1], hidden=_hidden),
                _dataset,
                _shape,
                smallest_size=None,
            )
        )
