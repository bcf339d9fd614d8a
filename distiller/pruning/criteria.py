"""Pruning criteria: from a tensor to a mask of its shape, dtype, device and memory format.

A mask has 1 where an element is kept and 0 where it is pruned. The first half prunes
elements one by one, the second half whole groups of them:

    group_type      | one group               | tensors
    2D              | w[i, j]                 | 4-D (kernels)
    Rows            | w[i]                    | 2-D
    Cols            | w[:, j]                 | 2-D
    3D, Filters     | w[i]                    | 2-D and more (dim 0: output channels)
    Channels        | w[:, j]                 | 2-D and more (dim 1: input channels)
    4D              | w                       | 4-D (all of a layer)

Knows nothing about parameter names, models or training.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distiller.errors import DistillerError, did_you_mean
from distiller.norms import Norm, l1_norm, l2_norm, max_norm
from distiller.pruning.settings import check_fraction

__all__ = [
    "create_mask_level_criterion",
    "create_mask_sensitivity_criterion",
    "create_mask_threshold_criterion",
    "expand_group_map",
    "group_count",
    "group_magnitudes",
    "group_threshold_mask",
    "lowest",
    "mask_like",
    "refuse_nan",
    "snap",
    "standard_deviation",
    "widened",
]


def create_mask_threshold_criterion(t: Tensor, threshold: float) -> Tensor:
    """Keep what is larger in magnitude than a threshold: mask = |t| > threshold (strictly).

    Args:
        t: any shape.
        threshold: 0 or more; elements equal to it are pruned.

    Returns:
        The mask.

    Raises:
        DistillerError: `t` holds NaN.
    """
    refuse_nan(t)
    return mask_like(t, t.detach().abs() > threshold)


def create_mask_level_criterion(t: Tensor, desired_sparsity: float) -> Tensor:
    """Prune a fraction of a tensor: the k = int(desired_sparsity * numel) smallest magnitudes.

    Exactly k elements are pruned: of equal magnitudes the ones of lower index. (Distiller pruned
    all that tie with the k-th, so the whole of a constant tensor, and failed with an IndexError
    for k = 0.) A product within rounding error of a whole number counts as that number:
    0.29 of 100 elements are 29.

    Args:
        t: any shape.
        desired_sparsity: fraction to prune, 0..1.

    Returns:
        The mask.

    Raises:
        DistillerError: `t` holds NaN, or the fraction is out of range.
    """
    check_fraction("desired_sparsity", desired_sparsity, one_allowed=True)
    refuse_nan(t)
    count = int(snap(desired_sparsity * t.numel()))
    return mask_like(t, ~lowest(t.detach().abs().flatten(), count).view(t.shape))


def create_mask_sensitivity_criterion(t: Tensor, sensitivity: float, stddev: float | None = None) -> Tensor:
    """Keep what is larger in magnitude than a multiple of the tensor's standard deviation.

        mask = |t| > sensitivity * stddev

    Args:
        t: any shape.
        sensitivity: 0 or more.
        stddev: the standard deviation to go by, usually that of the dense weights; measured
            on `t` by default.

    Returns:
        The mask.

    Raises:
        DistillerError: `t` holds NaN, or its standard deviation is not finite.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (2015),
    section 3.
    """
    deviation = standard_deviation(t) if stddev is None else stddev
    return create_mask_threshold_criterion(t, sensitivity * deviation)


def standard_deviation(t: Tensor) -> float:
    """The unbiased standard deviation of all elements; 0 for a single element.

    Raises:
        DistillerError: `t` holds NaN, or its standard deviation is not finite.
    """
    refuse_nan(t)
    if t.numel() < 2:
        return 0.0
    deviation = float(widened(t).std())
    if not math.isfinite(deviation):
        raise DistillerError(
            f"the standard deviation must be finite, got {deviation} for shape {tuple(t.shape)}"
        )
    return deviation


def group_threshold_mask(
    param: Tensor,
    group_type: str,
    threshold: float,
    criteria: str,
    binary_map: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep the groups whose magnitude is larger than a threshold (strictly).

    Args:
        param: the weights, of the dimensions that the group type wants (table above).
        group_type: '2D', 'Rows', 'Cols', '3D', 'Filters', 'Channels' or '4D'.
        threshold: 0 or more.
        criteria: 'L1', 'L2' or 'Max' of the group's elements; 'Mean_Abs', 'Mean_L1' or 'Mean_L2' for
            the norm divided by the number of elements (for 'Mean_L2' also: |w|_2 / n).
        binary_map: one value per group, 1 to keep it; instead of threshold and criteria.

    Returns:
        The mask, and the map of groups it was made from: shape (groups,), dtype of `param`.

    Raises:
        DistillerError: unknown group type or criteria, a tensor or map of the wrong shape, or NaN.
    """
    if binary_map is None:
        if criteria not in _GROUP_CRITERIA:
            raise DistillerError(
                f"criteria must be one of {', '.join(_GROUP_CRITERIA)}, got '{criteria}'"
                + did_you_mean(criteria, _GROUP_CRITERIA)
            )
        norm, is_mean = _GROUP_CRITERIA[criteria]
        magnitudes = group_magnitudes(param, group_type, norm, is_mean=is_mean)
        binary_map = (magnitudes > threshold).to(param.dtype)
    return expand_group_map(binary_map, param, group_type), binary_map


