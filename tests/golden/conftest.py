"""What the code writes today against files of what it wrote when they were looked at last.

`pytest tests/golden --update-golden` writes the files anew: look at the difference before it is committed.
Text is compared byte for byte, numbers with a point to the last digit that the file shows (five of them).
Network and images are formulas, not random numbers, which another version of PyTorch would draw otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.apputils.conftest import global_settings_restored  # noqa: F401 - a fixture
from tests.golden.comparison import differences, five_digits

FOLDER = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the files of tests/golden anew")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)`: the text must be that of the file. Numbers of data files have five digits there."""

    def check(name: str, text: str) -> None:
        path = FOLDER / name
        is_table = path.suffix == ".txt"  # whose columns are as wide as their numbers
        text = text if is_table else five_digits(text)
        if request.config.getoption("--update-golden", default=False):
            path.write_text(text, encoding="utf-8")
        found = differences(text, path.read_text(encoding="utf-8"), is_table)
        assert not found, f"{name} is not what is written today; see tests/golden/conftest.py\n" + "\n".join(
            found
        )

    return check


def waves(*shape: int, frequency: float, phase: float = 0.0) -> Tensor:
    """Numbers between -1 and 1 in no visible order: sin(phase + frequency n^1.5)."""
    count = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(phase + frequency * count**1.5).float().view(shape)


@pytest.fixture
def fixed_net(tiny_cnn: nn.Module) -> nn.Module:
    """`TinyCnn` with fixed weights and batch-norm statistics, in evaluation mode; a filter of conv2 is zero."""
    with torch.no_grad():
        for index, parameter in enumerate(tiny_cnn.parameters()):
            scale = 2.5 / math.sqrt(parameter[0].numel()) if parameter.dim() > 1 else 0.3
            parameter.copy_(scale * waves(*parameter.shape, frequency=0.7 + 0.1 * index, phase=1 + index))
        bn1: Any = tiny_cnn.bn1
        conv2: Any = tiny_cnn.conv2
        bn1.weight += 1
        bn1.running_mean.copy_(0.2 * waves(4, frequency=1.3))
        bn1.running_var.copy_(1 + 0.5 * waves(4, frequency=2.1))
        conv2.weight[1] = 0
        conv2.weight[2, 3] = 0
    return tiny_cnn.eval()


@pytest.fixture
def fixed_images() -> Tensor:
    return 1.5 * waves(24, 1, 8, 8, frequency=0.31)
