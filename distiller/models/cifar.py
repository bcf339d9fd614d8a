"""A small network for 32x32 images: Distiller's simplenet_cifar.

Knows nothing about data.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distiller.models.spec import ModelSpec, register_model


class SimpleNetCifar(nn.Module):
    """Two convolutions and three linear layers, LeNet-5's widths of 1998.

    Args:
        num_classes: number of outputs.
        in_channels: 1 or 3.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 6, 5)
        self.relu_conv1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.relu_conv2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.relu_fc1 = nn.ReLU()
        self.fc2 = nn.Linear(120, 84)
        self.relu_fc2 = nn.ReLU()
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, 32, 32) -> (batch, num_classes)."""
        x = self.pool1(self.relu_conv1(self.conv1(x)))  # (batch, 6, 14, 14)
        x = self.pool2(self.relu_conv2(self.conv2(x)))  # (batch, 16, 5, 5)
        x = self.relu_fc1(self.fc1(torch.flatten(x, 1)))
        x = self.relu_fc2(self.fc2(x))
        return self.fc3(x)


register_model(ModelSpec("simplenet_cifar", SimpleNetCifar, "cifar10", (3, 32, 32), smallest_size=None))