def group_magnitudes(param: Tensor, group_type: str, norm: Norm = l1_norm, *, is_mean: bool = True) -> Tensor:
    """The norm of each group, divided by its number of elements.

    Half-precision weights are measured in single precision.

    Args:
        param: the weights, of the dimensions that the group type wants (table above).
        group_type: '2D', 'Rows', 'Cols', '3D', 'Filters', 'Channels' or '4D'.
        norm: what measures a group.
        is_mean: whether to divide.

    Returns:
        The magnitudes, shape (groups,).

    Raises:
        DistillerError: unknown group type, a tensor of the wrong dimensions, or NaN.
    """
    refuse_nan(param)
    groups = _group_matrix(widened(param), group_type)  # (groups, elements of a group)
    magnitudes = norm(groups, dim=1)
    return magnitudes / groups.size(1) if is_mean else magnitudes


def expand_group_map(binary_map: Tensor, param: Tensor, group_type: str) -> Tensor:
    """The mask of `param` in which each group has the value that the map has for it.

    Args:
        binary_map: shape (groups,); 1 or True keeps a group.
        param: the weights, of the dimensions that the group type wants (table above).
        group_type: '2D', 'Rows', 'Cols', '3D', 'Filters', 'Channels' or '4D'.

    Returns:
        The mask.

    Raises:
        DistillerError: the map has another number of groups, an unknown group type, or a tensor
            of the wrong dimensions.
    """
    count = group_count(param, group_type)
    if binary_map.numel() != count:
        raise DistillerError(
            f"binary_map: one value for each of {count} {group_type} is wanted, got {binary_map.numel()}"
        )
    dims = _group_dims(param, group_type)
    shape = [size if dim in dims else 1 for dim, size in enumerate(param.shape)]
    return mask_like(param, binary_map.to(param.device).view(shape))


def group_count(param: Tensor, group_type: str) -> int:
    """How many groups a tensor has.

    Raises:
        DistillerError: an unknown group type, or a tensor of the wrong dimensions.
    """
    return math.prod(param.size(dim) for dim in _group_dims(param, group_type))


def lowest(values: Tensor, count: int) -> Tensor:
    """Which are the `count` lowest values, exactly; of equal values the ones of lower index.

    Args:
        values: shape (n,), without NaN.
        count: 0..n.

    Returns:
        Booleans, shape (n,), `count` of them True.
    """
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    highest_of_them = values.kthvalue(count).values
    is_among = values < highest_of_them
    tied = (values == highest_of_them).nonzero().flatten()  # ascending, and mostly one
    is_among[tied[: count - int(is_among.sum())]] = True
    return is_among


def snap(x: float) -> float:
    """The whole number that `x` is meant to be, when float arithmetic has missed it; `x` otherwise."""
    whole = float(round(x))
    return whole if abs(x - whole) <= 1e-13 * max(1.0, abs(x)) else x


def refuse_nan(t: Tensor) -> None:
    """Raise a DistillerError if a tensor holds NaN: nothing tells whether that should go."""
    if t.isnan().any():
        raise DistillerError(
            f"cannot be pruned, got {int(t.isnan().sum())} NaN in {t.numel()} elements; "
            "training has diverged: resume from an earlier checkpoint with a lower learning rate"
        )


def widened(t: Tensor) -> Tensor:
    """The values of a tensor, half precision made single: to measure with."""
    return t.detach().float() if t.dtype in (torch.float16, torch.bfloat16) else t.detach()


def mask_like(t: Tensor, keep: Tensor) -> Tensor:
    """`keep`, broadcast to the shape of `t`, as a mask in its dtype and memory format."""
    return torch.empty_like(t, requires_grad=False).copy_(keep)


_GROUP_CRITERIA: dict[str, tuple[Norm, bool]] = {
    "L1": (l1_norm, False),
    "L2": (l2_norm, False),
    "Max": (max_norm, False),
    "Mean_Abs": (l1_norm, True),
    "Mean_L1": (l1_norm, True),
    "Mean_L2": (l2_norm, True),
}

_ANY = range(2, 100)
_GROUP_TYPES: dict[
    str, tuple[tuple[int, ...], range]
] = {  # the dims that tell groups apart; tensor dims taken
    "2D": ((0, 1), range(4, 5)),
    "Rows": ((0,), range(2, 3)),
    "Cols": ((1,), range(2, 3)),
    "3D": ((0,), _ANY),
    "Filters": ((0,), _ANY),
    "Channels": ((1,), _ANY),
    "4D": ((), range(4, 5)),
}


def _group_dims(param: Tensor, group_type: str) -> tuple[int, ...]:
    if group_type not in _GROUP_TYPES:
        raise DistillerError(
            f"group_type must be one of {', '.join(_GROUP_TYPES)}, got '{group_type}'"
            + did_you_mean(group_type, _GROUP_TYPES)
        )
    dims, accepted = _GROUP_TYPES[group_type]
    if param.dim() not in accepted:
        wanted = f"{accepted[0]} dimensions" + (" or more" if accepted is _ANY else "")
        raise DistillerError(
            f"group_type '{group_type}' wants a tensor of {wanted}, got shape {tuple(param.shape)}"
        )
    return dims


def _group_matrix(param: Tensor, group_type: str) -> Tensor:
    dims = _group_dims(param, group_type)
    in_front = param.movedim(dims, tuple(range(len(dims))))
    return in_front.reshape(math.prod(param.size(dim) for dim in dims), -1)
