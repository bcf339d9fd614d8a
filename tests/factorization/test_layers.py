"""Factored layers compute what the one layer does at full rank, whatever its settings."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distiller.errors import UsageError
from distiller.factorization.forms import (
    LayerShape,
    candidate_ranks,
    checked_rank,
    default_form,
    refusal,
    shape_of,
)
from distiller.factorization.layers import LowRankPlusSparse, children_of, composed, factored, set_weights
from distiller.macs import count_macs

CONVOLUTIONS = {
    "plain": {"kernel_size": 3},
    "stride and padding": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2)},
    "same": {"kernel_size": (5, 3), "padding": "same", "dilation": (1, 2)},
    "valid": {"kernel_size": 3, "padding": "valid", "bias": False},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2, "stride": 3},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "reflect": {"kernel_size": (3, 5), "padding": (1, 2), "padding_mode": "reflect"},
    "replicate and same": {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"},
    "1x1": {"kernel_size": 1},
}


def full_rank(layer, form):
    return shape_of(layer).most(form)


@pytest.mark.parametrize("form", ["channel", "spatial", "tucker2"])
@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_factored_convolution_of_full_rank_computes_the_same(form, settings):
    layer = nn.Conv2d(4, 6, **settings).double()
    x = torch.randn(2, 4, 11, 9, dtype=torch.float64)
    expected = layer(x)
    module = factored(layer, form, full_rank(layer, form))
    set_weights(module, layer.weight, form)
    torch.testing.assert_close(module(x), expected)
    again = composed(module, form)
    assert repr(again) == repr(layer)
    torch.testing.assert_close(again(x), expected)
    torch.testing.assert_close(again.weight, layer.weight)


@pytest.mark.parametrize("form", ["channel", "tucker2"])
@pytest.mark.parametrize(
    "settings", [{"padding": "same"}, {"stride": 2, "padding": 2, "padding_mode": "reflect"}]
)
def test_a_one_dimensional_convolution_likewise(form, settings):
    layer = nn.Conv1d(4, 6, 5, **settings).double()
    x = torch.randn(2, 4, 13, dtype=torch.float64)
    module = factored(layer, form, full_rank(layer, form))
    set_weights(module, layer.weight, form)
    torch.testing.assert_close(module(x), layer(x))
    torch.testing.assert_close(composed(module, form)(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_factored_linear_layer_is_two_linear_layers(bias):
    layer = nn.Linear(7, 5, bias=bias).double()
    module = factored(layer, "svd", (5,))
    set_weights(module, layer.weight, "svd")
    x = torch.randn(3, 2, 7, dtype=torch.float64)
    torch.testing.assert_close(module(x), layer(x))
    assert [name for name, _ in module.named_children()] == ["first", "second"]
    assert all(type(child) is nn.Linear for child in module.children())
    assert module.first.bias is None
    assert module.second.bias is layer.bias


@pytest.mark.parametrize("layer", [nn.Linear(9, 8), nn.Conv2d(3, 8, 3, stride=2, padding=1)])
def test_the_sparse_part_adds_to_the_product(layer):
    layer = layer.double()
    form = default_form(layer)
    module = factored(layer, form, (2,), is_sparse=True)
    set_weights(module, layer.weight, form, nonzeros=30)
    assert isinstance(module, LowRankPlusSparse)
    assert int((module.sparse.weight != 0).sum()) == 30
    x = torch.randn(2, 9) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(module(x.double()), composed(module, form)(x.double()))
    plain = factored(layer, form, (2,))
    set_weights(plain, layer.weight, form)
    errors = [(composed(own, form).weight - layer.weight).norm() for own in (module, plain)]
    assert errors[0] < errors[1]


def test_children_are_named_as_they_run():
    assert children_of("tucker2") == ("first", "core", "last")
    assert children_of("channel", is_sparse=True) == ("first", "second", "sparse")


def test_where_a_layer_is_frozen_or_laid_out_otherwise_so_are_its_factors():
    layer = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last).eval()
    layer.weight.requires_grad_(False)
    module = factored(layer, "channel", (3,))
    assert not module.training
    assert not module.first.weight.requires_grad
    assert module.second.bias.requires_grad
    assert module.first.weight.is_contiguous(memory_format=torch.channels_last)


def test_making_factors_draws_no_random_numbers():
    layer, before = nn.Conv2d(4, 6, 3), torch.get_rng_state()
    factored(layer, "tucker2", (2, 3))
    factored(nn.Linear(4, 4), "svd", (2,))
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    nn.Linear(4, 4)
    assert torch.equal(after, torch.get_rng_state())


SHAPED = [
    (nn.Linear(40, 30), "svd", (7,), (2, 40)),
    (nn.Conv2d(4, 8, (3, 5), stride=(2, 3), padding=1), "channel", (3,), (2, 4, 12, 13)),
    (nn.Conv2d(4, 8, (3, 5), stride=(2, 3), padding=1), "spatial", (3,), (2, 4, 12, 13)),
    (nn.Conv2d(4, 8, 3, padding="same", dilation=2), "spatial", (3,), (2, 4, 9, 7)),
    (nn.Conv2d(4, 8, 3, stride=2), "tucker2", (2, 5), (2, 4, 12, 13)),
    (nn.Conv1d(4, 8, 3, stride=2), "tucker2", (2, 5), (2, 4, 21)),
]


@pytest.mark.parametrize(("layer", "form", "rank", "size"), SHAPED)
def test_costs_are_those_that_a_forward_pass_counts(layer, form, rank, size):
    x = torch.zeros(1, *size[1:])
    (cost,) = count_macs(nn.Sequential(copy.deepcopy(layer)), x)
    shape = shape_of(layer, cost.input_shape, cost.macs)
    assert shape.macs == cost.macs
    module = factored(copy.deepcopy(layer), form, rank)
    assert shape.factored_macs(form, rank) == sum(own.macs for own in count_macs(module, x))
    weights = sum(param.numel() for name, param in module.named_parameters() if "bias" not in name)
    assert shape.factored_parameters(form, rank) == weights


def test_a_layer_that_is_called_twice_costs_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x))

    (cost,) = count_macs(Twice(), torch.zeros(1, 4, 5, 5))
    shape = shape_of(Twice().conv, cost.input_shape, cost.macs)
    assert shape.macs == cost.macs == 2 * 25 * 4 * 4 * 9
    assert shape.factored_macs("channel", (2,)) == 2 * 25 * (4 * 9 * 2 + 2 * 4)


@pytest.mark.parametrize(
    ("n", "m", "fraction"), [(6144, 3000, 0.67), (3000, 2000, 0.60), (2000, 2000, 0.50), (2000, 1000, 0.67)]
)
def test_break_even_is_that_of_the_haiku_layers(n, m, fraction):
    shape = LayerShape((m, n))
    exact = shape.break_even_exact("svd")
    assert exact == pytest.approx(m * n / (m + n))
    assert exact / min(m, n) == pytest.approx(fraction, abs=0.005)
    (rank,) = shape.break_even("svd")
    assert rank < exact <= rank + 1
    assert not shape.shrinks("svd", (rank + 1,))


@pytest.mark.parametrize("form", ["channel", "spatial", "tucker2"])
def test_the_break_even_rank_is_the_last_that_shrinks(form):
    shape = LayerShape((20, 12, 3, 3), 49, 36, 42)
    ranks = candidate_ranks(shape, form)
    costs = [shape.factored_parameters(form, rank) for rank in ranks]
    assert costs == sorted(costs)
    at = ranks.index(shape.break_even(form))
    assert [shape.shrinks(form, rank) for rank in ranks] == [index <= at for index in range(len(ranks))]
    exact = shape.break_even_exact(form)
    assert abs(ranks[at][-1] - exact) < 2  # the MACs break even a little earlier


def test_a_spatial_form_that_has_more_macs_does_not_shrink():
    shape = shape_of(nn.Conv2d(16, 4, 3, stride=(1, 3), padding=1), (1, 16, 9, 9))
    assert any(
        shape.factored_parameters("spatial", rank) < shape.parameters and not shape.shrinks("spatial", rank)
        for rank in candidate_ranks(shape, "spatial")
    )


@pytest.mark.parametrize(
    ("layer", "form", "reason"),
    [
        (nn.ReLU(), None, "it is a ReLU; Linear, Conv1d and Conv2d can be"),
        (
            nn.Conv2d(4, 4, 3, groups=2),
            None,
            "it is a convolution of 2 groups, whose filters read different channels",
        ),
        (nn.Linear(4, 4), "channel", "it is a Linear, and form channel is not for it; svd can be"),
        (
            nn.Conv2d(4, 4, 3),
            "svd",
            "it is a Conv2d, and form svd is not for it; channel, spatial and tucker2 can be",
        ),
        (
            nn.Conv1d(4, 4, 3),
            "spatial",
            "it is a Conv1d, and form spatial is for Conv2d; channel and tucker2 can be",
        ),
        (nn.Linear(4, 1), None, "its rank is 1 already"),
        (
            nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            None,
            "it is a ParametrizedLinear; Linear, Conv1d and Conv2d can be",
        ),
    ],
)
def test_what_cannot_be_factored_is_told_why(layer, form, reason):
    assert refusal(layer, form) == reason


def test_ranks_as_users_give_them():
    shape = LayerShape((20, 10, 3, 3))
    assert checked_rank(shape, "channel", 7) == (7,)
    assert checked_rank(shape, "tucker2", [3, 8]) == (3, 8)
    assert checked_rank(shape, "tucker2", 8) == (4, 8)


@pytest.mark.parametrize(
    ("form", "rank", "text"),
    [
        ("channel", 21, "rank must be at least 1 and at most 20, got 21"),
        ("channel", [2, 3], "rank must be one number for form channel, got [2, 3]"),
        ("tucker2", [11, 8], "rank must be at least 1 and at most [10, 20], got [11, 8]"),
        ("tucker2", 21, "rank must be 1 to 20, got 21"),
    ],
)
def test_ranks_that_a_layer_does_not_have_are_refused(form, rank, text):
    with pytest.raises(UsageError) as error:
        checked_rank(LayerShape((20, 10, 3, 3)), form, rank)
    assert str(error.value) == text
