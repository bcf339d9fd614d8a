"""Where the layers' inputs come from, in models that make it hard to tell."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distiller.modules import Chunk, Split
from distiller.quantization.dataflow import trace_dataflow

X = torch.randn(2, 4, 6, 6)


def sources(forward, **layers: nn.Module) -> dict[str, dict[int, str | None]]:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, layer in layers.items():
                self.add_module(name, layer)

        def forward(self, x):
            return forward(self, x)

    model = Model().eval()
    watched = {
        name: layer for name, layer in layers.items() if not isinstance(layer, nn.Identity | nn.Dropout)
    }
    return {name: use.sources for name, use in trace_dataflow(model, watched, X).items()}


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 1)


def test_a_layers_output_is_recognised_at_the_next_layer() -> None:
    assert sources(lambda m, x: m.b(m.a(x)), a=conv(), b=conv()) == {"a": {0: None}, "b": {0: "a"}}


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.flatten(1).view(2, 4, 6, 6),
        lambda x: x.permute(0, 1, 3, 2).contiguous(),
        lambda x: F.relu(x),
        lambda x: torch.relu(x),
        lambda x: x.relu_(),
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.dropout(x, training=False),
        lambda x: torch.chunk(x, 1, dim=1)[0],
        lambda x: x[:, :, 1:],
        lambda x: x.transpose(2, 3).reshape(2, 4, 36).unsqueeze(-1),
        lambda x: torch.cat([x[:, :2], x[:, 2:]], 1),
        lambda x: torch.stack([x, x.flip(0)])[0],
        lambda x: Split(2, dim=1)(x)[0].repeat(1, 2, 1, 1),
        lambda x: torch.cat(Chunk(2, dim=1)(x), 1),
        lambda x: torch.roll(x, 1, dims=2),
        lambda x: F.pad(x, (1, 1)),
        lambda x: F.pad(x, [0, 1, 0, 0], mode="reflect"),
    ],
)
def test_values_that_are_only_moved_or_selected_are_still_the_layers(between) -> None:
    assert sources(lambda m, x: m.b(between(m.a(x))), a=conv(), b=conv())["b"] == {0: "a"}


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x + 1,
        lambda x: x.add_(1),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: torch.sigmoid(x),
        lambda x: torch.cat([x, x + 1], 2),
        lambda x: torch.stack([x, torch.zeros_like(x)])[0],
        lambda x: x.mul_(2).flatten(0, 0),
        lambda x: F.relu6(x),
        lambda x: F.pad(x, (1, 1), value=0.5),
    ],
)
def test_values_that_were_changed_are_not(between) -> None:
    assert sources(lambda m, x: m.b(between(m.a(x))), a=conv(), b=conv())["b"] == {0: None}


def test_a_write_into_a_view_is_noticed() -> None:
    def forward(m, x):
        y = m.a(x)
        y[:, 0] += 1
        return m.b(y)

    assert sources(forward, a=conv(), b=conv())["b"] == {0: None}


def test_identities_and_dropout_are_looked_through() -> None:
    found = sources(
        lambda m, x: m.b(m.drop(m.same(m.a(x)))), a=conv(), b=conv(), same=nn.Identity(), drop=nn.Dropout()
    )
    assert found["b"] == {0: "a"}


def test_a_layer_that_works_in_place_is_the_source_from_then_on() -> None:
    found = sources(lambda m, x: m.b(m.relu(m.a(x))), a=conv(), relu=nn.ReLU(inplace=True), b=conv())
    assert (found["relu"], found["b"]) == ({0: "a"}, {0: "relu"})


def test_a_layer_called_with_different_sources_has_none() -> None:
    found = sources(lambda m, x: m.relu(m.b(m.relu(m.a(x)))), a=conv(), b=conv(), relu=nn.ReLU())
    assert found == {"a": {0: None}, "relu": {0: None}, "b": {0: "relu"}}


def test_a_layer_called_again_with_the_same_source_keeps_it() -> None:
    found = sources(lambda m, x: m.b(m.relu(m.a(x)) + m.relu(m.a(x))), a=conv(), b=conv(), relu=nn.ReLU())
    assert found["relu"] == {0: "a"}


def test_layers_that_are_not_called_are_not_listed() -> None:
    assert list(sources(lambda m, x: m.b(x), a=conv(), b=conv())) == ["b"]


def test_only_real_tensors_by_position_are_inputs() -> None:
    class Layer(nn.Module):
        def forward(self, x, index, other, scale=None):
            return x

    found = sources(lambda m, x: m.a(x, torch.tensor(1), 2, scale=x), a=Layer())
    assert found == {"a": {0: None}}


def test_what_a_layer_returns_is_told() -> None:
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.conv = Pair(), conv()

        def forward(self, x):
            return self.conv(self.pair(x)[1])

    model = Model()
    uses = trace_dataflow(model, {"pair": model.pair, "conv": model.conv}, (X,))
    assert [use.returns_tensor for use in uses.values()] == [False, True]
    assert uses["conv"].sources == {0: "pair"}


def test_leaves_no_hooks_behind_also_after_an_error() -> None:
    layer = conv()
    with pytest.raises(RuntimeError):
        trace_dataflow(nn.Sequential(layer), {"0": layer}, torch.zeros(1, 1, 1, 1))
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_works_inside_inference_mode() -> None:
    layers = {"0": conv(), "1": conv()}
    with torch.inference_mode():
        uses = trace_dataflow(nn.Sequential(*layers.values()), layers, X.clone())
    assert uses["1"].sources == {0: "0"}
