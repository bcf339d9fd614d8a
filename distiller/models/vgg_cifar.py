"""VGG networks for 32x32 images, with one linear layer, in three widths; MiniVGG, one convolution a stage.

Knows nothing about data.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from distiller.models.spec import ModelSpec, register_model

# Output channels of the 3x3 convolutions of each stage; a 2x2 max pooling ends a stage.
_Stages = tuple[tuple[int, ...], ...]
_STAGES: dict[int, _Stages] = {
    11: ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    13: ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}
_MINI_STAGES: _Stages = ((32,), (64,), (128,), (256,), (512,))
_WIDTHS = {"": 1.0, "_050": 0.5, "_025": 0.25}


class VGGCifar(nn.Module):
    """`features`: convolutions, ReLUs and poolings in one sequence; `classifier`: one linear layer.

    Args:
        num_classes: number of outputs.
        in_channels: 1 or 3.
        depth: 11, 13, 16 or 19, as the layers are counted in the source; "mini" for MiniVGG, which has one
            convolution in each of its five stages.
        batch_norm: whether each convolution is followed by batch normalization.
        width: what the numbers of channels are multiplied with, 0.25 to 1.

    Source: Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition", 2014, table 1 (A, B, D, E). MiniVGG: the student of okz12's
    NeuralNetworkCompression.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        depth: int | Literal["mini"] = 16,
        batch_norm: bool = False,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        stages = _MINI_STAGES if depth == "mini" else _STAGES[depth]
        stages = tuple(tuple(int(channels * width) for channels in stage) for stage in stages)
        self.features = nn.Sequential(*_features(in_channels, stages, batch_norm))
        self.classifier = nn.Linear(stages[-1][-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, h, w), h and w at least 32 -> (batch, num_classes)."""
        x = self.features(x)  # (batch, 512 * width, h / 32, w / 32)
        # No module: it does nothing at 32x32, and statistics files of Distiller have no layer here.
        x = functional.adaptive_avg_pool2d(x, 1)
        return self.classifier(torch.flatten(x, 1))


def _features(in_channels: int, stages: _Stages, batch_norm: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for stage in stages:
        for out_channels in stage:
            layers.append(nn.Conv2d(in_channels, out_channels, 3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(out_channels))
            layers.append(nn.ReLU())
            in_channels = out_channels
        layers.append(nn.MaxPool2d(2, 2))
    return layers


def _register(arch: str, **settings: Any) -> None:
    register_model(ModelSpec(arch, partial(VGGCifar, **settings), "cifar10", (3, 32, 32), smallest_size=32))


for _depth in _STAGES:
    _register(f"vgg{_depth}_cifar", depth=_depth)
    for _suffix, _width in _WIDTHS.items():
        _register(f"vgg{_depth}_bn{_suffix}_cifar", depth=_depth, batch_norm=True, width=_width)
for _suffix, _width in _WIDTHS.items():
    _register(f"minivgg{_suffix}_cifar", depth="mini", batch_norm=True, width=_width)
