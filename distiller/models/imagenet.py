"""torchvision's classification models, by their names there.

Changed in two ways that leave results and weights alone: nothing works in place, and each
ReLU and addition of a residual block is a module of its own (`relu1`, `relu2`, `relu3`, `add`),
so that statistics and quantizers can name them.
Knows nothing about data.
"""

from __future__ import annotations

from functools import cache, partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
import torchvision.models as torchvision_models
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from distiller.errors import UsageError
from distiller.models.spec import ModelSpec
from distiller.modules import EltwiseAdd

# Below this size a network with a total stride of 32 sees one position in its last two stages.
_SMALLEST_SIZE = 17
# What is larger than that, by the start of the name; None: the native size only.
_SMALLEST_SIZES: dict[str, int | None] = {
    "alexnet": 63,
    "convnext": 32,
    "densenet": 29,
    "inception_v3": 299,
    "maxvit": None,
    "squeezenet1_0": 21,
    "vgg": 32,
    "vit": None,
}


@cache
def torchvision_names() -> tuple[str, ...]:
    """The names of torchvision's classification models, sorted."""
    return tuple(torchvision_models.list_models(module=torchvision_models))


def torchvision_spec(name: str) -> ModelSpec:
    """What is known of a torchvision model.

    Args:
        name: one of `torchvision_names()`.
    """
    size = _weights(name).transforms().crop_size[0]
    smallest_size = _SMALLEST_SIZE
    for prefix, smallest in _SMALLEST_SIZES.items():
        if name.startswith(prefix):
            smallest_size = smallest
    return ModelSpec(
        name,
        lambda num_classes, _: _build(name, size, num_classes),
        "imagenet",
        (3, size, size),
        smallest_size,
        any_channels=False,
        build_pretrained=partial(_build_pretrained, name),
    )


class NamedBasicBlock(nn.Module):
    """torchvision's `BasicBlock` with two ReLUs and an addition that have names.

    Args:
        block: the block whose layers it takes over.
    """

    def __init__(self, block: BasicBlock) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = block.conv1, block.bn1, nn.ReLU()
        self.conv2, self.bn2, self.relu2 = block.conv2, block.bn2, nn.ReLU()
        self.downsample = block.downsample
        self.add = EltwiseAdd()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, c, h, w) -> (batch, c', h / stride, w / stride)."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(self.add(out, x if self.downsample is None else self.downsample(x)))


class NamedBottleneck(nn.Module):
    """torchvision's `Bottleneck` with three ReLUs and an addition that have names.

    Args:
        block: the block whose layers it takes over.
    """

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = block.conv1, block.bn1, nn.ReLU()
        self.conv2, self.bn2, self.relu2 = block.conv2, block.bn2, nn.ReLU()
        self.conv3, self.bn3, self.relu3 = block.conv3, block.bn3, nn.ReLU()
        self.downsample = block.downsample
        self.add = EltwiseAdd()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, c, h, w) -> (batch, c', h / stride, w / stride)."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu3(self.add(out, x if self.downsample is None else self.downsample(x)))


def _weights(name: str) -> Any:
    """The weights that Distiller's users know, IMAGENET1K_V1; torchvision's default where there are none."""
    offered = torchvision_models.get_model_weights(name)
    return next((weights for weights in offered if weights.name == "IMAGENET1K_V1"), offered["DEFAULT"])


def _build(name: str, size: int, num_classes: int) -> nn.Module:
    settings: dict[str, Any] = {}
    if name.startswith("vit"):
        settings["image_size"] = size
    elif name in ("googlenet", "inception_v3"):
        settings["init_weights"] = True
    return _with_named_operations(
        torchvision_models.get_model(name, weights=None, num_classes=num_classes, **settings)
    )


def _build_pretrained(name: str, num_classes: int) -> nn.Module:
    weights = _weights(name)
    trained_classes = len(weights.meta["categories"])
    if num_classes != trained_classes:
        raise UsageError(
            f"pretrained: the weights of '{name}' are for the {trained_classes} classes of ImageNet, "
            f"got data of {num_classes} classes; leave it out to train from scratch"
        )
    try:
        weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError, HTTPException) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UsageError(
            f"pretrained: the weights of '{name}' cannot be had from {weights.url}: {error}; "
            f"download them elsewhere and put the file into {folder}"
        ) from error
    return _with_named_operations(torchvision_models.get_model(name, weights=weights, progress=False))


def _with_named_operations(model: nn.Module) -> nn.Module:
    if isinstance(model, ResNet):
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            for index, block in enumerate(stage):
                if isinstance(block, Bottleneck):
                    stage[index] = NamedBottleneck(block)
                elif isinstance(block, BasicBlock):
                    stage[index] = NamedBasicBlock(block)
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]
    return model
