"""Masks units of a network, and cuts them out of it by slicing its tensors by hand."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from distiller.channel_groups import ChannelGroup, ChannelGroups

Removed = Mapping[str, list[int]]


def first_units(groups: Iterable[ChannelGroup], share: float = 0.3) -> Removed:
    """At least one unit of each group that has several, and not all of them; every third or so."""
    chosen = {}
    for group in groups:
        count = min(group.size - 1, max(1, int(share * group.size)))
        generator = torch.Generator().manual_seed(group.size)
        chosen[group.name] = sorted(torch.randperm(group.size, generator=generator)[:count].tolist())
    return {name: units for name, units in chosen.items() if units}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def masked(model: nn.Module, groups: ChannelGroups, removed: Removed, makers_only: bool = False) -> nn.Module:
    """A copy with all of the units' elements at zero, or those of filters, biases and norms alone."""
    model = copy.deepcopy(model)
    tensors = tensors_of(model)
    with torch.no_grad():
        for name, units in removed.items():
            for member in groups[name].members:
                is_statistic = "running" in member.name
                if makers_only and (member.role == "input" or is_statistic):
                    continue
                value = 1.0 if member.name.endswith("running_var") else 0.0
                tensors[member.name].index_fill_(member.dim, torch.tensor(member.of(units)), value)
    return model


def cut(model: nn.Module, groups: ChannelGroups, removed: Removed) -> nn.Module:
    """A copy without the units: every tensor sliced, every module told of its new sizes."""
    model = copy.deepcopy(model)
    gone: dict[tuple[str, int], set[int]] = {}
    for name, units in removed.items():
        for key, indices in groups[name].indices(units).items():
            gone.setdefault(key, set()).update(indices)
    for (name, dim), indices in gone.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        tensor = getattr(module, attribute)
        kept = [i for i in range(tensor.shape[dim]) if i not in indices]
        sliced = tensor.detach().index_select(dim, torch.tensor(kept))
        if isinstance(tensor, nn.Parameter):
            setattr(module, attribute, nn.Parameter(sliced))
        else:
            module._buffers[attribute] = sliced
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d)):
            had = module.out_channels
            module.out_channels = module.weight.shape[0]
            if module.weight.shape[1] == module.in_channels // module.groups and module.groups > 1:
                module.groups = module.groups * module.out_channels // had
            module.in_channels = module.weight.shape[1] * module.groups
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.BatchNorm2d):
            module.num_features = len(module.weight)
    return model


def randomize(model: nn.Module) -> nn.Module:
    """Norms with statistics, scales and shifts of their own, so that nothing is equal by chance."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d, nn.LayerNorm)):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
            if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def relative_difference(a: nn.Module, b: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        first, second = a(x), b(x)
    return float((first - second).abs().max() / first.abs().max().clamp_min(1e-12))
