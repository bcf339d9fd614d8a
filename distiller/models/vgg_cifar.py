"""VGG networks for 32x32 images, with one linear layer.

Knows nothing about data.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from distiller.models.spec import ModelSpec, register_model

# Output channels of the 3x3 convolutions of each stage; a 2x2 max pooling ends a stage.
_STAGES: dict[int, tuple[tuple[int, ...], ...]] = {
    11: ((64,), (128,), (256,) * 2, (512,) * 2, (512,) * 2),
    13: ((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2),
    16: ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
    19: ((64,) * 2, (128,) * 2, (256,) * 4, (512,) * 4, (512,) * 4),
}


class VGGCifar(nn.Module):
    """`features`: convolutions, ReLUs and poolings in one sequence; `classifier`: one linear layer.

    Args:
        num_classes: number of outputs.
        in_channels: 1 or 3.
        depth: 11, 13, 16 or 19, as the layers are counted in the source.
        batch_norm: whether each convolution is followed by batch normalization.

    Source: Simonyan & Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition", 2014, table 1 (A, B, D, E).
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 3, depth: int = 16, batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(*_features(in_channels, _STAGES[depth], batch_norm))
        self.classifier = nn.Linear(512, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, h, w), h and w at least 32 -> (batch, num_classes)."""
        x = self.features(x)  # (batch, 512, h / 32, w / 32)
        # No module: it does nothing at 32x32, and statistics files of Distiller have no layer here.
        x = functional.adaptive_avg_pool2d(x, 1)
        return self.classifier(torch.flatten(x, 1))


def _features(in_channels: int, stages: tuple[tuple[int, ...], ...], batch_norm: bool) -> list[nn.Module]:
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


for _depth in _STAGES:
    for _batch_norm in (False, True):
        register_model(
            ModelSpec(
                f"vgg{_depth}_bn_cifar" if _batch_norm else f"vgg{_depth}_cifar",
                partial(VGGCifar, depth=_depth, batch_norm=_batch_norm),
                "cifar10",
                (3, 32, 32),
                smallest_size=32,
            )
        )
