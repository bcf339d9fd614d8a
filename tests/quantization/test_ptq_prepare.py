"""Statistics by layer, and which ReLUs disappear. (Connecting inputs: test_post_train.)"""

from __future__ import annotations

import pytest
from torch import nn

from distiller.errors import StatsError
from distiller.quantization.dataflow import LayerUse
from distiller.quantization.ptq_prepare import LayerStats, kept_grids, relu_fusions
from distiller.quantization.stats_propagation import Reader

ENTRY = {"min": 0.0, "max": 1.0}
STATS = LayerStats({"conv1": {"inputs": {0: ENTRY}, "output": ENTRY}}, "stats.yaml")


def test_statistics_are_found_by_layer_and_input() -> None:
    assert STATS.output("conv1") == STATS.input("conv1", 0) == ENTRY
    assert not STATS.is_dynamic
    STATS.check(["conv1"])


def test_without_statistics_ranges_are_dynamic() -> None:
    none = LayerStats(None, "stats.yaml")
    assert none.is_dynamic
    assert none.output("conv1") is None
    assert none.input("conv1", 0) is None
    none.check(["conv1"])


def test_many_missing_layers_are_named_in_part() -> None:
    with pytest.raises(StatsError) as error:
        STATS.check(["conv1", "a", "b", "c", "d"])
    assert str(error.value) == (
        "stats.yaml: has no statistics of 4 of the layers to be quantized ('a', 'b', 'c', ...); "
        "collect them from this model"
    )


def test_missing_layer_or_input_is_named() -> None:
    with pytest.raises(StatsError, match=r"^stats\.yaml: has no statistics of 1 of the layers .* \('fc'\)"):
        STATS.output("fc")
    with pytest.raises(StatsError, match=r"^stats\.yaml: conv1: has no statistics of input 1"):
        STATS.input("conv1", 1)


def test_only_relu_modules_that_read_one_layer_alone_are_fused() -> None:
    layers = {"relu": nn.ReLU(), "relu6": nn.ReLU6()}
    readers = {
        "a": Reader("Relu", "relu", is_dedicated=True),
        "shared": Reader("Relu", "relu", is_dedicated=False),
        "functional": Reader("Relu", None, is_dedicated=False),
        "clipped": Reader("Clip", "relu6", is_dedicated=True),
    }
    assert relu_fusions(readers, layers, lambda layer, relu: True) == {"a": "relu"}
    assert relu_fusions(readers, layers, lambda layer, relu: layer != "a") == {}


def test_a_relu_behind_modules_that_select_values_is_fused_before_them() -> None:
    layers = {"pool": nn.MaxPool2d(2), "flatten": nn.Flatten(), "relu": nn.ReLU(), "average": nn.AvgPool2d(2)}
    readers = {
        "conv": Reader("MaxPool", "pool", is_dedicated=True),
        "pool": Reader("Flatten", "flatten", is_dedicated=True),
        "flatten": Reader("Relu", "relu", is_dedicated=True),
    }
    assert relu_fusions(readers, layers, lambda layer, relu: True) == {"conv": "relu"}
    assert relu_fusions(readers, layers, lambda layer, relu: layer != "conv") == {"pool": "relu"}
    readers["pool"] = Reader("Flatten", "flatten", is_dedicated=False)
    assert relu_fusions(readers, layers, lambda layer, relu: True) == {"flatten": "relu"}
    readers["conv"] = Reader("AveragePool", "average", is_dedicated=True)
    readers["average"] = Reader("Relu", "relu", is_dedicated=True)
    assert relu_fusions(readers, layers, lambda layer, relu: layer == "conv") == {}


def test_modules_that_select_values_of_a_quantized_layer_keep_its_grid() -> None:
    layers = {"conv": nn.Conv2d(1, 1, 1), "pool": nn.MaxPool2d(2), "flatten": nn.Flatten(), "relu": nn.ReLU()}
    uses = {
        "conv": LayerUse({0: {None: None}}),
        "pool": LayerUse({0: {"conv": None}}),
        "flatten": LayerUse({0: {"pool": None}}),
        "relu": LayerUse({0: {"flatten": None}}),
    }

    def kept(left_out: str = "", own: str = "") -> dict[str, str]:
        return kept_grids(layers, uses, lambda name: name != left_out, lambda name, source: name != own)

    assert kept() == {"pool": "conv", "flatten": "pool"}
    assert kept(left_out="conv") == {"flatten": "pool"}
    assert kept(left_out="pool") == {}
    assert kept(own="pool") == {"flatten": "pool"}
    uses["pool"].origins[0][None] = None  # in some calls from elsewhere
    assert kept() == {"flatten": "pool"}
