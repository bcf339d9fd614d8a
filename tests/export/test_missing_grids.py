"""Where tensors of trained models have no grid, read off small networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distiller.export.integer_view import integer_view
from distiller.export.missing_grids import MissingGrid, missing_grids
from distiller.quantization.training import (
    BinaryQuantizer,
    DorefaQuantizer,
    LSQQuantizer,
    PACTQuantizer,
    QuantAwareTrainRangeLinearQuantizer,
    WRPNQuantizer,
)
from tests.export.trained_nets import Residual, images, trained

BITS = {"bits_activations": 4, "bits_weights": 4}
SUMMED = ["first.conv2", "second.conv2", "second.side"]


def missing(model: nn.Module) -> list[MissingGrid]:
    x = images(model, 1)
    return missing_grids(integer_view(model, x), x)


def names(model: nn.Module) -> list[str]:
    return [place.module + ("" if place.is_output else ".input") for place in missing(model)]


def test_learned_steps_of_layers_leave_shortcuts_and_sums():
    """What only layers read that round it themselves needs none; what a sum reads too, does."""
    found = missing(trained(Residual(), LSQQuantizer, **BITS))
    assert found == [
        MissingGrid("relu", True, ("first.conv1",)),
        MissingGrid("first.conv2", True, ()),
        MissingGrid("second.conv2", True, ()),
        MissingGrid("second.side", True, ()),
        MissingGrid("second.relu2", True, ()),
    ]


@pytest.mark.parametrize("kind", [PACTQuantizer, DorefaQuantizer, WRPNQuantizer])
def test_quantized_relus_leave_the_input_sums_and_the_average(kind):
    assert names(trained(Residual(), kind, **BITS)) == ["conv.input", *SUMMED, "average"]


def test_a_model_that_rounds_its_input_needs_no_grid_there():
    model = trained(Residual(), QuantAwareTrainRangeLinearQuantizer, **BITS)
    assert names(model) == [*SUMMED, "average"]


def test_a_layer_in_floating_point_gets_none_but_what_it_hands_on_does():
    overrides = {"conv": {"bits_weights": None, "bits_activations": None}}
    model = trained(Residual(), LSQQuantizer, overrides=overrides, **BITS)
    assert names(model) == ["relu", *SUMMED, "second.relu2"]


def test_weights_alone_need_grids_everywhere_but_at_the_end():
    model = trained(Residual(), BinaryQuantizer)
    made = [
        "relu",
        "first.relu1",
        "first.conv2",
        "first.relu2",
        "second.relu1",
        "second.conv2",
        "second.side",
    ]
    assert sorted(names(model)) == sorted(["conv.input", *made, "second.relu2", "average"])


class Ends(nn.Sequential):
    """Its sums are of what layers in floating point make, and go to such."""

    input_shape = (1, 3, 4, 4)

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))

    def forward(self, x):
        return self[1](self[0](x) + x).softmax(1)


def test_what_is_between_layers_in_floating_point_stays_there():
    overrides = {"0": {"bits_weights": None, "bits_activations": None}}
    assert missing(trained(Ends(), LSQQuantizer, overrides=overrides, **BITS)) == []


class Flat(nn.Sequential):
    input_shape = (1, 2, 2, 3)


@pytest.mark.parametrize("kind,expected", [(PACTQuantizer, ["1.input"]), (LSQQuantizer, [])])
def test_an_input_that_is_only_moved_is_the_input(kind, expected):
    model = trained(Flat(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2)), kind, **BITS)
    assert names(model) == expected


class Shared(Residual):
    """One ReLU for all places."""

    def __init__(self) -> None:
        super().__init__()
        for block in (self.first, self.second):
            block.relu1 = block.relu2 = self.relu


def test_a_relu_in_several_places_has_its_grid_before_it():
    """Behind it the grid would round in all of them."""
    found = missing(trained(Shared(), LSQQuantizer, **BITS))
    assert [place.module for place in found if place.is_output] == [
        *["conv", "first.conv2", "second.conv2", "second.side", "second.add"]
    ]


def test_the_view_stays_as_it_is():
    model = trained(Residual(), LSQQuantizer, **BITS)
    view = integer_view(model, images(model, 1))
    before = repr(view.model)
    with torch.no_grad():
        expected = view.model(images(model))
        missing_grids(view, images(model, 1))
        assert torch.equal(view.model(images(model)), expected)
    assert repr(view.model) == before
