import multiprocessing

import pytest
import torch
from torch import nn


class TinyCnn(nn.Module):
    """Convolutions of 2-D and 1-D kernels, batch norm, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, bias=False)
        self.conv3 = nn.Conv1d(6, 5, 2)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, 1, 8, 8)
        x = self.conv2(self.bn(self.conv1(x)).relu()).relu()
        x = self.conv3(x.mean(3)).relu()
        return self.fc(x.mean(2))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(7)
    return TinyCnn()


@pytest.fixture
def quick_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of a sweep are forks of one that has imported all they need, which each would take seconds for."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distiller.sensitivity.block_pool", "tests.sensitivity.conftest"])
    monkeypatch.setattr("distiller.sensitivity.block_pool._CONTEXT", context)
