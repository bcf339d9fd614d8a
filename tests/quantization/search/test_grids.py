from __future__ import annotations

import pytest
import torch
from torch import nn

from distiller.errors import QuantizationError
from distiller.quantization.search.grids import grids_of, own_quantizers, put_grids, quantized_layers


class Backwards(nn.Module):
    """Calls its layers in the other order than it has them."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first, self.unused = nn.Linear(4, 2), nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x):
        return self.last(self.first(x))


def test_layers_are_in_the_order_of_their_first_calls():
    from distiller.quantization.post_train import PostTrainLinearQuantizer

    quantizer = PostTrainLinearQuantizer(
        Backwards(), None, 4, overrides={"unused": {"bits_weights": None, "bits_activations": None}}
    )
    quantizer.prepare_model(torch.zeros(1, 3))
    assert list(quantized_layers(quantizer.model, torch.zeros(1, 3))) == ["first", "last"]


def test_a_model_without_quantized_layers_is_refused(network, dummy):
    with pytest.raises(
        QuantizationError, match=r"^nothing of the model is quantized; there is nothing to search$"
    ):
        quantized_layers(network, dummy)


def test_a_layers_own_quantizers_are_its_output_and_what_nobody_quantized_before(prepared, dummy):
    layers = quantized_layers(prepared.model, dummy)
    assert {name: list(own_quantizers(layer)) for name, layer in layers.items()} == {
        "conv1": ["0", "output"],
        "conv2": ["output"],
        "pool": [],  # stays on the grid of conv2
        "fc": ["output"],
    }


def test_a_model_with_the_grids_of_another_computes_what_that_one_does(
    prepared, make_quantizer, digits, dummy
):
    other = make_quantizer(
        bits_activations=5,
        bits_parameters=3,
        clip_acts="AVG",
        mode={"activations": "ASYMMETRIC_UNSIGNED", "weights": "SYMMETRIC"},
        also_clip_weights=True,
    )
    other.prepare_model(dummy)
    layers, others = quantized_layers(prepared.model, dummy), quantized_layers(other.model, dummy)
    for name, layer in others.items():
        put_grids(layers, name, grids_of(layer))
    with torch.no_grad():
        assert torch.equal(prepared.model(digits[0]), other.model(digits[0]))


def test_grids_put_back_give_the_model_back(prepared, digits, dummy):
    layers = quantized_layers(prepared.model, dummy)
    before = grids_of(layers["conv1"])
    wider = grids_of(layers["conv1"])
    for grid in wider.activations.values():
        grid.scale.mul_(2)
    assert not wider.is_like(before)
    with torch.no_grad():
        clean = prepared.model(digits[0])
        put_grids(layers, "conv1", wider)
        assert not torch.equal(prepared.model(digits[0]), clean)
        put_grids(layers, "conv1", before)
        assert grids_of(layers["conv1"]).is_like(before)
        assert torch.equal(prepared.model(digits[0]), clean)


def test_another_weight_grid_needs_the_full_precision_weight(make_quantizer, prepared, dummy):
    others = quantized_layers(prepared.model, dummy)
    quantizer = make_quantizer(bits_activations=4, bits_parameters=8)
    quantizer.prepare_model(dummy)
    with pytest.raises(QuantizationError, match="^conv2: its weight cannot be rounded to another grid"):
        put_grids(quantized_layers(quantizer.model, dummy), "conv2", grids_of(others["conv2"]))
