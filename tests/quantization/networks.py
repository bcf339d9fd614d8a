"""Networks with Distiller's names, and quantizing in one call."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from distiller.functional_modules import DistillerLSTM
from distiller.modules import EltwiseAdd
from distiller.quantization.post_train import PostTrainLinearQuantizer

ASYMMETRIC = {"activations": "ASYMMETRIC_UNSIGNED", "weights": "SYMMETRIC"}
DUMMY = torch.randn(1, 3, 8, 8)


class DistillersBlock(nn.Module):
    """A residual block with the names that Distiller's statistics of ResNet-18 have."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )
        self.add = EltwiseAdd()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(self.add(x, shortcut))


class DistillersResNet18(nn.Module):
    """ResNet-18 with those names, and few channels: scales come from the statistics alone."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (1, 3, 32, 32)
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        for index, width in enumerate((4, 8, 16, 32)):
            blocks = (
                DistillersBlock(max(4, width // 2), width, 2 if index else 1),
                DistillersBlock(width, width, 1),
            )
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for index in range(4):
            x = self.get_submodule(f"layer{index + 1}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class WordModel(nn.Module):
    """A language model: words, two layers of an LSTM made of modules, words; tied where it runs one way."""

    def __init__(self, is_bidirectional: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Embedding(20, 8)
        self.rnn = DistillerLSTM(8, 8, 2, bidirectional=is_bidirectional)
        self.decoder = nn.Linear(16 if is_bidirectional else 8, 20)
        if not is_bidirectional:
            self.decoder.weight = self.encoder.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.decoder(self.rnn(self.encoder(words))[0])  # (steps, batch, 20)


def quantized(model: nn.Module, stats: Any, dummy: Tensor = DUMMY, **kwargs: Any) -> Any:
    """A quantized copy of the model; its quantizer is attached as `quantizer`."""
    twin: Any = copy.deepcopy(model)
    quantizer = PostTrainLinearQuantizer(twin, model_activation_stats=stats, **kwargs)
    quantizer.prepare_model(dummy)
    twin.quantizer = quantizer
    return twin


def signal_to_noise(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    """In dB."""
    with torch.no_grad():
        clean, noisy = model(x), other(x)
    return 10 * torch.log10(clean.square().mean() / (clean - noisy).square().mean()).item()
