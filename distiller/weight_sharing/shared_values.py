"""Weights of few values: which value each element has, and how elements of one value move together.

An element's code is 0 where the element is exactly 0, else 1 + the number of its value. Elements of one
code have one gradient, the mean of theirs, and one value, the mean of theirs: the step of a trained
centroid whose gradient, the sum over its elements, is divided by their number, so that the learning rate
of weights suits it.
Knows nothing about models, or where values come from.

Source: Han et al., Deep Compression, ICLR 2016 (arXiv 1510.00149), section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["codes_of", "mean_by_code", "values_by_code"]


def codes_of(weight: Tensor, values: Tensor) -> Tensor:
    """The code of each element: that of the nearest value, the larger of two that are as near.

    Args:
        weight: any shape, finite.
        values: (count,), ascending, at least one.

    Returns:
        int64 in the shape of `weight`: 0 where it is exactly 0, else 1..count.
    """
    exact = values.to(torch.float64)
    middles = (exact[1:] + exact[:-1]) / 2
    nearest = torch.bucketize(weight.detach().to(torch.float64), middles, right=True)
    return torch.where(weight.detach() == 0, 0, nearest + 1)


def values_by_code(values: Tensor, codes: Tensor) -> Tensor:
    """The weight that codes stand for, 0 for code 0.

    Args:
        values: (count,).
        codes: from 0 to count.

    Returns:
        In the shape of `codes`, of the type of `values`.
    """
    return torch.cat([values.new_zeros(1), values])[codes]


def mean_by_code(tensor: Tensor, codes: Tensor) -> Tensor:
    """The mean over all elements of one code, for each of these; 0 for code 0.

    Args:
        tensor: floating point.
        codes: int64, in the shape of `tensor`.

    Returns:
        In the shape, type and memory format of `tensor`: elements of one code have exactly the same value.
    """
    flat = codes.flatten()
    count = int(flat.max()) + 1 if flat.numel() else 1
    sums = torch.zeros(count, dtype=torch.float64, device=tensor.device)
    sums.index_add_(0, flat, tensor.detach().flatten().to(torch.float64))
    means = sums / torch.bincount(flat, minlength=count).clamp(min=1)
    means[0] = 0
    return torch.empty_like(tensor).copy_(means.to(tensor.dtype)[codes])
