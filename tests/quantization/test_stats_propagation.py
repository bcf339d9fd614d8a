"""Statistics carried over folded batch norms and narrowed to what is read."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distiller.graph import SummaryGraph
from distiller.quantization.stats_propagation import Reader, fold_stats, propagate_stats, sole_readers


def entry(lo: float, hi: float) -> dict[str, float]:
    return {"min": lo, "max": hi, "avg_min": lo / 2, "avg_max": hi / 2, "mean": 0.5, "std": 1.0, "b": 0.7}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.shared = nn.Conv2d(4, 4, 1), nn.ReLU()
        self.conv3, self.conv4, self.conv5 = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.twice = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.shared(self.conv2(x))
        x = F.relu(self.conv3(x))
        y = self.conv4(x)
        x = self.shared(y) + y
        x = torch.relu(self.twice(self.twice(x)))
        return self.conv5(x)


@pytest.fixture
def readers() -> dict[str, Reader]:
    adjacency = SummaryGraph(Net(), torch.randn(1, 3, 4, 4)).adjacency_map()
    return sole_readers(adjacency, {"conv1": ["bn1"]})


def test_reader_behind_a_folded_batch_norm(readers) -> None:
    assert readers["conv1"] == Reader("Relu", "relu1", is_dedicated=True)
    assert "bn1" not in readers


def test_shared_and_functional_readers_are_not_dedicated(readers) -> None:
    assert readers["conv2"] == Reader("Relu", "shared", is_dedicated=False)
    assert readers["conv3"] == Reader("Relu", None, is_dedicated=False)


def test_layers_that_are_read_twice_called_twice_or_returned_have_no_sole_reader(readers) -> None:
    assert not {"conv4", "twice", "conv5"} & set(readers)


def test_folding_takes_the_output_of_the_last_module() -> None:
    stats = {
        "conv1": {"inputs": {0: entry(-1, 1)}, "output": entry(-9, 9)},
        "bn1": {"inputs": {0: entry(-9, 9)}, "output": entry(-2, 3)},
    }
    given = copy.deepcopy(stats)
    folded = fold_stats(stats, {"conv1": ["bn1"]})
    assert folded == {"conv1": {"inputs": {0: entry(-1, 1)}, "output": entry(-2, 3)}}
    assert stats == given


def test_statistics_of_a_model_folded_before_stay() -> None:
    stats = {"conv1": {"inputs": {}, "output": entry(-2, 3)}}
    assert fold_stats(stats, {"conv1": ["bn1"]}) == stats


@pytest.mark.parametrize(
    ("module", "kind", "before", "after"),
    [
        (nn.ReLU(), "Relu", (-6, 8), {"min": 0, "max": 8, "avg_min": 0, "avg_max": 4}),
        (nn.ReLU(), "Relu", (-6, -2), {"min": 0, "max": 0, "avg_min": 0, "avg_max": 0}),
        (nn.ReLU6(), "Clip", (-6, 14), {"min": 0, "max": 6, "avg_min": 0, "avg_max": 6}),
        (nn.ReLU6(), "Clip", (-6, 5), {"min": 0, "max": 5, "avg_min": 0, "avg_max": 2.5}),
        (nn.Tanh(), "Tanh", (-6, 20), {"min": -4, "max": 4, "avg_min": -3, "avg_max": 4}),
        (nn.Sigmoid(), "Sigmoid", (-20, 4), {"min": -6, "max": 4, "avg_min": -6, "avg_max": 2}),
    ],
)
def test_ranges_are_narrowed_to_what_the_reader_tells_apart(module, kind, before, after) -> None:
    stats = {
        "conv": {"inputs": {0: entry(-1, 1)}, "output": entry(*before)},
        "act": {"inputs": {0: entry(*before)}, "output": entry(0, 1)},
    }
    result = propagate_stats(stats, {"conv": Reader(kind, "act", True)}, {"act": module})
    assert result["conv"]["output"] == {**entry(*before), **after}
    assert result["act"]["inputs"][0] == result["conv"]["output"]
    assert result["act"]["output"] == entry(0, 1)


def test_input_statistics_of_a_shared_activation_stay() -> None:
    stats = {
        "conv": {"inputs": {}, "output": entry(-6, 8)},
        "act": {"inputs": {0: entry(-7, 9)}, "output": entry(0, 9)},
    }
    result = propagate_stats(stats, {"conv": Reader("Relu", "act", False)}, {"act": nn.ReLU()})
    assert result["conv"]["output"]["min"] == 0
    assert result["act"] == stats["act"]


def test_other_readers_change_nothing() -> None:
    stats = {"conv": {"inputs": {}, "output": entry(-6, 8)}}
    assert propagate_stats(stats, {"conv": Reader("Clip", None, False)}, {}) == stats
    assert propagate_stats(stats, {"conv": Reader("Add", None, False)}, {}) == stats
