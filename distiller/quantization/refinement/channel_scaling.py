"""Channels of a layer multiplied by factors: those that it puts out, and those that it reads.

Knows nothing about where the factors come from.
"""

from __future__ import annotations

from torch import Tensor, nn

from distiller.quantization.ptq_layers import filters_back, filters_first
from distiller.quantization.refinement.layer_rows import groups_of


class ChannelMagnitudes:
    """The largest absolute weight between each input and each output channel of a layer, under factors.

    All that ranges depend on, small beside the weight itself.

    Args:
        weight: the layer's, finite.
        layer: a convolution, a transposed one, or a linear layer.
        block: of a linear layer, how many neighbouring features that it reads are one channel.

    Attributes:
        output_factors: (output channels,), float64, first ones.
        input_factors: (input channels,), the same.
    """

    def __init__(self, weight: Tensor, layer: nn.Module, block: int) -> None:
        largest = by_channel(weight.detach(), layer, block).abs().amax(3)
        self._largest = largest.double()  # (groups, outputs, inputs)
        groups, outputs, inputs = largest.shape
        self.output_factors = self._largest.new_ones(groups * outputs)
        self.input_factors = self._largest.new_ones(groups * inputs)

    def output_ranges(self) -> Tensor:
        """The largest absolute weight of each output channel."""
        by_input = self.input_factors.reshape(len(self._largest), 1, -1)
        return (self._largest * by_input).amax(2).flatten() * self.output_factors

    def input_ranges(self) -> Tensor:
        """The largest absolute weight on each channel that is read."""
        by_output = self.output_factors.reshape(len(self._largest), -1, 1)
        return (self._largest * by_output).amax(1).flatten() * self.input_factors


def scaled_weight(
    weight: Tensor, layer: nn.Module, output_factors: Tensor, input_factors: Tensor, block: int = 1
) -> Tensor:
    """A weight with its channels multiplied by factors, in its own type.

    Args:
        weight: the layer's.
        layer: as in `ChannelMagnitudes`.
        output_factors: (output channels,), float64.
        input_factors: (input channels,), float64.
        block: as in `ChannelMagnitudes`.
    """
    values, groups = by_channel(weight, layer, block), groups_of(layer)
    scaled = values * output_factors.reshape(groups, -1, 1, 1) * input_factors.reshape(groups, 1, -1, 1)
    return filters_back(scaled.to(weight.dtype).reshape(filters_first(weight, layer).shape), layer)


def response_to(shift: Tensor, weight: Tensor, layer: nn.Module, block: int = 1) -> Tensor:
    """What a layer without bias puts out when it reads the same everywhere, (output channels,), float64.

    Args:
        shift: what it reads, (input channels,).
        weight: the layer's.
        layer: as in `ChannelMagnitudes`.
        block: as in `ChannelMagnitudes`.
    """
    values = by_channel(weight, layer, block).double()
    return (values * shift.double().reshape(len(values), 1, -1, 1)).sum((2, 3)).flatten()


def by_channel(weight: Tensor, layer: nn.Module, block: int = 1) -> Tensor:
    """A layer's weight as (groups, outputs, inputs, taps), outputs and inputs being those of one group.

    The taps of a linear layer are the features of a block.
    """
    rows = filters_first(weight, layer)
    rows = rows.unflatten(1, (-1, block)) if isinstance(layer, nn.Linear) else rows.flatten(2)
    return rows.unflatten(0, (groups_of(layer), -1))
