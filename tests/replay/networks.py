"""Networks of every shape that a part of one can have, tiny, with batch norms that have seen something."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distiller.replay import Program, read_program


class Plain(nn.Module):
    """Convolutions without norms, in-place ReLUs, a flatten that asks for the number of images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.fc1 = nn.Linear(8 * 2 * 2, 12)
        self.fc2 = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x), inplace=True), 2)
        x = F.relu(self.conv2(x), inplace=True)
        x = x.reshape(x.size(0), -1)
        return self.fc2(torch.relu_(self.fc1(x)))


class Residual(nn.Module):
    """Norms, a sum in place, a shortcut with a convolution that comes after the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=True)
        self.norm2 = nn.BatchNorm2d(8, affine=False)
        self.short = nn.Sequential(nn.Conv2d(8, 8, 1, stride=2, bias=False), nn.BatchNorm2d(8))
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.short(x)
        return self.fc(self.dropout(F.relu(y).mean((2, 3))))


class Skipping(nn.Module):
    """Sums of an old result and a new one, which somebody reads again, or nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.conv1(x)
        z = F.relu(x + y)
        z = F.relu(y + self.conv2(z))
        return self.fc((x + z).mean((2, 3)))


class Mixing(nn.Module):
    """A batch norm without running statistics: what an image is answered depends on the others beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6, track_running_stats=False)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.norm(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


class Branches(nn.Module):
    """Concatenation, a depthwise convolution, a value used twice, group and layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(1, 4, 3, padding=1)
        self.right = nn.Conv2d(1, 4, 5, padding=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.norm = nn.GroupNorm(2, 8)
        self.last = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.left(x).relu(), self.right(x).relu()), 1)
        y = self.depthwise(x)
        y = self.grouped(y) + y * torch.sigmoid(y)
        return self.fc(self.last(self.norm(y).amax((2, 3))))


class Tied(nn.Module):
    """One weight in two layers; one layer run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 16)
        self.again = nn.Linear(16, 16)
        self.back = nn.Linear(16, 16)
        self.back.weight = self.again.weight
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)).tanh()
        x = self.again(self.again(x).relu())
        return self.fc(self.back(x).relu())


class Scaling(nn.Module):
    """Changes the images that it is given, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 12)
        self.fc2 = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x.mul_(2).sub_(1).flatten(1)).relu())


class Remembering(nn.Module):
    """What it answers depends on what it was shown before."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 12)
        self.fc2 = nn.Linear(12, 10)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.mul_(0.5).add_(x.mean() + 1)
        return self.fc2((self.fc1(x.flatten(1)) * self.seen).relu())


class Viewing(nn.Module):
    """Reads a view of a result after the result itself has been read for the last time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3)
        self.conv = nn.Conv2d(6, 6, 3)
        self.fc = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.relu(self.stem(x)))
        seen = y.flatten(2)
        z = F.relu(y)
        return self.fc(z.mean((2, 3)) + seen.mean(2))


class FixedBatch(nn.Module):
    """Depends on the number of images it is traced with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).relu().mean((2, 3))
        return self.fc(x) + torch.zeros(int(x.shape[0]), 1)


class Counting(nn.Module):
    """Takes each image out by the number of its row."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 12)
        self.fc2 = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(self.fc1(x.flatten(1)).relu())
        return y[torch.arange(x.shape[0])]


class Attention(nn.Module):
    """Tokens, attention, a parameter that is no weight of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 4, stride=4)
        self.place = nn.Parameter(torch.randn(1, 4, 8) * 0.1)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.place
        return self.fc(self.block(x).mean(1))


class Signs(nn.Module):
    """Signs of activations, as of a binary network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(16)
        self.fc1 = nn.Linear(16 * 4, 32)
        self.fc2 = nn.Linear(32, 10)

    def rounded(self, x: Tensor) -> Tensor:
        return torch.sign(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rounded(self.conv1(x))
        x = F.max_pool2d(self.rounded(self.norm2(self.conv2(x))), 4).flatten(1)
        return self.fc2(self.rounded(self.fc1(x)))


class FourBits(Signs):
    """Activations of 4 bits, as they are trained with a straight-through estimator."""

    def rounded(self, x: Tensor) -> Tensor:
        x = x.clamp(0, 2)
        return x + (torch.round(x * 7.5) / 7.5 - x).detach()


class LastBits(Signs):
    """The least change of an activation is the largest one behind it."""

    def rounded(self, x: Tensor) -> Tensor:
        return torch.remainder(torch.round(x * 2**22), 2)


class RoundedFixedBatch(FixedBatch):
    """Rounds, and depends on the number of images it is traced with."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).round()


NETWORKS = {
    cls.__name__: cls
    for cls in (
        Plain, Residual, Skipping, Mixing, Branches, Tied, FixedBatch, Counting, Attention, Viewing,
    )
}  # fmt: skip
DISCONTINUOUS = {cls.__name__: cls for cls in (Signs, FourBits, LastBits, RoundedFixedBatch)}
"""Those that are run bit for bit."""
WITHOUT_PROGRAM = {cls.__name__: cls for cls in (Scaling, Remembering)}
"""Those that are run as a whole."""


def make(name: str) -> nn.Module:
    """One of them in evaluation mode, with statistics that are not those of a new one."""
    torch.manual_seed(5)
    model = {**NETWORKS, **DISCONTINUOUS, **WITHOUT_PROGRAM}[name]()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(16, 1, 8, 8) * 2 + 1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
    return model.eval()


@cache
def program_of(name: str, count: int = 3) -> Program:
    """The steps of one of them, as read with so many images; they hold no weight, and take no change."""
    return read_program(make(name), images(count, seed=2))


def images(count: int = 7, seed: int = 11) -> Tensor:
    """(count, 1, 8, 8)."""
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
