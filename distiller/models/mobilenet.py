"""MobileNet v1 in four widths, with dropout before its linear layer, and for images of 32 pixels.

Knows nothing about data.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from distiller.models.spec import ModelSpec, register_model

# Output channels at width 1 and stride of each depthwise separable convolution.
_LAYERS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
)


class MobileNet(nn.Module):
    """`model`: a convolution, 13 depthwise separable ones and an average; `fc`: one linear layer.

    In `model.1` to `model.13`, position 0 is the depthwise convolution and 3 the 1x1 convolution.

    Args:
        num_classes: number of outputs.
        in_channels: 1 or 3.
        width: what the numbers of channels are multiplied with, 0.25 to 1.
        dropout: share of the inputs of `fc` that are dropped in training, 0..1; None: there is no
            such layer.
        first_stride: of the first convolution; 1 for images of about 32 pixels.

    Source: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
    Applications", 2017, table 1, but with stride 1 in the last layer, as the published count of
    569 million multiply-accumulate operations needs.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        width: float = 1.0,
        dropout: float | None = None,
        first_stride: int = 2,
    ) -> None:
        super().__init__()
        channels = int(32 * width)
        layers: list[nn.Module] = [nn.Sequential(*_convolution(in_channels, channels, 3, first_stride))]
        for channels_of_width_1, stride in _LAYERS:
            out_channels = int(channels_of_width_1 * width)
            depthwise = _convolution(channels, channels, 3, stride, groups=channels)
            layers.append(nn.Sequential(*depthwise, *_convolution(channels, out_channels, 1)))
            channels = out_channels
        self.model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
        self.dropout = None if dropout is None else nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # Not fan_out, which PyTorch takes for all channels of a depthwise convolution together.
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(batch, in_channels, h, w) -> (batch, num_classes)."""
        x = torch.flatten(self.model(x), 1)  # (batch, 1024 * width)
        return self.fc(x if self.dropout is None else self.dropout(x))


def _convolution(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False
        ),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


# Below 17 pixels the last two stages, at strides 16 and 32, see one position.
_spec = partial(ModelSpec, dataset="imagenet", native_shape=(3, 224, 224), smallest_size=17)
for _name, _width in (("", 1.0), ("_075", 0.75), ("_050", 0.5), ("_025", 0.25)):
    register_model(_spec(f"mobilenet{_name}", partial(MobileNet, width=_width)))
register_model(_spec("mobilenet_v1_dropout", partial(MobileNet, dropout=0.5)))

_small = partial(ModelSpec, dataset="cifar10", native_shape=(3, 32, 32), smallest_size=9)
for _name, _width in (("", 1.0), ("_050", 0.5), ("_025", 0.25)):
    register_model(_small(f"mobilenet{_name}_cifar", partial(MobileNet, width=_width, first_stride=1)))
