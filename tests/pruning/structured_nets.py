"""Small networks of coupled layers, and what was masked of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distiller.epoch_window import EpochWindow
from distiller.interfaces import StepContext
from distiller.macs import count_macs
from distiller.masks import MaskStore
from distiller.thinning.trial import model_groups


class Residual(nn.Module):
    """A stream of 4 channels that stem and conv2 make, and 6 channels between conv1 and conv2."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (1, 1, 6, 6)
        self.stem, self.bn0 = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn0(self.stem(x)))
        x = torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


class Branches(nn.Module):
    """Two convolutions side by side, concatenated, flattened for a linear layer; a depthwise one in between."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (1, 2, 4, 4)
        self.a, self.b = nn.Conv2d(2, 5, 1), nn.Conv2d(2, 3, 1)
        self.depthwise, self.bn = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x), self.b(x)], 1).relu()
        x = self.bn(self.depthwise(x)).relu()
        return self.fc(self.pointwise(x).relu().flatten(1))


STREAM, INNER = "stem.weight", "conv1.weight"
OF_STREAM = {
    "stem.weight", "bn0.weight", "bn0.bias", "conv1.weight",
    "conv2.weight", "bn2.weight", "bn2.bias", "fc.weight",
}  # fmt: skip
OF_INNER = {"conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight"}


def params_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach() for name, param in model.named_parameters()}


def at(model: nn.Module, epoch: int = 0, window: tuple[int, int] = (0, 1), **more) -> StepContext:
    return StepContext(model, MaskStore(model), None, EpochWindow.spanning(*window), epoch, **more)


def masks_of(pruner, model: nn.Module, ctx: StepContext | None = None) -> dict[str, Tensor]:
    names = pruner.select([name for name, _ in model.named_parameters()])
    params = params_of(model)
    return pruner.compute_masks({name: params[name] for name in names}, ctx or at(model))


def apply(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)


def removed_by(masks: Mapping[str, Tensor], model: nn.Module) -> dict[str, list[int]]:
    """By group, the units of which all parameters are masked."""
    found = {}
    for group in model_groups(model, "test"):
        members = [member for member in group.members if member.name in masks]
        found[group.name] = [
            unit for unit in range(group.size)
            if members and all((masks[m.name].index_select(m.dim, torch.tensor(m.of([unit]))) == 0).all()
                               for m in members)
        ]  # fmt: skip
    return {name: units for name, units in found.items() if units}


def macs_of(model: nn.Module) -> int:
    return sum(layer.macs for layer in count_macs(model, torch.zeros(model.input_shape)))  # type: ignore[arg-type]


def set_filters(weight: Tensor, magnitudes: list[float]) -> None:
    """Filters that are constant, each with that L1 norm."""
    with torch.no_grad():
        for index, magnitude in enumerate(magnitudes):
            weight[index] = magnitude / weight[index].numel()


def images_for(model: nn.Module, count: int) -> Tensor:
    shape: tuple[int, ...] = model.input_shape  # type: ignore[assignment]
    return torch.randn(count, *shape[1:])
