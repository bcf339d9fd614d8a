"""A small network that can tell digits, and what the searches are given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from distiller.data_loggers.quant_stats import collect_quant_stats
from distiller.quantization.post_train import PostTrainLinearQuantizer


class Digits(nn.Module):
    """conv1-bn1-relu1, conv2-relu2, pool, fc; for 1x8x8 images of 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (1, 1, 8, 8)
        self.conv1 = nn.Conv2d(1, 6, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.relu2 = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        return self.fc(self.pool(self.relu2(self.conv2(x))).flatten(1))


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """256 images, (256, 1, 8, 8), and their labels."""
    data: Any = load_digits()
    images = torch.tensor(data.images[:256], dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.tensor(data.target[:256])


@pytest.fixture(scope="session")
def trained(digits) -> nn.Module:
    """In evaluation mode, nearly all of `digits` right."""
    torch.manual_seed(0)
    images, labels = digits
    model = Digits()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def network(trained) -> nn.Module:
    return copy.deepcopy(trained)


class CountedLoss:
    """Cross entropy on fixed data: `calls` of it, `models` that it was given, and a kill after some calls."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.calls = 0
        self.models: list[nn.Module] = []
        self.killed_at: int | None = None

    def __call__(self, model: nn.Module) -> float:
        if self.calls == self.killed_at:
            raise KeyboardInterrupt
        self.calls += 1
        if not any(model is other for other in self.models):
            self.models.append(model)
        return nn.functional.cross_entropy(model(self.images), self.labels).item()


@pytest.fixture
def make_loss(digits) -> Callable[[], CountedLoss]:
    return lambda: CountedLoss(*digits)


@pytest.fixture
def loss(make_loss) -> CountedLoss:
    return make_loss()


@pytest.fixture(scope="session")
def stats(trained, digits) -> dict[str, Any]:
    with torch.no_grad():
        return collect_quant_stats(copy.deepcopy(trained), lambda model: model(digits[0]))


@pytest.fixture
def dummy(digits) -> Tensor:
    return digits[0][:1]


@pytest.fixture
def make_quantizer(trained, stats) -> Callable[..., PostTrainLinearQuantizer]:
    """A quantizer of a copy of the trained network, with its statistics unless others are given."""

    def make(**settings: Any) -> PostTrainLinearQuantizer:
        given = {"model_activation_stats": stats, **settings}
        return PostTrainLinearQuantizer(copy.deepcopy(trained), **given)

    return make


@pytest.fixture
def quantized_loss(make_quantizer, dummy, digits) -> Callable[..., float]:
    """The loss of the trained network prepared with some settings, without any search."""

    def measure(**settings: Any) -> float:
        quantizer = make_quantizer(**settings)
        quantizer.prepare_model(dummy)
        with torch.no_grad():
            return nn.functional.cross_entropy(quantizer.model(digits[0]), digits[1]).item()

    return measure


@pytest.fixture(scope="session")
def _prepared_once(trained, stats, digits) -> PostTrainLinearQuantizer:
    quantizer = PostTrainLinearQuantizer(
        copy.deepcopy(trained), 4, 4, model_activation_stats=stats, save_fp_weights=True
    )
    quantizer.prepare_model(digits[0][:1])
    return quantizer


@pytest.fixture
def prepared(_prepared_once) -> PostTrainLinearQuantizer:
    """W4A4, symmetric, with its full-precision weights."""
    return copy.deepcopy(_prepared_once)
