from __future__ import annotations

import pytest
import torch
from torch import nn

from distiller.errors import DistillerError
from distiller.quantization.training.example_input import example_input
from tests.quantization.training.qat_networks import net


def test_it_has_the_models_shape_and_type_and_draws_no_random_number():
    model = net().double()
    before = torch.get_rng_state()
    made = example_input(nn.DataParallel(model), "a test")
    assert made.shape == model.input_shape
    assert made.dtype is torch.float64
    assert not made.any()
    assert torch.equal(torch.get_rng_state(), before)


def test_shapes_may_be_nested():
    model = nn.Linear(2, 2)
    model.input_shape = ((1, 2), (1, 3))
    assert [tensor.shape for tensor in example_input(model, "a test")] == [(1, 2), (1, 3)]


def test_a_model_without_a_shape_is_told_what_for():
    with pytest.raises(DistillerError) as error:
        example_input(nn.Linear(2, 2), "a test")
    assert (
        str(error.value)
        == "'a test' needs the shape of the model's input: set model.input_shape, as (1, 3, 32, 32)"
    )
