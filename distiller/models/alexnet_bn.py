"""AlexNet with batch normalization, on which Distiller's DoReFa results are.

Knows nothing about data.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distiller.models.spec import ModelSpec, register_model


class AlexNetBN(nn.Module):
    """`features`: five convolutions, three of them in two groups; `classifier`: three linear layers.

    Batch normalization follows each layer but the first and the last, and the ReLUs follow the
    poolings. The first layer with its ReLU is `features.0` and `features.1`, the last with the
    ReLU before it `classifier.6` and `classifier.5`.

    Args:
        num_classes: number of outputs.
        in_channels: 1 or 3.

    Source: Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low
    Bitwidth Gradients", 2016, section 3 (the network of Krizhevsky et al., 2012).
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 96, 12, stride=4),  # 54x54
            nn.ReLU(),
            nn.Conv2d(96, 256, 5, padding=2, groups=2, bias=False),
            nn.BatchNorm2d(256),
            nn.MaxPool2d(3, 2, padding=1),  # 27x27
            nn.ReLU(),
            nn.Conv2d(256, 384, 3, padding=1, bias=False),
            nn.BatchNorm2d(384),
            nn.MaxPool2d(3, 2, padding=1),  # 14x14
            nn.ReLU(),
            nn.Conv2d(384, 384, 3, padding=1, groups=2, bias=False),
            nn.BatchNorm2d(384),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1, groups=2, bias=False),
            nn.BatchNorm2d(256),
            nn.MaxPool2d(3, 2),  # 6x6
            nn.ReLU(),
        )
        self.classifier = nn.Sequential(
            nn.Linear(256 * 6 * 6, 4096, bias=False),
            nn.BatchNorm1d(4096),
            nn.ReLU(),
            nn.Linear(4096, 4096, bias=False),
            nn.BatchNorm1d(4096),
            nn.ReLU(),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, 224, 224) -> (batch, num_classes)."""
        return self.classifier(torch.flatten(self.features(x), 1))


register_model(ModelSpec("alexnet_bn", AlexNetBN, "imagenet", (3, 224, 224), smallest_size=None))
