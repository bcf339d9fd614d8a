"""Modules exchanged and biases added."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distiller.errors import UnknownNameError
from distiller.quantization.refinement.structure import add_biases, replace_relu6s


def test_a_relu6_becomes_a_relu_at_all_its_names() -> None:
    model = nn.Module()
    model.act = nn.ReLU6(inplace=True)
    model.block = nn.Sequential(nn.Linear(2, 2), model.act, nn.ReLU6())
    model.eval()
    replace_relu6s(model, ["act"])
    assert type(model.act) is nn.ReLU
    assert model.block[1] is model.act
    assert model.act.inplace
    assert not model.act.training
    assert type(model.block[2]) is nn.ReLU6


def test_biases_of_zeros_change_nothing() -> None:
    model: Any = nn.Sequential(
        nn.Conv2d(2, 4, 1, bias=False), nn.ConvTranspose2d(4, 6, 1, groups=2, bias=False), nn.Conv2d(6, 3, 1)
    )
    x = torch.randn(2, 2, 3, 3)
    before, kept = model(x), model[2].bias
    add_biases(model, ["0", "1", "2"])
    assert torch.equal(model(x), before)
    assert [len(layer.bias) for layer in model] == [4, 6, 3]
    assert model[2].bias is kept


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="no module 'fc' in the model"):
        add_biases(nn.Sequential(nn.Linear(2, 2)), ["fc"])
