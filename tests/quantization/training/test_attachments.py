from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distiller.errors import QuantizationError
from distiller.quantization.training.attachments import (
    attach_input_quantizer,
    attach_output_quantizer,
    detach_input_quantizers,
)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return x * self.factor


def test_inputs_and_outputs_go_through_their_quantizers():
    layer = nn.Linear(2, 2, bias=False)
    nn.init.eye_(layer.weight)
    attach_input_quantizer(layer, Twice())
    assert torch.equal(layer(torch.ones(1, 2)), torch.full((1, 2), 2.0))
    attach_output_quantizer(layer, Twice())
    assert torch.equal(layer(torch.ones(1, 2)), torch.full((1, 2), 4.0))
    assert sorted(layer.state_dict()) == ["input_quantizer.factor", "output_quantizer.factor", "weight"]


def test_a_copy_uses_its_own_quantizer():
    layer = nn.Linear(1, 1)
    attach_input_quantizer(layer, Twice())
    copied = copy.deepcopy(layer)
    before = layer(torch.ones(1, 1))
    with torch.no_grad():
        copied.input_quantizer.factor.fill_(100)
    assert torch.equal(layer(torch.ones(1, 1)), before)
    assert not torch.equal(copied(torch.ones(1, 1)), before)


def test_a_replica_uses_its_own_quantizer():
    layer = nn.Linear(1, 1)
    attach_input_quantizer(layer, Twice())
    replica = layer._replicate_for_data_parallel()  # what nn.DataParallel makes of each module
    replica.weight, replica.bias = layer.weight.detach(), layer.bias.detach()
    replica.input_quantizer = nn.Identity()
    assert not torch.equal(replica(torch.ones(1, 1)), layer(torch.ones(1, 1)))


def test_integers_are_left_alone():
    layer = nn.Embedding(3, 2)
    attach_input_quantizer(layer, Twice())
    tokens = torch.tensor([1, 2])
    assert torch.equal(layer(tokens), layer.weight[tokens])


def test_detached_inputs_are_as_before():
    layer = nn.Linear(2, 2)
    expected = layer(torch.ones(1, 2))
    attach_input_quantizer(layer, Twice())
    detach_input_quantizers(layer)
    assert torch.equal(layer(torch.ones(1, 2)), expected)
    assert list(layer.children()) == []


def test_names_that_are_taken_and_calls_without_a_tensor_are_refused():
    layer = nn.Linear(1, 1)
    attach_input_quantizer(layer, Twice())
    with pytest.raises(QuantizationError) as error:
        attach_input_quantizer(layer, Twice())
    assert str(error.value) == (
        "Linear: has an attribute 'input_quantizer' of its own, where its quantizer would be; rename it"
    )
    with pytest.raises(QuantizationError) as error:
        layer(input=torch.ones(1, 1))
    assert (
        str(error.value)
        == "Linear: its input is quantized, and must be a tensor, its first positional argument"
    )
    recurrent = nn.LSTM(1, 1)
    attach_output_quantizer(recurrent, Twice())
    with pytest.raises(QuantizationError) as error:
        recurrent(torch.ones(1, 1))
    assert str(error.value) == "LSTM: its output is quantized, and must be a tensor, got tuple"
