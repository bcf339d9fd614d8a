"""Blocks of weights: neighbouring input channels at one position of the kernel.

A block of shape [repetitions, depth, 1, 1] is repetitions * depth consecutive kernels of a weight
(out, in, kh, kw), counted through (out, in), at one of the kh * kw positions. A 2-D weight has one
position. There are out * in / (repetitions * depth) * kh * kw blocks; block b * kh * kw + p is the
b-th run of kernels at position p.

Knows nothing about parameter names, ranking or training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from distiller.errors import DistillerError, did_you_mean
from distiller.norms import Norm, l1_norm
from distiller.pruning.criteria import mask_like, refuse_nan, widened

__all__ = ["block_count", "block_magnitudes", "expand_blocks", "read_block_shape"]


def read_block_shape(kwargs: Mapping[str, Sequence[int]] | None) -> tuple[int, int]:
    """(repetitions, depth) from a pruner's `kwargs`, as {'block_shape': [1, 8, 1, 1]}.

    Raises:
        DistillerError: it is missing, of another form, or not alone.
    """
    given = dict(kwargs or {})
    unknown = [key for key in given if key != "block_shape"]
    if unknown:
        raise DistillerError(
            f"kwargs: unknown '{unknown[0]}'{did_you_mean(unknown[0], ['block_shape'])}; "
            "group_type 'Blocks' takes block_shape"
        )
    if "block_shape" not in given:
        raise DistillerError("group_type 'Blocks' needs kwargs: {block_shape: [repetitions, depth, 1, 1]}")
    shape = list(given["block_shape"])
    if len(shape) != 4 or shape[2:] != [1, 1] or min(shape) < 1:
        raise DistillerError(
            f"kwargs: block_shape must be [repetitions, depth, 1, 1] with whole numbers from 1, got {shape}"
        )
    return shape[0], shape[1]


def block_magnitudes(param: Tensor, block_shape: tuple[int, int], norm: Norm = l1_norm) -> Tensor:
    """The norm of each block, divided by its number of elements.

    Args:
        param: the weights, (out, in) or (out, in, ...).
        block_shape: repetitions and depth; their product divides out * in.
        norm: what measures a block.

    Returns:
        The magnitudes, shape (blocks,).

    Raises:
        DistillerError: a tensor that has no such blocks, or NaN.
    """
    refuse_nan(param)
    size = block_shape[0] * block_shape[1]
    block_count(param, block_shape)
    by_position = widened(param).reshape(-1, size, _positions(param))  # (runs, kernels of a run, positions)
    return norm(by_position, dim=1).flatten() / size


def expand_blocks(stay: Tensor, param: Tensor, block_shape: tuple[int, int]) -> Tensor:
    """The mask of a tensor in which each block has the value that `stay`, shape (blocks,), has for it."""
    runs = stay.to(param.device).view(-1, 1, _positions(param))
    return mask_like(param, runs.expand(-1, block_shape[0] * block_shape[1], -1).reshape(param.shape))


def block_count(param: Tensor, block_shape: tuple[int, int]) -> int:
    """How many blocks a tensor has.

    Raises:
        DistillerError: it has less than 2 dimensions, or its kernels do not divide into blocks.
    """
    if param.dim() < 2:
        raise DistillerError(
            f"group_type 'Blocks' wants a tensor of 2 dimensions or more, got shape {tuple(param.shape)}"
        )
    size = block_shape[0] * block_shape[1]
    kernels = param.size(0) * param.size(1)
    if kernels % size:
        raise DistillerError(
            f"block_shape must divide the {kernels} kernels of shape {tuple(param.shape)}, "
            f"got {block_shape[0]} * {block_shape[1]} = {size}"
        )
    return kernels // size * _positions(param)


def _positions(param: Tensor) -> int:
    return param[0, 0].numel()
