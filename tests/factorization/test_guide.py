"""The schedules in docs/factorization.md are ones that a network takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from distiller.config import dict_config
from distiller.models import create_model

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "factorization.md"
BLOCKS = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_a_schedule_of_the_guide_loads(index):
    model = create_model(False, None, "lenet5")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = dict_config(model, optimizer, yaml.safe_load(BLOCKS[index]))
    assert any("LowRankFactorization" in line for line in scheduler.describe(0))


def test_there_are_two():
    assert len(BLOCKS) == 2
