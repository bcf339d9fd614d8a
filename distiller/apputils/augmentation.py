"""What happens to images on their way into a network.

Whole batches of tensors: scaling to the network's input shape, random crop and flip by index
arithmetic, normalization. Single image files: the transforms of ImageNet training and evaluation.
Knows nothing about data sets' files, order or loaders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from distiller.errors import DatasetError

if TYPE_CHECKING:
    from torchvision.transforms import v2

CROP_PADDING = 4
"""Pixels of black around a CIFAR image before it is cropped."""

_CHUNK = 4096


def fit_images(images: Tensor, input_shape: Sequence[int]) -> Tensor:
    """Images brought to the shape that a network takes.

    Bilinear scaling (with antialiasing when it shrinks) where height or width differ; grey
    images repeated to the channels wanted, several channels averaged where one is wanted.

    Args:
        images: (N, C, H, W), uint8 or float.
        input_shape: the (C, H, W) wanted.

    Returns:
        (N, *input_shape) in the dtype of `images`; a view where nothing or only grey is to do.

    Raises:
        DatasetError: the channels differ and neither side is grey.
    """
    channels, *size = input_shape
    if images.shape[1] not in (1, channels) and channels != 1:
        raise DatasetError(
            f"images have {images.shape[1]} channels and the model takes {channels}; "
            "only grey can be made of colour, or colour of grey"
        )
    if channels == 1 and images.shape[1] > 1:
        images = _in_chunks(lambda chunk: chunk.mean(1, keepdim=True), images)
    if list(images.shape[2:]) != size:
        images = _in_chunks(
            lambda chunk: F.interpolate(chunk, size, mode="bilinear", align_corners=False, antialias=True),
            images,
        )
    return images.expand(-1, channels, -1, -1)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """`(x - mean) / std` by channel, uint8 scaled to 0..1 first.

    Args:
        images: (N, C, H, W), uint8 or float.
        mean: one number a channel, or as many as another number of channels has: a single
            one is used for every channel, several are averaged for a single channel.
        std: likewise.

    Returns:
        float32 images of the same shape.
    """
    channels = images.shape[1]
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    means = torch.tensor(_per_channel(mean, channels)).view(1, channels, 1, 1)
    stds = torch.tensor(_per_channel(std, channels)).view(1, channels, 1, 1)
    return images.to(torch.float32, copy=True).mul_(1 / (scale * stds)).sub_(means / stds)


def crop_and_flip(images: Tensor, generator: Generator) -> Tensor:
    """A random crop out of each image padded by 4 black pixels, then flipped half of the time.

    Args:
        images: (N, C, H, W), before normalization.
        generator: the source of all randomness.

    Returns:
        New images of the same shape and dtype.
    """
    offsets = torch.randint(0, 2 * CROP_PADDING + 1, (2, len(images)), generator=generator)
    return random_flip(crop(images, CROP_PADDING, offsets[0], offsets[1]), generator)


def random_flip(images: Tensor, generator: Generator) -> Tensor:
    """Each image mirrored left to right with probability 1/2."""
    return flip(images, torch.rand(len(images), generator=generator) < 0.5)


def crop(images: Tensor, padding: int, top: Tensor, left: Tensor) -> Tensor:
    """From each image, with zeros around it, a window of its own size.

    Args:
        images: (N, C, H, W).
        padding: zeros added on each side, in pixels.
        top: (N,), row of the padded image where the window starts, 0..2 * padding.
        left: (N,), column likewise.
    """
    height, width = images.shape[2:]
    windows = (
        F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    )  # (N, C, top, left, H, W)
    return windows[torch.arange(len(images)), :, top, left]


def flip(images: Tensor, mirrored: Tensor) -> Tensor:
    """The images (N, C, H, W), those mirrored left to right where `mirrored` (N,) is true."""
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)


BATCH_AUGMENTATIONS: Mapping[str, Callable[[Tensor, Generator], Tensor]] = MappingProxyType(
    {"cifar10": crop_and_flip, "cifar100": crop_and_flip, "fashion-mnist": random_flip}
)
"""The training augmentation of each in-memory data set that has one."""


def training_transform(input_shape: Sequence[int]) -> v2.Compose:
    """PIL image -> uint8 tensor (C, H, W): random area scaled to the input shape, random flip.

    Draws from torch's global random state.
    """
    from torchvision.transforms import v2  # seconds of import, which image files alone need

    return v2.Compose(
        [v2.RandomResizedCrop(list(input_shape[1:])), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )


def evaluation_transform(input_shape: Sequence[int]) -> v2.Compose:
    """PIL image -> uint8 tensor (C, H, W): the shorter side scaled, the centre cropped.

    The shorter side becomes 256 for 224 and 336 for 299 (Inception), in proportion otherwise.
    """
    from torchvision.transforms import v2  # as above

    size = list(input_shape[1:])
    longest = max(size)
    shorter_side = 336 if longest == 299 else round(longest * 256 / 224)
    return v2.Compose([v2.Resize(shorter_side), v2.CenterCrop(size), v2.PILToTensor()])


def _in_chunks(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """`function` of the images as floats, a part at a time, rounded back to uint8 if they were."""
    if images.dtype != torch.uint8:
        return function(images)
    return torch.cat(
        [function(chunk.float()).round_().clamp_(0, 255).to(torch.uint8) for chunk in images.split(_CHUNK)]
    )


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    if len(values) == channels:
        return list(values)
    return [sum(values) / len(values)] * channels
