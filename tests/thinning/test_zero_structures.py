"""Which units go for their zeros, which zeros stay and why, and what is left over."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distiller.channel_groups import find_channel_groups
from distiller.names import canonical_state_dict
from distiller.thinning.zero_structures import KeptZeros, find_zero_units

IMAGE = torch.zeros(1, 3, 8, 8)


def conv(inputs: int, outputs: int, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups, bias=bias)


def zeroed(model: nn.Module, **indices: tuple[int, list[int]]) -> nn.Module:
    """`layer=(dim, indices)` of its weight at zero."""
    with torch.no_grad():
        for name, (dim, zeros) in indices.items():
            weight = model.get_submodule(name.lstrip("_")).weight
            assert isinstance(weight, nn.Parameter)
            weight.index_fill_(dim, torch.tensor(zeros), 0)
    return model


def found(model: nn.Module, kind, image: torch.Tensor = IMAGE):
    return find_zero_units(canonical_state_dict(model), find_channel_groups(model, image), kind)


class Chain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 4), nn.Flatten(), nn.Linear(256, 2)
        )


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 6), conv(6, 4), conv(4, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.b(F.relu(self.a(x))) + x)
        return self.fc(x.mean((2, 3)))


def test_zero_filters_go():
    zeros = found(zeroed(Chain(), _0=(0, [1, 4])), "filters")
    assert zeros.removed == {"0.weight": (1, 4)}
    assert zeros.kept == zeros.leftovers == ()


def test_without_zeros_nothing_goes_and_nothing_is_told():
    for kind in ("filters", "channels"):
        zeros = found(Chain(), kind)
        assert (zeros.removed, zeros.kept, zeros.leftovers) == ({}, (), ())


def test_channels_that_nothing_reads_go():
    zeros = found(zeroed(Chain(), _3=(1, [0, 5])), "channels")
    assert zeros.removed == {"0.weight": (0, 5)}
    assert zeros.kept == ()


def test_filters_and_channels_are_told_apart():
    model = zeroed(Chain(), _0=(0, [1]), _3=(1, [2]))
    assert found(model, "filters").removed == {"0.weight": (1,)}
    assert found(model, "channels").removed == {"0.weight": (2,)}


def test_a_flattened_channel_goes_when_all_of_its_columns_are_zero():
    model = zeroed(Chain(), _5=(1, [*range(64, 128), 130, 131]))
    zeros = found(model, "channels")
    assert zeros.removed == {"3.weight": (1,)}
    [kept] = zeros.kept
    assert (kept.name, kept.indices) == ("5.weight", (130, 131))
    assert len(kept.coupled["5.weight"]) == 62


def test_what_is_added_goes_when_it_is_zero_in_both_layers():
    zeros = found(zeroed(Residual(), stem=(0, [0, 2]), b=(0, [2, 5])), "filters")
    assert zeros.removed == {"stem.weight": (2,)}
    assert zeros.kept == (
        KeptZeros("stem.weight", "filters", (0,), {"b.weight": (0,)}),
        KeptZeros("b.weight", "filters", (5,), {"stem.weight": (5,)}),
    )
    assert [str(kept) for kept in zeros.kept] == [
        "stem.weight: 1 zero filter stays (0), coupled with b.weight (1 not zero: 0)",
        "b.weight: 1 zero filter stays (5), coupled with stem.weight (1 not zero: 5)",
    ]


def test_a_channel_goes_when_no_layer_reads_it():
    zeros = found(zeroed(Residual(), a=(1, [1, 3]), fc=(1, [3, 4])), "channels")
    assert zeros.removed == {"stem.weight": (3,)}
    assert zeros.kept == (
        KeptZeros("a.weight", "channels", (1,), {"fc.weight": (1,)}),
        KeptZeros("fc.weight", "channels", (4,), {"a.weight": (4,)}),
    )


def test_the_classifiers_outputs_and_the_images_channels_stay():
    model = zeroed(Chain(), _0=(1, [1]), _5=(0, [0]))
    [outputs] = found(model, "filters").kept
    assert str(outputs) == "5.weight: 1 zero filter stays (0): the network returns it"
    [read] = found(model, "channels").kept
    assert str(read) == "0.weight: 1 zero channel stays (1): it is of the network's input"


def test_of_a_layer_that_is_all_zero_one_filter_stays_and_is_told():
    """Distiller raised ValueError in the midst of training."""
    zeros = found(zeroed(Chain(), _0=(0, list(range(6)))), "filters")
    assert zeros.removed == {"0.weight": (1, 2, 3, 4, 5)}
    [kept] = zeros.kept
    assert str(kept) == "0.weight: 1 zero filter stays (0): all of its group are zero, and one has to stay"


def test_filters_of_a_depthwise_convolution_need_not_be_zero():
    model = nn.Sequential(conv(3, 4), conv(4, 4, groups=4), conv(4, 2), nn.Flatten())
    assert found(zeroed(model, _0=(0, [2])), "filters").removed == {"0.weight": (2,)}


def test_a_depthwise_convolution_is_a_member_that_passes_on_and_still_one_of_the_groups_filters():
    model = nn.Sequential(conv(3, 4), conv(4, 4, groups=4, bias=True), conv(4, 2), nn.Flatten())
    group = find_channel_groups(model, IMAGE)["0.weight"]
    assert [(m.name, m.role) for m in group.members] == [
        ("0.weight", "output"),
        ("1.weight", "through"),
        ("1.bias", "through"),
        ("2.weight", "input"),
    ]
    assert [m.name for m in group.filters()] == ["0.weight", "1.weight", "1.bias"]


def test_nor_need_they_be_where_nothing_reads_what_they_pass_on():
    model = nn.Sequential(conv(3, 4), conv(4, 4, groups=4), conv(4, 2), nn.Flatten())
    zeros = found(zeroed(model, _2=(1, [2])), "channels")
    assert zeros.removed == {"0.weight": (2,)}


def test_a_zero_depthwise_filter_alone_stays():
    model = nn.Sequential(conv(3, 4), conv(4, 4, groups=4), conv(4, 2), nn.Flatten())
    zeros = found(zeroed(model, _1=(0, [2])), "filters")
    assert zeros.removed == {}
    assert zeros.kept == (KeptZeros("1.weight", "filters", (2,), {"0.weight": (2,)}),)


def test_a_grouped_convolution_goes_by_groups():
    """Distiller refused groups other than 1 and the number of channels."""
    model = nn.Sequential(conv(3, 8), conv(8, 8, groups=4), conv(8, 2), nn.Flatten())
    zeros = found(zeroed(model, _0=(0, [0, 2, 3])), "filters")
    assert zeros.removed == {"0.weight": (1,)}
    assert zeros.kept == (KeptZeros("0.weight", "filters", (0,), {"0.weight": (1,)}),)


def test_a_depthwise_transposed_convolution_passes_on_as_well():
    model = nn.Sequential(conv(3, 4), nn.ConvTranspose2d(4, 4, 2, 2, groups=4), conv(4, 2), nn.Flatten())
    assert found(zeroed(model, _0=(0, [2])), "filters").removed == {"0.weight": (2,)}
    assert found(zeroed(model, _2=(1, [1])), "channels").removed == {"0.weight": (1,)}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.fc = conv(3, 4), conv(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.shared(F.relu(self.shared(F.relu(self.stem(x))))).mean((2, 3)))


def test_a_shared_layer_reads_what_it_makes_itself():
    zeros = found(zeroed(Twice(), shared=(0, [1, 2]), stem=(0, [2])), "filters")
    assert zeros.removed == {"stem.weight": (2,)}
    assert zeros.kept == (KeptZeros("shared.weight", "filters", (1,), {"stem.weight": (1,)}),)


def test_biases_shifts_and_running_means_do_not_count_and_are_left_over():
    model = nn.Sequential(conv(3, 4, bias=True), nn.BatchNorm2d(4), conv(4, 4, bias=True), nn.Flatten())
    zeroed(model, _0=(0, [1]))
    assert found(model, "filters").leftovers == ("0.bias",)
    with torch.no_grad():
        model.get_parameter("0.bias")[1] = 0
        model.get_parameter("1.bias")[[0, 2, 3]] = 1  # of filters that stay
        model.get_buffer("1.running_var").fill_(2)
    assert found(model, "filters").leftovers == ()
    with torch.no_grad():
        model.get_parameter("1.bias")[1] = 1
        model.get_buffer("1.running_mean")[1] = 1
    zeros = found(model, "filters")
    assert zeros.removed == {"0.weight": (1,)}
    assert zeros.leftovers == ("1.bias", "1.running_mean")
    with torch.no_grad():
        model.get_parameter("1.weight")[1] = 0  # the mean comes to nothing
    assert found(model, "filters").leftovers == ("1.bias",)


def test_what_nothing_reads_leaves_nothing_over_but_for_a_layer_norm():
    plain = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    normed = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    for model, left in ((plain, ()), (normed, ("1",))):
        zeros = found(zeroed(model, _2=(1, [3])), "channels", torch.zeros(1, 5))
        assert zeros.removed == {"0.weight": (3,)}
        assert zeros.leftovers == left


def test_nan_is_not_zero():
    model = zeroed(Chain(), _0=(0, [1]))
    with torch.no_grad():
        model.get_parameter("0.weight")[1, 0, 0, 0] = torch.nan
    assert found(model, "filters").removed == {}


@pytest.mark.parametrize(
    ("coupled", "text"),
    [
        (
            {"b": (1,)},
            "a: 10 zero filters stay (0, 1, 2, 3, 4, 5, 6, 7, ...), coupled with b (1 not zero: 1)",
        ),
        (
            dict.fromkeys("bcdef", (1, 2)),
            "a: 10 zero filters stay (0, 1, 2, 3, 4, 5, 6, 7, ...), coupled with b (2 not zero: 1, 2), "
            "c (2 not zero: 1, 2), d (2 not zero: 1, 2), e (2 not zero: 1, 2) and 1 more",
        ),
    ],
)
def test_long_lists_are_told_by_their_beginnings(coupled, text):
    assert str(KeptZeros("a", "filters", tuple(range(10)), coupled)) == text
