"""What the channels of an activation are like, as a mean over the mini-batch.

An activation is the output of a layer: (batch, channels, *positions) of a convolution, (batch, features)
of a linear layer, whose features are taken together, as in Distiller.
Knows nothing about models or modules.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distiller.errors import UsageError

__all__ = ["activation_channels_apoz", "activation_channels_l1", "activation_channels_means"]


def activation_channels_l1(activation: Tensor) -> Tensor:
    """The L1 norm of each channel: mean over the batch of sum_positions |a|.

    Args:
        activation: (batch, channels, *positions), or (batch, features).

    Returns:
        (channels,); a scalar, the mean L1 norm of a sample, for (batch, features).

    Raises:
        UsageError: the activation has fewer than 2 dimensions, or no elements.
    """
    return _by_channel(activation, "activation_channels_l1").abs().sum(-1).mean(0)


def activation_channels_means(activation: Tensor) -> Tensor:
    """The mean of each channel, over batch and positions.

    Args:
        activation: (batch, channels, *positions), or (batch, features).

    Returns:
        (channels,); a scalar, the mean of all features, for (batch, features).

    Raises:
        UsageError: the activation has fewer than 2 dimensions, or no elements.
    """
    return _by_channel(activation, "activation_channels_means").mean(-1).mean(0)


def activation_channels_apoz(activation: Tensor) -> Tensor:
    """The average percentage of zeros (APoZ) of each channel, 0..100.

    Args:
        activation: (batch, channels, *positions), or (batch, features).

    Returns:
        (channels,); a scalar, the percentage of all features, for (batch, features).

    Raises:
        UsageError: the activation has fewer than 2 dimensions, or no elements.

    Source: Hu et al., "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep
    Architectures" (arXiv 1607.03250), equation 1.
    """
    zeros = _by_channel(activation, "activation_channels_apoz") == 0
    return 100 * zeros.float().mean(-1).mean(0)


def _by_channel(activation: Tensor, function: str) -> Tensor:
    """(batch, channels, positions) of more than two dimensions, (batch, features) of two."""
    if activation.dim() < 2 or not activation.numel():
        shape = tuple(activation.shape)
        raise UsageError(f"{function}: needs (batch, channels, ...) or (batch, features), got shape {shape}")
    activation = activation.detach()
    if activation.dtype in (torch.float16, torch.bfloat16):
        activation = activation.float()  # sums of many positions leave the range of half precision
    return activation.flatten(2) if activation.dim() > 2 else activation
