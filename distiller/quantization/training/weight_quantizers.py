"""Linear quantization of weights and biases over their own range, as parametrizations.

The range is that of the tensor as it is now: nothing is tracked, nothing is learned, and no value is outside,
so that gradients pass everywhere. Zero is on every grid.
Knows nothing about models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distiller.quantization import affine
from distiller.quantization.affine import LinearQuantMode
from distiller.quantization.training.fake_quant import Grid, fake_quantize_ste, linear_grid

__all__ = ["LinearWeightQuantizer", "OutputChannels"]

_EVERYWHERE = (float("-inf"), float("inf"))


@dataclass(frozen=True, slots=True)
class OutputChannels:
    """Where the output channels of a layer are in its weight.

    Attributes:
        dim: 0, or 1 in transposed convolutions.
        groups: groups of a transposed convolution, each with output channels of its own in dimension 1; else
            1.
    """

    dim: int = 0
    groups: int = 1

    @classmethod
    def of(cls, layer: nn.Module) -> OutputChannels:
        """Those of a convolution, linear layer or embedding (whose channels are its rows)."""
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            return cls(1, layer.groups)
        return cls()

    def rows(self, weight: Tensor) -> Tensor:
        """The weight as (output channels, elements of each)."""
        if self.dim == 0:
            return weight.flatten(1)
        grouped = weight.unflatten(0, (self.groups, -1))  # (groups, in / groups, out / groups, ...)
        return grouped.transpose(1, 2).flatten(0, 1).flatten(1)

    def spread(self, values: Tensor, weight: Tensor) -> Tensor:
        """`values`, (output channels,), in a shape that broadcasts with the weight; scalars as they are."""
        if values.dim() == 0:
            return values
        kernel = [1] * (weight.dim() - 2)
        if self.dim == 0:
            return values.reshape(-1, *[1] * (weight.dim() - 1))
        if self.groups == 1:
            return values.reshape(1, -1, *kernel)
        per_group = values.reshape(self.groups, 1, -1).expand(-1, weight.shape[0] // self.groups, -1)
        return per_group.flatten(0, 1).reshape(weight.shape[0], -1, *kernel)


class LinearWeightQuantizer(nn.Module):
    """Maps a weight or bias to the nearest values on a grid over its range.

    Args:
        num_bits: 2 to 16; up to 23 for a bias.
        mode: how the range is laid onto integers.
        channels: where the output channels are, for a grid of its own for each; None for one grid.
    """

    def __init__(self, num_bits: int, mode: LinearQuantMode, channels: OutputChannels | None = None) -> None:
        super().__init__()
        self.num_bits = num_bits
        self.mode = mode
        self.channels = channels

    def forward(self, weight: Tensor) -> Tensor:
        """The quantized weight; the gradient passes unchanged."""
        scale, zero_point = linear_grid(*self._range(weight), self.num_bits, self.mode)
        if self.channels is not None:
            scale = self.channels.spread(scale, weight)
            zero_point = None if zero_point is None else self.channels.spread(zero_point, weight)
        qmin, qmax = affine.quantized_range(self.num_bits, self.mode)
        return fake_quantize_ste(weight, scale, zero_point, qmin, qmax, passes=_EVERYWHERE)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What a weight that is assigned to the layer becomes: the full-precision one."""
        return weight

    def weight_grid(self, weight: Tensor) -> Grid:
        """The grid that a full-precision weight is rounded to.

        Raises:
            QuantizationError: the weight is not finite.
        """
        scale, zero_point = affine.scale_and_zero_point(*self._range(weight), self.num_bits, self.mode)
        return Grid(scale, zero_point, *affine.quantized_range(self.num_bits, self.mode))

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        return f"{self.num_bits} bits, {self.mode.name}{', per channel' if self.channels else ''}"

    def _range(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        weight = weight.detach()
        if self.channels is None:
            return torch.aminmax(weight)
        return torch.aminmax(self.channels.rows(weight), dim=1)
