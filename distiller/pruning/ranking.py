"""Ranking structures (filters, channels, rows, blocks) of a tensor by norm, the least first.

    group_type   | one structure                        | tensors
    3D, Filters  | w[i]: what makes one output          | 2-D and more
    Channels     | w[:, j]: what reads one input        | 2-D and more
    Rows         | w[:, j]: what reads one input        | 2-D (out, in); Distiller's name, of the transpose
    Blocks       | neighbouring kernels at one position | 2-D and more; see `pruning.blocks`

Knows nothing about parameter names, pruners or training.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from distiller.errors import DistillerError, did_you_mean
from distiller.norms import Norm, l1_norm
from distiller.pruning.blocks import block_count, block_magnitudes, expand_blocks
from distiller.pruning.criteria import expand_group_map, group_count, group_magnitudes, lowest, snap
from distiller.pruning.settings import check_fraction

__all__ = [
    "check_group_size",
    "check_structure_type",
    "count_structures",
    "expand_structures",
    "number_to_prune",
    "ranked_structure_mask",
    "ranked_structures",
]


def ranked_structures(
    param: Tensor,
    group_type: str,
    fraction: float,
    norm: Norm = l1_norm,
    *,
    group_size: int = 1,
    rounding_fn: Callable[[float], int] = math.floor,
    noise: float = 0.0,
    block_shape: tuple[int, int] | None = None,
) -> Tensor:
    """Which structures of a tensor stay when the ones of least magnitude go.

    The magnitude of a structure is its norm divided by its number of elements. Of N structures exactly
    n = rounding_fn(fraction * N) go, of equal ones those of lower index; never all of them unless
    fraction is 1. With group_size g, each g neighbouring structures stand or fall together by the mean of
    their magnitudes, and n = g * rounding_fn(fraction * N / g).

    With noise e the ranking is disturbed with probability e: each magnitude is multiplied by a draw of
    its own from N(0, 1). Draws come from torch's generator for the CPU.

    Args:
        param: the weights, of the dimensions that the group type wants (table above).
        group_type: '3D', 'Filters', 'Channels', 'Rows' or 'Blocks'.
        fraction: how much is to go, 0..1.
        norm: what measures a structure.
        group_size: how many neighbours make one group; divides N.
        rounding_fn: from the number of groups to prune, a float, to a whole number.
        noise: probability of a disturbed ranking, 0..1.
        block_shape: repetitions and depth of 'Blocks', which need it.

    Returns:
        Booleans, shape (N,), True for a structure that stays.

    Raises:
        DistillerError: an unknown group type, a fraction out of range, a tensor of the wrong
            dimensions, a group size that does not divide N, or NaN.
    """
    check_fraction("fraction", fraction, one_allowed=True)
    magnitudes = _magnitudes(param, group_type, norm, block_shape)
    check_group_size(group_size, magnitudes.numel(), group_type)
    magnitudes = magnitudes.view(-1, group_size).mean(dim=1)
    if noise > 0 and float(torch.rand(())) < noise:
        magnitudes = magnitudes * torch.randn(magnitudes.shape).to(magnitudes)
    count = number_to_prune(fraction, magnitudes.numel(), rounding_fn)
    return ~lowest(magnitudes, count).repeat_interleave(group_size)


def number_to_prune(fraction: float, count: int, rounding_fn: Callable[[float], int] = math.floor) -> int:
    """rounding_fn(fraction * count), but never all of them unless fraction is 1."""
    most = count - (0 if fraction == 1 else 1)
    return min(int(rounding_fn(snap(fraction * count))), most)


def ranked_structure_mask(
    param: Tensor,
    group_type: str,
    fraction: float,
    norm: Norm = l1_norm,
    *,
    group_size: int = 1,
    rounding_fn: Callable[[float], int] = math.floor,
    noise: float = 0.0,
    block_shape: tuple[int, int] | None = None,
) -> Tensor:
    """The mask of a tensor without its structures of least magnitude; arguments of `ranked_structures`."""
    stay = ranked_structures(
        param,
        group_type,
        fraction,
        norm,
        group_size=group_size,
        rounding_fn=rounding_fn,
        noise=noise,
        block_shape=block_shape,
    )
    return expand_structures(stay, param, group_type, block_shape)


def expand_structures(
    stay: Tensor, param: Tensor, group_type: str, block_shape: tuple[int, int] | None = None
) -> Tensor:
    """The mask of a tensor in which each structure has the value that `stay`, shape (N,), has for it.

    Raises:
        DistillerError: an unknown group type, or another number of structures.
    """
    if group_type == "Blocks":
        return expand_blocks(stay, param, _needed(block_shape))
    return expand_group_map(stay, param, _criteria_group(group_type, param))


def count_structures(param: Tensor, group_type: str, block_shape: tuple[int, int] | None = None) -> int:
    """How many structures a tensor has.

    Raises:
        DistillerError: an unknown group type, or a tensor of the wrong dimensions.
    """
    if group_type == "Blocks":
        return block_count(param, _needed(block_shape))
    return group_count(param, _criteria_group(group_type, param))


def check_structure_type(group_type: str) -> None:
    """Raise a DistillerError unless `group_type` is one of the table above."""
    known = (*_GROUPS, "Blocks")
    if group_type not in known:
        raise DistillerError(
            f"group_type must be one of {', '.join(known)}, got '{group_type}'"
            + did_you_mean(group_type, known)
        )


def check_group_size(group_size: int, count: int, group_type: str) -> None:
    """Raise a DistillerError unless `group_size` divides the number of structures."""
    if count % group_size:
        raise DistillerError(f"group_size must divide the {count} {group_type}, got {group_size}")


_GROUPS = {"3D": "Filters", "Filters": "Filters", "Channels": "Channels", "Rows": "Cols"}


def _criteria_group(group_type: str, param: Tensor) -> str:
    """The group type of `pruning.criteria` for a structure."""
    check_structure_type(group_type)
    if group_type == "Rows" and param.dim() != 2:
        raise DistillerError(
            f"group_type 'Rows' wants a tensor of 2 dimensions, got shape {tuple(param.shape)}"
        )
    return _GROUPS[group_type]


def _magnitudes(param: Tensor, group_type: str, norm: Norm, block_shape: tuple[int, int] | None) -> Tensor:
    if group_type == "Blocks":
        return block_magnitudes(param, _needed(block_shape), norm)
    return group_magnitudes(param, _criteria_group(group_type, param), norm)


def _needed(block_shape: tuple[int, int] | None) -> tuple[int, int]:
    if block_shape is None:
        raise DistillerError("group_type 'Blocks' needs block_shape")
    return block_shape
