"""What is known of each data set without reading it: classes, image shape, normalisation.

Knows nothing about files, loaders, models or torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class DatasetFacts:
    """One data set of square images.

    Attributes:
        name: as in `--dataset`.
        num_classes: labels are 0 .. num_classes - 1.
        channels: 1 (grey) or 3 (RGB).
        size: height and width of an image as a model gets it, in pixels.
        mean: what is subtracted from pixels scaled to 0..1, one number a channel.
        std: what they are divided by after that, one number a channel.
    """

    name: str
    num_classes: int
    channels: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        return self.channels, self.size, self.size


_HALF = (0.5, 0.5, 0.5)

DATASET_FACTS: Mapping[str, DatasetFacts] = MappingProxyType(
    {
        facts.name: facts
        for facts in (
            # Mean and population standard deviation of all 1,797 images, their values 0..16 divided by 16.
            DatasetFacts("digits", 10, 1, 8, (0.3053,), (0.3760,)),
            DatasetFacts("mnist", 10, 1, 28, (0.1307,), (0.3081,)),
            DatasetFacts("fashion-mnist", 10, 1, 28, (0.2860,), (0.3530,)),
            DatasetFacts("cifar10", 10, 3, 32, _HALF, _HALF),
            DatasetFacts("cifar100", 100, 3, 32, _HALF, _HALF),
            DatasetFacts("imagenet", 1000, 3, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        )
    }
)


def infer_dataset(arch: str) -> str:
    """The data set that an architecture's name speaks of.

    `cifar` in the name: cifar10; `mnist` in it or `lenet` at its start: mnist; else imagenet.

    Args:
        arch: a name as in `--arch`; upper and lower case alike.
    """
    name = arch.lower()
    if "cifar" in name:
        return "cifar10"
    if "mnist" in name or name.startswith("lenet"):
        return "mnist"
    return "imagenet"
