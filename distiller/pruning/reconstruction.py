"""Least squares: the weights of a layer that keep its output when some of its inputs are left out.

All that is needed of the inputs X, shape (samples, columns), is their Gram matrix X^T X.
Knows nothing about pruning schedules or masks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["gram_matrix", "input_samples", "reconstructed_weights"]


def reconstructed_weights(
    weights: Tensor,  # (outputs, columns)
    gram: Tensor,  # (columns, columns)
    is_kept: Tensor,  # (columns,)
) -> Tensor:
    """The weights W' of the columns kept for which the output is as before, in the sense of least squares.

        minimise |X_kept W'^T - X W^T|^2   by   W'^T = W_kept^T + G_kk^+ G_kp W_pruned^T

    G is the Gram matrix in blocks of kept and pruned columns, + the pseudo-inverse. Of several solutions it
    is the one nearest to the weights that there were: what the data do not tell stays. With nothing
    pruned, the weights stay exactly.

    Args:
        weights: (outputs, columns).
        gram: X^T X, or a multiple of it, float64.
        is_kept: booleans.

    Returns:
        Weights of the same shape and type, zero in the columns that are not kept.
    """
    kept, pruned = weights[:, is_kept].double(), weights[:, ~is_kept].double()
    reconstructed = torch.zeros_like(weights)
    if kept.numel() and pruned.any():
        correction = _solve(gram[is_kept][:, is_kept], gram[is_kept][:, ~is_kept] @ pruned.T)
        kept = kept + correction.T
    reconstructed[:, is_kept] = kept.to(weights.dtype)
    return reconstructed


def gram_matrix(samples: Tensor) -> Tensor:
    """X^T X in float64.

    Args:
        samples: X, shape (samples, columns).
    """
    samples = samples.double()
    return samples.T @ samples


def input_samples(
    layer: nn.Conv2d | nn.Linear, inputs: Tensor, points: int, generator: torch.Generator
) -> Tensor:
    """What a layer multiplies its weights with, as rows in the order of `weight.flatten(1)`.

    Of a convolution, the patches under `points` of each image's output positions, drawn independently (all
    positions, where there are no more than that); of a linear layer all rows.

    Args:
        layer: a convolution of one group, or a linear layer.
        inputs: its input: (images, channels, h, w) or (..., features).
        points: output positions for each image.
        generator: on the CPU; nothing is drawn from another.

    Returns:
        (samples, channels * kernel height * kernel width) or (samples, features).
    """
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, layer.in_features)
    images = inputs if inputs.dim() == 4 else inputs.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    images = F.pad(images, layer._reversed_padding_repeated_twice, mode=mode)
    (kernel, stride, dilation) = (layer.kernel_size, layer.stride, layer.dilation)
    height, width = (
        (images.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)
    )
    count = len(images)
    if height * width <= points:
        positions = torch.arange(height * width).expand(count, -1)
    else:
        positions = torch.randint(height * width, (count, points), generator=generator)
    positions = positions.to(images.device)  # (images, points)
    offsets = [torch.arange(kernel[i], device=images.device) * dilation[i] for i in range(2)]
    rows = (positions // width * stride[0]).unsqueeze(2) + offsets[0]  # (images, points, kernel height)
    columns = (positions % width * stride[1]).unsqueeze(2) + offsets[1]  # (images, points, kernel width)
    image = torch.arange(count, device=images.device)[:, None, None, None]
    # (images, points, kernel height, kernel width, channels)
    patches = images.movedim(1, 3)[image, rows.unsqueeze(3), columns.unsqueeze(2)]
    return patches.movedim(4, 2).flatten(0, 1).flatten(1)


_SMALLEST_PIVOT = 1e-10
_RANK_TOLERANCE = 1e-12
"""Eigenvalues under this share of the largest count as zero: inputs in single precision tell no more."""


def _solve(gram: Tensor, right: Tensor) -> Tensor:
    """gram^+ right; by Cholesky's decomposition where the matrix is clearly of full rank."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal().square()
    if not failed and pivots.min() > _SMALLEST_PIVOT * pivots.max():
        return torch.cholesky_solve(right, factor)
    return torch.linalg.pinv(gram, rtol=_RANK_TOLERANCE, hermitian=True) @ right
