"""Small models and statistics for quantization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distiller.data_loggers.quant_stats import collect_quant_stats
from distiller.modules import Concat, EltwiseAdd


class Residual(nn.Module):
    """conv1-bn1-relu1, conv2-bn2 plus a shortcut, relu2, two heads joined, pool, fc; for 3x8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (1, 3, 8, 8)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.add = EltwiseAdd()
        self.relu2 = nn.ReLU(inplace=True)
        self.left = nn.Conv2d(8, 4, 1)
        self.right = nn.Conv2d(8, 4, 3, padding=1)
        self.concat = Concat()
        self.tanh = nn.Tanh()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.dropout = nn.Dropout()
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.add(self.bn2(self.conv2(x)), x))
        x = self.tanh(self.concat(self.left(x), self.right(x)))
        return self.fc(self.dropout(torch.flatten(self.pool(x), 1)))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(11))


@pytest.fixture
def residual(images: Tensor) -> nn.Module:
    """In evaluation mode, its batch norms with statistics of `images`."""
    model = Residual()
    for norm in (model.bn1, model.bn2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.3, 0.3)
        norm.momentum = None
    with torch.no_grad():
        model(images)
    return model.eval()


@pytest.fixture
def stats_of() -> Callable[[nn.Module, Tensor], dict[str, Any]]:
    def collect(model: nn.Module, inputs: Tensor) -> dict[str, Any]:
        with torch.no_grad():
            return collect_quant_stats(model, lambda model: model(inputs))

    return collect


@pytest.fixture
def residual_stats(residual, images, stats_of) -> dict[str, Any]:
    return stats_of(residual, images)
