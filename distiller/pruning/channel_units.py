"""Masks and scores of the units of channel groups (`distiller.channel_groups`).

A unit is masked in every tensor that it takes a share of: filters, biases, norms, and the channels
that are read. A network masked so answers as the one without the units.
Knows nothing about which units are chosen, nor about physical removal.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from distiller.channel_groups import ChannelGroup, ChannelGroups, GroupMember
from distiller.pruning.criteria import refuse_nan, widened


def unit_masks(
    params: Mapping[str, Tensor], groups: ChannelGroups, removed: Mapping[str, Collection[int]]
) -> dict[str, Tensor]:
    """The masks that have all elements of the removed units at zero.

    Args:
        params: the model's parameters by canonical name; buffers (running statistics) have no masks.
        groups: of the model.
        removed: by group, the units that are masked.

    Returns:
        By parameter with masked elements, its mask: 1 keeps, 0 prunes; its shape, type and device.
    """
    masks: dict[str, Tensor] = {}
    for group_name, units in removed.items():
        for member in groups[group_name].members if units else ():
            param = params.get(member.name)
            if param is not None:
                mask = masks.setdefault(member.name, torch.ones_like(param, requires_grad=False))
                mask.index_fill_(member.dim, torch.tensor(member.of(units), device=mask.device), 0)
    return masks


def unit_l1_norms(params: Mapping[str, Tensor], group: ChannelGroup) -> Tensor:
    """The L1 norm of each unit: sum of |w| over its filters in all layers of the group, biases left out.

    Args:
        params: the model's parameters by canonical name.
        group: the group.

    Returns:
        (group.size,), float64.

    Raises:
        DistillerError: a weight holds NaN.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", 2017.
    """
    norms = torch.zeros(group.size, dtype=torch.float64)
    for member in filter_weights(params, group):
        refuse_nan(params[member.name])
        norms += unit_sums(params[member.name].detach().abs(), member).cpu()
    return norms


def unit_l2_norms(params: Mapping[str, Tensor], group: ChannelGroup) -> Tensor:
    """The L2 norm of each unit: square root of the sum of w^2; arguments and filters of `unit_l1_norms`."""
    squares = torch.zeros(group.size, dtype=torch.float64)
    for member in filter_weights(params, group):
        refuse_nan(params[member.name])
        squares += unit_sums(widened(params[member.name]).square(), member).cpu()
    return squares.sqrt()


def unit_scales(params: Mapping[str, Tensor], group: ChannelGroup, scales: Sequence[str]) -> Tensor:
    """The sum of |gamma| over the batch norms of each unit, in all layers of the group.

    Args:
        params: the model's parameters by canonical name.
        group: the group.
        scales: canonical names of the batch norms' scales, of the group or not.

    Returns:
        (group.size,), float64.

    Raises:
        DistillerError: a scale holds NaN.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", 2017.
    """
    sums = torch.zeros(group.size, dtype=torch.float64)
    for member in group.members:
        if member.name in scales:
            refuse_nan(params[member.name])
            sums += unit_sums(params[member.name].detach().abs(), member).cpu()
    return sums


def unit_loss_removed(
    params: Mapping[str, Tensor], gradients: Mapping[str, Tensor], members: Sequence[GroupMember]
) -> Tensor:
    """By how much the loss falls, to first order, when a unit's share of some tensors becomes zero.

        sum(w * dL/dw) over what is the unit's

    Args:
        params: by canonical name.
        gradients: of the loss by each of them.
        members: the tensors, of one group.

    Returns:
        One number, of either sign, for each unit; float64.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning" (arXiv 1906.10771), section
    3, for the joint change of a set of parameters.
    """
    parts = [
        unit_sums(widened(params[member.name]) * widened(gradients[member.name]), member)
        for member in members
    ]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum(0)


def nonzero_units(params: Mapping[str, Tensor], group: ChannelGroup) -> Tensor:
    """Which units have filters that are not zero: booleans, (group.size,)."""
    counts = torch.zeros(group.size, dtype=torch.float64)
    for member in filter_weights(params, group):
        counts += unit_sums(params[member.name].detach() != 0, member).cpu()
    return counts > 0


def filter_weights(params: Mapping[str, Tensor], group: ChannelGroup) -> list[GroupMember]:
    """The weights whose filters make the group's channels; not their biases."""
    return [member for member in group.filters() if member.name in params and params[member.name].dim() >= 2]


def unit_sums(tensor: Tensor, member: GroupMember) -> Tensor:
    """For each unit, the sum of its share of a tensor: (units,), float64, on the tensor's device.

    Args:
        tensor: of the member's shape.
        member: says along which dimension, and which indices.
    """
    by_index = (
        tensor.transpose(0, member.dim).reshape(tensor.size(member.dim), -1).sum(1, dtype=torch.float64)
    )
    units = [unit for unit, indices in enumerate(member.indices) for _ in indices]
    indices = [index for indices in member.indices for index in indices]
    sums = by_index.new_zeros(len(member.indices))
    return sums.index_add_(0, torch.tensor(units, device=sums.device), by_index[indices])
