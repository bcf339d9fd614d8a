"""What is known of an architecture before it is built.

Knows nothing about single architectures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from distiller.errors import UsageError
from distiller.registry import MODELS


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """An architecture: how it is built, and which images it takes. Calling it builds an untrained model.

    Attributes:
        arch: its name, in lower case (a dotted path keeps its case).
        build: (num_classes, in_channels) -> an untrained model; of one that is `sized`,
            (num_classes, in_channels, height and width).
        dataset: the data set it was designed for, as in `--dataset`.
        native_shape: (channels, height, width) of that data set's images.
        smallest_size: the smallest height and width it makes sense of; None when it takes
            images of its native size only.
        any_channels: whether it can be built for another number of channels than its native one.
        build_pretrained: num_classes -> a trained model; None when no weights are offered.
        is_sized: whether layers of it depend on the size of the images.
    """

    arch: str
    build: Callable[..., nn.Module]
    dataset: str
    native_shape: tuple[int, int, int]
    smallest_size: int | None
    any_channels: bool = True
    build_pretrained: Callable[[int], nn.Module] | None = None
    is_sized: bool = False

    def __call__(self, num_classes: int, in_channels: int, size: int | None = None) -> nn.Module:
        """An untrained model; `size` is the images' height and width, by default the native one."""
        if self.is_sized:
            return self.build(num_classes, in_channels, size or self.native_shape[1])
        return self.build(num_classes, in_channels)

    def input_shape(self, channels: int, size: int) -> tuple[int, int, int]:
        """The (channels, height, width) that images must be brought to.

        Their own shape where the architecture takes it, the architecture's native one otherwise.

        Args:
            channels: of the images of the data set, 1 or 3.
            size: height and width of the images of the data set, in pixels.
        """
        if self.smallest_size is None or size < self.smallest_size:
            size = self.native_shape[1]
        return (channels if self.any_channels else self.native_shape[0]), size, size


def register_model(spec: ModelSpec) -> None:
    """Make an architecture known under its name.

    Raises:
        UsageError: the name is taken.
    """
    if spec.arch in MODELS:
        raise UsageError(
            f"register_model: there is an architecture '{spec.arch}' already; choose another name"
        )
    MODELS.register(spec, spec.arch)
