"""Tensors as methods of compression leave them."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.05


def pruned(weight: Tensor, share: float) -> Tensor:
    """Without signs of zeros."""
    return torch.where(torch.rand_like(weight) < share, 0.0, weight)


def rounded(weight: Tensor, bits: int, per_row: bool) -> Tensor:
    """On a symmetric grid, as quantization leaves it."""
    rows = weight.flatten(1)
    largest = rows.abs().amax(1, keepdim=True) if per_row else rows.abs().max()
    scale = largest / (2 ** (bits - 1) - 1)
    return (torch.round(rows / scale) * scale).view(weight.shape) + 0.0


def shared(shape: tuple[int, ...], count: int) -> Tensor:
    """Of `count` values, the more frequent the nearer they are to the middle one."""
    values = torch.randn(count).sort().values
    codes = (torch.randn(shape) * count / 6 + count / 2).round().clamp(0, count - 1).long()
    return values[codes]


def shared_by_rows(rows: int, columns: int, count: int) -> Tensor:
    return torch.randn(rows, count).gather(1, torch.randint(count, (rows, columns)))
