"""A small network for training with quantization, and a few steps of training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])


class Net(nn.Module):
    """conv1-bn1-relu1; left and bn2(right) read that, their sum goes through relu2 to fc, tanh and fc2."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (1, 3, 8, 8)
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.relu1 = nn.ReLU(inplace=True)
        self.left = nn.Conv2d(6, 4, 1)
        self.right = nn.Conv2d(6, 4, 3, padding=1, groups=2)
        self.bn1, self.bn2 = nn.BatchNorm2d(6), nn.BatchNorm2d(4)
        self.relu2 = nn.ReLU()
        self.fc = nn.Linear(4, 7)
        self.fc2 = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.left(x) + self.bn2(self.right(x)))
        x = F.avg_pool2d(x, 8).flatten(1)
        return self.fc2(torch.tanh(self.fc(x)))


def net() -> Net:
    torch.manual_seed(5)
    model = Net()
    for norm in (model.bn1, model.bn2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.3, 0.3)
    return model


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[float]:
    """A few steps on one batch; returns the losses."""
    model.train()
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(IMAGES), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def outputs(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    """In evaluation mode."""
    model.eval()
    with torch.no_grad():
        return model(images)


def equal_states(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)
