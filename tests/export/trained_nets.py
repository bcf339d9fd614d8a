"""Small networks that were trained with quantization: one step, in the sense that their ranges are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distiller.modules import EltwiseAdd


class Residual(nn.Module):
    """conv - two residual blocks, the second with a convolution on the short cut - average - linear.

    Args:
        adds: modules for the sums, or functional ones if None.
    """

    input_shape = (1, 3, 8, 8)

    def __init__(self, adds: bool = True) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = (
            nn.Conv2d(3, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
        )
        self.first = _Block(4, 4, adds)
        self.second = _Block(4, 8, adds)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.second(self.first(self.relu(self.bn(self.conv(x)))))
        return self.fc(torch.flatten(self.average(x), 1))


class _Block(nn.Module):
    def __init__(self, channels: int, outputs: int, adds: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(outputs), nn.ReLU()
        self.side = nn.Conv2d(channels, outputs, 1) if channels != outputs else None
        self.add = EltwiseAdd() if adds else None

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        x = x if self.side is None else self.side(x)
        return self.relu2(x + y if self.add is None else self.add(x, y))


def images(model: nn.Module, count: int = 64, seed: int = 11) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *model.input_shape[1:], generator=generator)  # type: ignore[index]


def trained(model: nn.Module, kind: type, x: Tensor | None = None, **settings: Any) -> nn.Module:
    """The model itself, prepared by a quantizer, its ranges and statistics those of a batch."""
    torch.manual_seed(3)
    x = images(model) if x is None else x
    kind(model, None, **settings).prepare_model(x[:1])
    with torch.no_grad():
        model.train()(x)
        model(x)
    return model.eval()
