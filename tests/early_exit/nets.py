"""Small networks with places for exits, and logits that decide as is wanted."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Chain(nn.Sequential):
    """conv1 relu1 pool conv2 relu2 flatten fc, for (1, 1, 8, 8)."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu1 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.flatten = nn.Flatten()
        self.hidden = nn.Linear(96, 12)
        self.relu3 = nn.ReLU()
        self.fc = nn.Linear(12, classes)
        self.input_shape = (1, 1, 8, 8)


class Block(nn.Module):
    """A residual block whose addition is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.conv(x))


class Residual(nn.Module):
    """A stem, two blocks and a classifier, for (1, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.block1, self.block2 = Block(), Block()
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 10)
        self.input_shape = (1, 1, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.block2(self.block1(self.stem(x))))
        return self.fc(x.mean((2, 3)))


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()
