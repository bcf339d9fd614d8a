"""A convolution or linear layer as a matrix product: what it reads for single values of its output, as rows.

For every group g of channels (one, but in grouped and depthwise convolutions)

    output[g] = rows[g] @ matrix[g]^T + bias[g]       (samples, fan-in) x (fan-in, outputs) of the group

where a sample is one position of the output of one input of the batch. Of a transposed convolution the
rows are those of the convolution that it is: over its input with zeros between the values.
Knows nothing about quantization.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller.quantization.ptq_layers import filters_back, filters_first

LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def groups_of(layer: nn.Module) -> int:
    """How many groups of channels the layer has; 1 of a linear one."""
    return 1 if isinstance(layer, nn.Linear) else layer.groups  # type: ignore[return-value]


def as_matrices(weight: Tensor, layer: nn.Module) -> Tensor:
    """A layer's weight as (groups, outputs, fan-in), outputs being those of one group."""
    return filters_first(weight, layer).flatten(1).unflatten(0, (groups_of(layer), -1))


def as_weight(matrices: Tensor, layer: nn.Module) -> Tensor:
    """The inverse of `as_matrices`."""
    kernel = () if isinstance(layer, nn.Linear) else layer.kernel_size
    filters = matrices.flatten(0, 1).unflatten(1, (-1, *kernel))  # type: ignore[misc]
    return filters_back(filters, layer)


def channel_dim(layer: nn.Module) -> int:
    """The dimension of the layer's output that holds its channels or features, counted from the end."""
    return -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)  # type: ignore[arg-type]


def positions_in(layer: nn.Module, output: Tensor) -> int:
    """How many positions the output has for each input of the batch: 1 of a linear layer on (n, features)."""
    return math.prod(_batched(layer, output).shape[1:-1] if _is_linear(layer) else output.shape[2:])


def input_rows(layer: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
    """What the layer reads for some positions of its output.

    Args:
        layer: one of `LAYERS`.
        x: its input, (n, channels, ...) or, of a linear layer, (n, ..., features).
        positions: (n, k), indices into the positions of the output of each input, row by row.

    Returns:
        (groups, n * k, fan-in), in the order of `as_matrices`.
    """
    if _is_linear(layer):
        rows = _batched(layer, x).flatten(1, -2)  # (n, positions, features)
        return _picked(rows, positions).flatten(0, 1).unsqueeze(0)
    convolution: Any = layer
    kernel, dilation, stride = convolution.kernel_size, convolution.dilation, convolution.stride
    if isinstance(layer, _TRANSPOSED):
        x, stride = _spread(layer, x), (1,) * len(kernel)
    else:
        mode = "constant" if convolution.padding_mode == "zeros" else convolution.padding_mode
        x = F.pad(x, convolution._reversed_padding_repeated_twice, mode=mode)
    indices = _patches(x.shape[2:], kernel, stride, dilation, positions)  # (n, k, taps)
    if isinstance(layer, _TRANSPOSED):
        indices = indices.flip(-1)
    count, channels, taps = positions.shape[1], x.shape[1], indices.shape[-1]
    chosen = indices.flatten(1).unsqueeze(1).expand(-1, channels, -1)
    patches = x.flatten(2).gather(2, chosen).unflatten(2, (count, taps))  # (n, channels, k, taps)
    grouped = patches.unflatten(1, (convolution.groups, -1))  # (n, groups, channels, k, taps)
    return grouped.permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)


def output_rows(layer: nn.Module, output: Tensor, positions: Tensor) -> Tensor:
    """The layer's output at some positions, as (groups, n * k, outputs); arguments as in `input_rows`."""
    if _is_linear(layer):
        values = _batched(layer, output).flatten(1, -2)
    else:
        values = output.flatten(2).transpose(1, 2)  # (n, positions, channels)
    picked = _picked(values, positions).flatten(0, 1)
    return picked.unflatten(1, (groups_of(layer), -1)).transpose(0, 1)


def draw_positions(inputs: int, positions: int, wanted: int, generator: torch.Generator) -> Tensor:
    """For each input of a batch different positions, at random; all of them, where no more are wanted.

    Args:
        inputs: n, inputs in the batch.
        positions: how many positions there are.
        wanted: how many to draw, at least 1.
        generator: on the CPU.

    Returns:
        (n, min(wanted, positions)), int64, on the CPU.
    """
    if wanted >= positions:
        return torch.arange(positions).repeat(inputs, 1)
    return torch.rand(inputs, positions, generator=generator).topk(wanted, dim=1).indices


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear)


def _batched(layer: nn.Module, values: Tensor) -> Tensor:
    """(features,) and (n, features) as (n, 1, features)."""
    return (
        values.unsqueeze(0).unsqueeze(0)
        if values.dim() == 1
        else values.unsqueeze(1)
        if values.dim() == 2
        else values
    )


def _picked(values: Tensor, positions: Tensor) -> Tensor:
    """(n, positions, features) at (n, k) positions."""
    return values.gather(1, positions.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _patches(size: torch.Size, kernel: Any, stride: Any, dilation: Any, positions: Tensor) -> Tensor:
    """Where the taps of a kernel lie in a flattened, padded input, (n, k, taps)."""
    outputs = [(size[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(len(kernel))]
    corner, taps = torch.zeros_like(positions), torch.zeros(1, dtype=torch.int64, device=positions.device)
    for i, places in enumerate(torch.unravel_index(positions, tuple(outputs))):
        corner = corner * size[i] + places * stride[i]
        along = torch.arange(kernel[i], device=positions.device) * dilation[i]
        taps = (taps.unsqueeze(-1) * size[i] + along).flatten()
    return corner.unsqueeze(-1) + taps


def _spread(layer: Any, x: Tensor) -> Tensor:
    """The input over which a transposed convolution is a convolution with its kernel turned round."""
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], layer.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    spread[(..., *(slice(None, None, step) for step in layer.stride))] = x
    reach = [
        d * (k - 1) - p for d, k, p in zip(layer.dilation, layer.kernel_size, layer.padding, strict=True)
    ]
    pads = [pad for r, extra in zip(reach, layer.output_padding, strict=True) for pad in (r, r + extra)]
    pairs = [(pads[i], pads[i + 1]) for i in range(0, len(pads), 2)]
    return F.pad(spread, [pad for pair in reversed(pairs) for pad in pair])
