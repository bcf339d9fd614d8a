"""Which layers are pairs, and why others are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from distiller.graph import SummaryGraph
from distiller.quantization.refinement.equalization_pairs import channel_pairs


class Net(nn.Module):
    """Layers `first` and `second`, and what a function does with them."""

    def __init__(
        self, first: nn.Module, second: nn.Module, forward: Callable[..., Tensor], **others: nn.Module
    ) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.does = forward
        for name, module in others.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self, x)


def found(model: nn.Module, x: Tensor, relu6_too: bool = False):
    return channel_pairs(SummaryGraph(model.eval(), x), dict(model.named_modules()), relu6_too)


def conv() -> nn.Module:
    return nn.Conv2d(3, 4, 3)


IMAGE, VECTOR, SEQUENCE = (2, 3, 6, 5), (2, 3), (2, 7, 3)
PAIRS = {
    "directly": (IMAGE, conv, lambda: nn.Conv2d(4, 2, 1), lambda m, x: m.second(m.first(x)), 1),
    "ReLU": (IMAGE, conv, lambda: nn.Conv2d(4, 2, 1), lambda m, x: m.second(F.relu(m.first(x))), 1),
    "leaky ReLU, in place": (
        IMAGE,
        conv,
        lambda: nn.Conv2d(4, 4, 3, groups=4),
        lambda m, x: m.second(F.leaky_relu_(m.first(x), 0.1)),
        1,
    ),
    "max pooling": (
        IMAGE,
        conv,
        lambda: nn.ConvTranspose2d(4, 2, 1),
        lambda m, x: m.second(F.max_pool2d(m.first(x), 2)),
        1,
    ),
    "flattening": (IMAGE, conv, lambda: nn.Linear(48, 2), lambda m, x: m.second(torch.flatten(m.first(x), 1)), 12),
    "view": (IMAGE, conv, lambda: nn.Linear(48, 2), lambda m, x: m.second(m.first(x).view(len(x), -1)), 12),
    "average pooling and squeezing": (
        IMAGE,
        conv,
        lambda: nn.Linear(4, 2),
        lambda m, x: m.second(F.adaptive_avg_pool2d(m.first(x), 1).squeeze(-1).squeeze(-1)),
        1,
    ),
    "mean": (IMAGE, lambda: nn.Conv2d(3, 5, 3), lambda: nn.Linear(5, 2), lambda m, x: m.second(m.first(x).mean((2, 3))), 1),
    "positions in one dimension": (
        IMAGE,
        conv,
        lambda: nn.Conv1d(4, 2, 1),
        lambda m, x: m.second(m.first(x).flatten(2)),
        1,
    ),
    "linear": (VECTOR, lambda: nn.Linear(3, 5), lambda: nn.Linear(5, 2), lambda m, x: m.second(m.first(x).relu()), 1),
    "linear on sequences": (
        SEQUENCE,
        lambda: nn.Linear(3, 5),
        lambda: nn.Linear(5, 2),
        lambda m, x: m.second(F.relu(m.first(x))),
        1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PAIRS)
def test_layers_are_a_pair_through(kind) -> None:
    shape, first, second, forward, block = PAIRS[kind]
    pairs, left = found(Net(first(), second(), forward), torch.randn(shape))
    assert [(pair.first, pair.second, pair.block) for pair in pairs] == [("first", "second", block)]
    assert left == {"second": "the model returns its output"}


@pytest.mark.parametrize(
    "between", [nn.Identity(), nn.Dropout(), nn.PReLU(4), nn.MaxPool2d(2), nn.AvgPool2d(2, padding=1)]
)
def test_layers_are_a_pair_through_modules(between) -> None:
    model = nn.Sequential(conv(), between, nn.Conv2d(4, 2, 1))
    pairs, _ = found(model, torch.randn(IMAGE))
    assert [(pair.first, pair.second) for pair in pairs] == [("0", "2")]


REFUSED = {
    "Sigmoid": (
        IMAGE, conv, lambda: nn.Conv2d(4, 2, 1), lambda m, x: m.second(torch.sigmoid(m.first(x))),
        "'Sigmoid' (Sigmoid) does not keep factors of single channels",
    ),
    "clamp": (
        IMAGE, conv, lambda: nn.Conv2d(4, 2, 1), lambda m, x: m.second(m.first(x).clamp(0, 6)),
        "'Clip' (Clip) does not keep factors of single channels",
    ),
    "addition": (
        IMAGE, conv, lambda: nn.Conv2d(4, 2, 1), lambda m, x: m.second(m.first(x) + x.mean()),
        "'Add' (Add) puts it together with something else",
    ),
    "two readers": (
        IMAGE, conv, lambda: nn.Conv2d(4, 4, 1), lambda m, x: m.second(m.first(x)) + m.first(x).detach() * 0,
        "'first' is called 2 times",
    ),
    "shortcut": (
        IMAGE, conv, lambda: nn.Conv2d(4, 4, 1), lambda m, x: (lambda y: m.second(y) + y)(m.first(x)),
        "2 operations read its output: 'second', 'Add'",
    ),
    "mean over channels": (
        (2, 3, 6, 6), lambda: nn.Conv2d(3, 4, 3), lambda: nn.Linear(4, 2), lambda m, x: m.second(m.first(x).mean(1)),
        "'ReduceMean' (ReduceMean) does not keep factors of single channels",
    ),
    "mean that may be either": (
        (2, 3, 6, 6), lambda: nn.Conv2d(3, 4, 3), lambda: nn.Linear(4, 2), lambda m, x: m.second(m.first(x).mean((2, 3))),
        "'ReduceMean' (ReduceMean) does not keep factors of single channels",
    ),
    "rows as features": (
        (2, 3, 6, 6), conv, lambda: nn.Linear(4, 2), lambda m, x: m.second(m.first(x)),
        "'second' (Gemm) reads positions as features",
    ),
    "transposing": (
        IMAGE, conv, lambda: nn.Linear(4, 2), lambda m, x: m.second(m.first(x).permute(0, 2, 3, 1)),
        "'Transpose' (Transpose) does not keep factors of single channels",
    ),
    "regrouping": (
        IMAGE, conv, lambda: nn.Conv2d(2, 2, 1), lambda m, x: m.second(m.first(x).view(2, 2, 8, 3)),
        "'Reshape' (Reshape) mixes channels with other dimensions",
    ),
    "flattened sequences": (
        SEQUENCE, lambda: nn.Linear(3, 5), lambda: nn.Linear(35, 2), lambda m, x: m.second(m.first(x).flatten(1)),
        "'Flatten' (Flatten) mixes channels with other dimensions",
    ),
    "features as images": (
        VECTOR, lambda: nn.Linear(3, 8), lambda: nn.Conv2d(8, 2, 1),
        lambda m, x: m.second(F.relu(m.first(x)).view(2, 8, 1, 1)),
        "'Reshape' (Reshape) mixes channels with other dimensions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_layers_are_no_pair_through(kind) -> None:
    shape, first, second, forward, reason = REFUSED[kind]
    pairs, left = found(Net(first(), second(), forward), torch.randn(shape))
    assert pairs == []
    assert left["first"] == reason


def test_a_relu6_is_let_through_where_it_is_to_go() -> None:
    model = nn.Sequential(conv(), nn.ReLU6(), nn.Conv2d(4, 2, 1))
    pairs, left = found(model, torch.randn(IMAGE))
    assert pairs == []
    assert (
        left["0"]
        == "'1' (Clip) is bounded by 6 whatever the scale; pass replace_relu6=True to make it a ReLU"
    )
    pairs, _ = found(model, torch.randn(IMAGE), relu6_too=True)
    assert [(pair.first, pair.second) for pair in pairs] == [("0", "2")]


def test_a_batch_norm_stands_between_unless_it_was_folded() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    graph = SummaryGraph(model, torch.randn(IMAGE))
    _, left = channel_pairs(graph, dict(model.named_modules()), False)
    assert left["1"] == "'2' (BatchNormalization) does not keep factors of single channels"
    model[2] = nn.Identity()
    pairs, _ = channel_pairs(graph, dict(model.named_modules()), False)
    assert [(pair.first, pair.second) for pair in pairs] == [("1", "4")]


def test_weights_that_others_read_are_left_alone() -> None:
    def forward(model: Net, x: Tensor) -> Tensor:
        layer: Any = model.first
        return model.second(layer(x)) * layer.bias.sum()

    model = Net(nn.Linear(3, 3), nn.Linear(3, 3), forward)
    assert found(model, torch.randn(VECTOR))[1]["first"].startswith("'first' shares its bias with '")
    model = Net(nn.Linear(3, 3), nn.Linear(3, 3), lambda m, x: m.second(m.first(x)))
    model.second.weight = model.first.weight
    assert found(model, torch.randn(VECTOR))[1]["first"] == "'first' shares its weight with 'second'"
    model = Net(nn.Linear(3, 3), nn.Linear(3, 3), lambda m, x: m.second(m.first(x)))
    parametrizations.weight_norm(model.second)
    assert (
        found(model, torch.randn(VECTOR))[1]["first"] == "the weight of 'second' is computed, not a parameter"
    )


def test_a_second_layer_that_is_called_twice_is_left_alone() -> None:
    model = Net(nn.Linear(3, 3), nn.Linear(3, 3), lambda m, x: m.second(m.second(m.first(x))))
    assert found(model, torch.randn(VECTOR))[1]["first"] == "'second' is called 2 times"
