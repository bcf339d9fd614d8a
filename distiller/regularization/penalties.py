"""Penalties and threshold masks of one tensor.

Every penalty is a scalar that can be differentiated everywhere, at zero too, and costs a
fixed number of kernels whatever the number of groups. Half-precision weights are measured
in single precision. Knows nothing about names, models or training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distiller.pruning.criteria import group_threshold_mask
from distiller.regularization.regimes import FAMILIES, family_dims

__all__ = ["EPSILON", "family_norms", "group_lasso", "group_mask", "group_variance", "l1"]

EPSILON = 1e-8
"""What is added to the sum of squares of a channel, and to the variance of channel norms."""


def l1(weight: Tensor) -> Tensor:
    """The sum of magnitudes, sum |w|; its gradient at 0 is 0.

    Args:
        weight: any shape.

    Returns:
        The sum, a scalar.
    """
    return _widened(weight).abs().sum()


def family_norms(weight: Tensor, family: str) -> Tensor:
    """The Euclidean norm of each group of one family; the gradient of an all-zero group is 0.

        norm_g = sqrt(sum of w^2 in g), for Channels sqrt(sum of w^2 in g + 1e-8)

    Args:
        weight: of the dimensions that the family wants.
        family: '2D', 'Rows', 'Cols', 'Channels', 'Filters', '3D' or '4D'.

    Returns:
        The norms, in the shape of the dimensions that tell groups apart; a scalar for '4D'.
    """
    dims = family_dims(family)
    others = tuple(dim for dim in range(weight.dim()) if dim not in dims)
    if family == "Channels":
        return (_widened(weight).square().sum(others) + EPSILON).sqrt()
    return torch.linalg.vector_norm(_widened(weight), 2, others)


def group_lasso(weight: Tensor, group: str) -> Tensor:
    """The sum of the Euclidean norms of all groups: sum_g ||w_g||_2.

    Args:
        weight: of the dimensions that the group wants.
        group: a key of `regimes.FAMILIES`; two families are summed up.

    Returns:
        The sum, a scalar.

    Source: Wen et al., "Learning Structured Sparsity in Deep Neural Networks" (2016), equation 2.
    """
    return torch.stack([family_norms(weight, family).sum() for family in FAMILIES[group]]).sum()


def group_variance(weight: Tensor) -> Tensor:
    """The inverse spread of the channels' norms: 1 / (var_j ||w[:, j]||_2 + 1e-8).

    The variance is the unbiased one. (Distiller had no 1e-8: channels of equal norms, as in an
    all-zero tensor, made the loss infinite.)

    Args:
        weight: 2-D or more, at least two channels (dim 1).

    Returns:
        The inverse, a scalar.
    """
    return 1 / (family_norms(weight, "Channels").var() + EPSILON)


def group_mask(weight: Tensor, group: str, threshold: float, criteria: str) -> Tensor:
    """Keep the groups whose magnitude is larger than a threshold (strictly).

    Args:
        weight: of the dimensions that the group wants.
        group: a key of `regimes.FAMILIES`; of two families an element has to be kept by both.
        threshold: 0 or more.
        criteria: 'Max' or 'Mean_Abs' of the group's elements.

    Returns:
        The mask: shape, dtype and memory format of `weight`.

    Raises:
        DistillerError: `weight` holds NaN.
    """
    mask = torch.ones_like(weight, requires_grad=False)
    for family in FAMILIES[group]:
        mask *= group_threshold_mask(weight, family, threshold, criteria)[0]
    return mask


def _widened(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
