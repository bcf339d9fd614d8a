"""The channels-last layout, unmistakably.

With one channel or 1x1 elements a tensor is in both layouts at once: `contiguous` leaves its strides as they
are, torch takes them for the other layout, and what is made of the tensor is in that one.
Knows nothing about programs.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_channels_last", "to_channels_last"]


def to_channels_last(value: Tensor) -> Tensor:
    """The value with the strides of that layout, copied where it has others.

    Args:
        value: (n, C, H, W).
    """
    _, channels, height, width = value.shape
    strides = (channels * height * width, 1, channels * width, channels)
    if value.stride() == strides:
        return value
    return torch.empty_like(value, memory_format=torch.channels_last).copy_(value)


def is_channels_last(value: Tensor) -> bool:
    """Whether a tensor is laid out so; one with more or fewer dimensions than 4 is not."""
    return value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
