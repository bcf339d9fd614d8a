"""Statistics carried over folded batch norms and narrowed to what is read."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distiller.graph import AdjacencyMap, SummaryGraph, leaf_modules
from distiller.modules import Chunk
from distiller.quantization.stats_propagation import (
    Reader,
    ReadRange,
    fold_stats,
    propagate_stats,
    read_ranges,
    sole_readers,
)


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


def mapped(model: nn.Module, x: torch.Tensor | None = None) -> AdjacencyMap:
    return SummaryGraph(model, torch.randn(1, 3, 4, 4) if x is None else x).adjacency_map()


@pytest.fixture
def readers() -> dict[str, Reader]:
    return sole_readers(mapped(Net()), {"conv1": ["bn1"]})


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


class Through(nn.Module):
    """fc, or fc then `between`, is what `ends` read."""

    def __init__(self, forward, **modules: nn.Module) -> None:
        super().__init__()
        self.fc, self.run = nn.Linear(8, 8), forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.run(self, self.fc(x))


X = torch.randn(2, 4, 8)


def ranges_of(forward, **modules: nn.Module) -> dict[str, ReadRange]:
    model = Through(forward, **modules)
    return read_ranges(mapped(model, X), {}, leaf_modules(model))


INFINITY = math.inf


@pytest.mark.parametrize(
    ("forward", "limits"),
    [
        (lambda m, x: F.relu(x), (0, INFINITY)),
        (lambda m, x: m.act(x), (0, 6)),
        (lambda m, x: torch.tanh(x), (-4, 4)),
        (lambda m, x: torch.sigmoid(x), (-6, 6)),
        (lambda m, x: sum(map(F.relu, x.chunk(2, 2))), (0, INFINITY)),
        (lambda m, x: sum(map(torch.tanh, x.split([3, 5], 2)[:1])), (-4, 4)),
        (lambda m, x: torch.tanh(x[..., :4]) * torch.sigmoid(x[..., 4:]), (-6, 6)),
        (lambda m, x: sum(map(torch.sigmoid, Chunk(2, dim=2)(x))), (-6, 6)),
        (lambda m, x: torch.tanh(x) * torch.sigmoid(x), (-6, 6)),
        (lambda m, x: torch.tanh(x) + F.relu(x), (-4, INFINITY)),
        (lambda m, x: F.relu(F.max_pool1d(x, 2)), (0, INFINITY)),
        (lambda m, x: torch.tanh(F.max_pool1d(x.transpose(1, 2), 2).flatten(1)), (-4, 4)),
    ],
)
def test_what_all_readers_can_tell_apart_whatever_selects_values_before_them(forward, limits) -> None:
    found = ranges_of(forward, act=nn.ReLU6())["fc"]
    assert (found.lo, found.hi) == limits


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x,
        lambda m, x: x + 1,
        lambda m, x: F.relu(x) + x,
        lambda m, x: torch.tanh(x[..., :4]) + x[..., 4:],
        lambda m, x: F.relu(F.avg_pool1d(x, 2)),  # relu(mean) is not mean(relu)
        lambda m, x: (x, torch.tanh(x)),
        lambda m, x: (x[..., :4], torch.tanh(x)),
        lambda m, x: F.gelu(x),
    ],
)
def test_a_reader_that_needs_everything_leaves_the_range(forward) -> None:
    assert "fc" not in ranges_of(forward)


def test_modules_that_read_the_output_itself_and_parts_of_it() -> None:
    found = ranges_of(
        lambda m, x: m.a(m.pool(x)) + m.b(x[..., 2:]) * m.c(x)[..., 2:],
        pool=nn.AdaptiveMaxPool1d(6), a=nn.Tanh(), b=nn.Sigmoid(), c=nn.Tanh(),
    )  # fmt: skip
    assert found["fc"] == ReadRange(-6.0, 6.0, ("pool", "c"), ("a", "b"))
    assert found["pool"] == ReadRange(-4.0, 4.0, ("a",), ())


def test_calls_in_a_loop_are_read_together() -> None:
    def loop(m, x):
        for _ in range(3):
            x = m.fc(m.act(x))
        return torch.tanh(x)

    assert ranges_of(loop, act=nn.Sigmoid())["fc"][:2] == (-6.0, 6.0)
    readers = sole_readers(mapped(Through(loop, act=nn.Sigmoid()), X), {})
    assert readers == {"act": Reader("Gemm", "fc", is_dedicated=False)}


def test_a_reader_that_is_called_as_often_is_dedicated() -> None:
    def loop(m, x):
        for _ in range(2):
            x = m.act(m.fc(x))
        return x

    model = Through(lambda m, x: loop(m, m.act(x)), act=nn.ReLU())
    readers = sole_readers(mapped(model, X), {})
    assert readers["fc"] == Reader("Relu", "act", is_dedicated=True)


@pytest.mark.parametrize(
    ("limits", "before", "after"),
    [
        ((0, INFINITY), (-6, 8), {"min": 0, "max": 8, "avg_min": 0, "avg_max": 4}),
        ((0, INFINITY), (-6, -2), {"min": 0, "max": 0, "avg_min": 0, "avg_max": 0}),
        ((0, 6), (-6, 14), {"min": 0, "max": 6, "avg_min": 0, "avg_max": 6}),
        ((0, 6), (-6, 5), {"min": 0, "max": 5, "avg_min": 0, "avg_max": 2.5}),
        ((-4, 4), (-6, 20), {"min": -4, "max": 4, "avg_min": -3, "avg_max": 4}),
        ((-6, 6), (-20, 4), {"min": -6, "max": 4, "avg_min": -6, "avg_max": 2}),
    ],
)
def test_ranges_are_narrowed_to_what_the_readers_tell_apart(limits, before, after) -> None:
    stats = {
        "conv": {"inputs": {0: entry(-1, 1)}, "output": entry(*before)},
        "act": {"inputs": {0: entry(*before)}, "output": entry(0, 1)},
    }
    given = copy.deepcopy(stats)
    result = propagate_stats(stats, {"conv": ReadRange(*limits, ("act",), ())})
    assert result["conv"]["output"] == {**entry(*before), **after}
    assert result["act"]["inputs"][0] == result["conv"]["output"]
    assert result["act"]["output"] == entry(0, 1)
    assert stats == given


def test_inputs_behind_a_selection_are_narrowed_where_they_are_wider() -> None:
    stats = {
        "gates": {"inputs": {}, "output": entry(-9, 12)},
        "forget": {"inputs": {0: entry(-9, 3)}, "output": entry(0, 1)},
    }
    result = propagate_stats(stats, {"gates": ReadRange(-6, 6, (), ("forget",))})
    assert result["gates"]["output"] == {**entry(-9, 12), "min": -6, "max": 6, "avg_min": -4.5, "avg_max": 6}
    assert result["forget"]["inputs"][0] == {**entry(-9, 3), "min": -6, "avg_min": -4.5}


def test_input_statistics_of_a_shared_activation_stay() -> None:
    stats = {
        "conv": {"inputs": {}, "output": entry(-6, 8)},
        "act": {"inputs": {0: entry(-7, 9)}, "output": entry(0, 9)},
    }
    result = propagate_stats(stats, {"conv": ReadRange(0, INFINITY, (), ())})
    assert result["conv"]["output"]["min"] == 0
    assert result["act"] == stats["act"]


def test_layers_without_statistics_are_passed_over() -> None:
    assert propagate_stats({}, {"conv": ReadRange(0, INFINITY, ("act",), ())}) == {}
