"""Forwards that compute between layers, in the ways that networks do."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Layers for forwards that compute in between."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.register_buffer("offset", torch.randn(4, 1, 1))
        self.rate = 0.2


class Residual(Block):
    def forward(self, x):
        identity = x
        out = self.bn(self.conv(x))
        out += identity
        return F.relu(out, inplace=True)


class AddsToItsInput(Block):
    def forward(self, x):
        x += self.conv(x)
        return x


class ReadsTheOldName(Block):
    def forward(self, x):
        out = self.conv(x)
        same = out
        out += x
        return same * out


class ReadsAView(Block):
    def forward(self, x):
        out = self.conv(x)
        view = out.view(-1)
        out += x
        return out * view[0]


class AddsToWhatDropoutPassesOn(Block):
    def forward(self, x):
        out = self.drop(x)
        out += 1.0
        return out * x


class InPlaceStatements(Block):
    def forward(self, x):
        out = self.conv(x)
        out.add_(x)
        out.sigmoid_()
        torch.relu_(out)
        out *= x
        out -= x
        out /= 2
        return out


class WritesSlices(Block):
    def forward(self, x):
        out = self.conv(x)
        out[:, 0] += 1
        out[:, 1] = 0
        return out + x


class Numbers(Block):
    def forward(self, x):
        x = self.conv(x)
        return (1 - x) * 2 + 0.5 + x / math.sqrt(x.shape[1]) + 3 / (2 * x)


class WithParameters(Block):
    def forward(self, x):
        weight = (self.scale * 2).exp() + self.offset
        return self.conv(x) * weight + self.scale


class FunctionalDropout(Block):
    def forward(self, x):
        return F.relu(F.dropout(self.conv(x), self.rate, self.training)) + x


class ReadsTheModeOfAChild(Block):
    def forward(self, x):
        return F.dropout(self.conv(x), self.drop.p, self.drop.training) + x


class PoolsBySize(Block):
    def forward(self, x):
        x = F.hardswish(self.conv(x))
        if x.shape[-1] % 2:
            x = F.pad(x, (0, 1, 0, 1))
        return F.avg_pool2d(F.max_pool2d(x, 2), 3).mean([2, 3])


class MakesTensors(Block):
    def forward(self, x):
        steps = torch.arange(x.size(3), device=x.device) + torch.zeros(x.shape[-1])
        return self.conv(x) + steps + torch.ones(1)


class Unpacks(Block):
    def forward(self, x):
        a, b, c, d = self.conv(x).unbind(1)
        q, k = torch.stack([a, b])
        return torch.cat([q @ k, c, d])


class CallsItsBase(Residual):
    def forward(self, x):
        return super().forward(x) * 2


class AsksForTheType(Block):
    def forward(self, x):
        if isinstance(x, Tensor) and torch.is_tensor(x) and x.dtype == torch.float32 and len(x) > 0:
            return self.conv(x).to(x.dtype) + x
        raise TypeError("no tensor")


class TakenNames(Block):
    def __init__(self):
        super().__init__()
        self.add = 3

    def relu(self):
        """Not to be overwritten."""

    def forward(self, x):
        return F.relu(self.conv(x) + x) + self.add


class ChangesABuffer(Block):
    def forward(self, x):
        self.offset.mul_(0.9)
        return self.conv(x) + self.offset


class UsesAChildsWeights(Block):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(self.conv(x).permute(0, 2, 3, 1), self.fc.weight, bias=self.fc.bias)


class Einsum(Block):
    def forward(self, x):
        x = self.conv(x)
        return torch.einsum("b c i d, b c j d -> b c i j", x, x)


class ResidualSequence(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def residual_sequence():
    return ResidualSequence(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())


def images(samples=2, size=6):
    return torch.randn(samples, 4, size, size)
