"""Small networks after post-training quantization, and their statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distiller.data_loggers import collect_quant_stats
from distiller.modules import Concat, EltwiseAdd
from distiller.quantization import PostTrainLinearQuantizer

FASTEST = {"activations": "ASYMMETRIC_UNSIGNED", "weights": "SYMMETRIC"}


class Block(nn.Module):
    """A residual block as in ResNet, with a convolution on the short cut."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * channels)
        self.shortcut = nn.Conv2d(channels, 2 * channels, 1, stride=2)
        self.add = EltwiseAdd()
        self.relu2 = nn.ReLU()

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(self.add(y, self.shortcut(x)))


class Mixed(nn.Module):
    """conv - relu - max pooling - residual block - concatenation with itself - average - linear."""

    input_shape = (1, 3, 12, 12)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(2)
        self.block = Block()
        self.side = nn.Conv2d(8, 2, 1)
        self.concat = Concat()
        self.average = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(10, 5)

    def forward(self, x):
        x = self.block(self.maxpool(self.relu(self.conv(x))))
        x = self.concat(x, self.side(x))
        return self.fc(torch.flatten(self.average(x), 1))


def images(model: nn.Module, count: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(count, *model.input_shape[1:], generator=generator)  # type: ignore[index]


def statistics(model: nn.Module, x: Any) -> dict[str, Any]:
    return collect_quant_stats(model.eval(), lambda model: model(x))


def quantized(model: nn.Module, x: Any = None, **settings: Any) -> nn.Module:
    """The model itself, in evaluation mode, its batch norms with statistics of their own."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    x = images(model) if x is None else x
    stats = statistics(model, x)
    PostTrainLinearQuantizer(model, model_activation_stats=stats, **settings).prepare_model(x)
    return model.eval()
