"""Small models and data that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pytest
import torch
from torch import nn

torch.set_num_threads(1)
hypothesis.settings.register_profile("ci", derandomize=True, print_blob=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

COMPAT = Path(__file__).resolve().parents[2] / "shared" / "compat"


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def compat() -> Path:
    """Real files of other projects; skips the test where they are not at hand."""
    if not COMPAT.is_dir():
        pytest.skip("the folder shared/compat with other projects' files is not beside the project")
    return COMPAT


class TinyCnn(nn.Module):
    """conv1 - bn1 - relu1 - conv2 - relu2 - pool - fc, for 1x8x8 images and 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (1, 1, 8, 8)
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.relu2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.conv2(x))
        return self.fc(self.pool(x).flatten(1))


@pytest.fixture
def tiny_cnn() -> nn.Module:
    return TinyCnn()


class TinyLoader:
    """Fixed random batches in the order of the epoch."""

    def __init__(self, batches: int = 3, batch_size: int = 8) -> None:
        generator = torch.Generator().manual_seed(5)
        self.batches = [
            (
                torch.randn(batch_size, 1, 8, 8, generator=generator),
                torch.randint(4, (batch_size,), generator=generator),
            )
            for _ in range(batches)
        ]

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


@pytest.fixture
def tiny_loader() -> TinyLoader:
    return TinyLoader()
