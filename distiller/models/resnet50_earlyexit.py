"""torchvision's ResNet-50 with two early exits.

    layer1.2.relu3 (256 channels), layer2.3.relu3 (512) -> global average pooling -> flatten -> linear

torchvision takes seconds to import, so it waits until the network is built.
Knows nothing about when an image leaves.
"""

from __future__ import annotations

from torch import nn

from distiller.branch_points import attach_exits, exits_of
from distiller.models.spec import ModelSpec, register_model

_EXITS = (("layer1.2.relu3", 256), ("layer2.3.relu3", 512))
_SMALLEST_SIZE = 17  # as of ResNet-50


def _build(num_classes: int, in_channels: int) -> nn.Module:
    from distiller.models.imagenet import torchvision_spec

    return _with_exits(torchvision_spec("resnet50")(num_classes, in_channels), num_classes)


def _build_pretrained(num_classes: int) -> nn.Module:
    """With torchvision's weights; the exits are not trained."""
    from distiller.models.imagenet import torchvision_spec

    build = torchvision_spec("resnet50").build_pretrained
    assert build is not None
    return _with_exits(build(num_classes), num_classes)


def _with_exits(model: nn.Module, num_classes: int) -> nn.Module:
    attach_exits(
        model,
        [
            (
                name,
                nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)),
            )
            for name, channels in _EXITS
        ],
    )
    for point in exits_of(model):
        point.is_checked = True
    return model


register_model(
    ModelSpec(
        "resnet50_earlyexit",
        _build,
        "imagenet",
        (3, 224, 224),
        _SMALLEST_SIZE,
        any_channels=False,
        build_pretrained=_build_pretrained,
    )
)
