"""Masks and norms of the units of channel groups (`distiller.channel_groups`).

A unit is masked in every tensor that it takes a share of: filters, biases, norms, and the channels
that are read. A network masked so answers as the one without the units.
Knows nothing about which units are chosen, nor about physical removal.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from distiller.channel_groups import ChannelGroup, ChannelGroups
from distiller.pruning.criteria import refuse_nan


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
        (group.size,), in float32 or better.

    Raises:
        DistillerError: a weight holds NaN.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", 2017.
    """
    filters = [member for member in group.filters() if params[member.name].dim() >= 2]
    norms = torch.zeros(group.size)
    for member in filters:
        weight = params[member.name].detach()
        refuse_nan(weight)
        by_index = weight.abs().transpose(0, member.dim).flatten(1).sum(1, dtype=torch.float64).cpu()
        norms = norms + torch.stack([by_index[list(indices)].sum() for indices in member.indices])
    return norms
