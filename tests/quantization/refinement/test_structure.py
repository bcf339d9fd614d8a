"""Modules exchanged and biases added."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from distiller.errors import QuantizationError, UnknownNameError
from distiller.quantization.refinement.structure import (
    add_biases,
    note_changes,
    repeat_changes,
    replace_relu6s,
)


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


class Noted(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2)
        self.relu, self.last = nn.ReLU6(), nn.Conv2d(2, 2, 1, bias=False)

    def forward(self, x):
        return self.last(self.relu(self.norm(self.conv(x))))


def test_what_was_noted_of_one_copy_is_done_to_another():
    first, second = Noted().eval(), Noted().eval()
    first.quantizer_metadata = {"class": "Any"}
    changes = {"replaced_relu6s": ("relu",), "new_biases": ("last", "last")}
    note_changes(first, has_folded_norms=True, **changes)
    assert first.quantizer_metadata == {
        "class": "Any",
        "replaced_relu6s": ["relu"],
        "new_biases": ["last"],
        "has_folded_norms": True,
    }
    repeat_changes(second, first.quantizer_metadata, torch.zeros(1, 1, 3, 3))
    assert type(second.relu) is nn.ReLU
    assert isinstance(second.norm, nn.Identity)
    assert second.conv.bias is not None
    assert torch.equal(second.last.bias, torch.zeros(2))


def test_nothing_is_noted_where_nothing_changed():
    model = Noted()
    model.quantizer_metadata = {}
    note_changes(model, has_folded_norms=False, replaced_relu6s=(), new_biases=())
    assert model.quantizer_metadata == {}
    repeat_changes(model, {}, None)
    assert type(model.relu) is nn.ReLU6


@pytest.mark.parametrize(
    "metadata, told",
    [
        ({"new_biases": "last"}, "quantizer_metadata.new_biases: must be a list of names, got 'last'"),
        ({"replaced_relu6s": [1]}, "quantizer_metadata.replaced_relu6s: must be a list of names, got [1]"),
        ({"new_biases": ["relu"]}, "quantizer_metadata.new_biases: 'relu' is no layer with a bias"),
    ],
)
def test_damaged_notes_are_refused(metadata, told):
    with pytest.raises(QuantizationError) as error:
        repeat_changes(Noted(), metadata, torch.zeros(1, 1, 3, 3))
    assert str(error.value) == told
