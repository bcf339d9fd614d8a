"""Statistics by layer, and which ReLUs disappear. (Connecting inputs: test_post_train.)"""

from __future__ import annotations

import pytest
from torch import nn

from distiller.errors import StatsError
from distiller.quantization.ptq_prepare import LayerStats, relu_fusions
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
