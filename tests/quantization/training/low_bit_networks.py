"""A network that low-bit quantizers leave the ends of alone, a problem it can learn, and its training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FULL = {"bits_weights": None, "bits_activations": None, "bits_bias": None}
ENDS = {"first": FULL, "relu1": FULL, "fc": FULL}
"""Overrides that leave the first and the last layer in full precision."""

BINARY_ENDS = {"first": FULL, "fc": FULL}
"""The same for binary inputs: the ReLU before them hands on its own."""


class LowBitNet(nn.Module):
    """first-bn1-relu1, conv2-bn2-relu2, conv3-bn3, fc; for 1x8x8 images and 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (1, 1, 8, 8)
        self.first, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv3, self.bn3 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.first(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))


def low_bit_net() -> LowBitNet:
    torch.manual_seed(7)
    return LowBitNet()


def stripes(count: int = 128) -> tuple[Tensor, Tensor]:
    """Noisy images of stripes in one of four directions, and which."""
    generator = torch.Generator().manual_seed(11)
    labels = torch.arange(count) % 4
    row, column = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    waves = torch.stack([torch.sin(1.5 * t) for t in (row, column, row + column, row - column)])
    return waves[labels].unsqueeze(1) + 0.5 * torch.randn(count, 1, 8, 8, generator=generator), labels


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Steps on all of `stripes`; returns the last loss."""
    images, labels = stripes()
    model.train()
    loss = torch.tensor(torch.nan)
    for _ in range(steps):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def outputs(model: nn.Module, images: Tensor | None = None) -> Tensor:
    """In evaluation mode."""
    model.eval()
    with torch.no_grad():
        return model(stripes()[0] if images is None else images)


def gradients(function: Any, *tensors: Tensor, weights: Tensor | None = None) -> list[Tensor]:
    """The gradients of sum(weights * function(tensors)) with respect to each of the tensors."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    (y if weights is None else y * weights).sum().backward()
    return [leaf.grad for leaf in leaves]  # type: ignore[misc]
