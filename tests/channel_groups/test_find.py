"""Groups of small networks, counted by hand; and units cut out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distiller.channel_groups import find_channel_groups
from distiller.errors import GraphTraceError
from distiller.macs import count_macs
from distiller.models import create_model
from distiller.models.word_language_model import RNNModel
from tests.channel_groups.cutting import cut, first_units, masked, randomize, relative_difference

IMAGE = torch.zeros(1, 3, 8, 8)


def conv(inputs: int, outputs: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups)


def sizes(model: nn.Module, x: torch.Tensor = IMAGE) -> dict[str, int]:
    return {group.name: group.size for group in find_channel_groups(model, x).removable()}


def check_cut(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Without their units, networks answer as with them at zero, and work as much less as was said."""
    randomize(model)
    x = torch.randn(2, *shape)
    groups = find_channel_groups(model, x[:1])
    removed = first_units(groups.removable())
    assert removed
    smaller = cut(model, groups, removed)
    assert relative_difference(masked(model, groups, removed), smaller, x) < 1e-5
    assert relative_difference(model, smaller, x) > 1e-3
    assert sum(layer.macs for layer in count_macs(smaller, x[:1])) == groups.macs(removed) < groups.macs()


def test_members_of_a_chain_by_hand(tiny_cnn):
    groups = find_channel_groups(tiny_cnn, torch.zeros(1, 1, 8, 8))
    one = lambda count: tuple((i,) for i in range(count))  # noqa: E731
    assert [(g.name, g.size, g.reason) for g in groups if g.is_removable] == [
        ("conv1.weight", 4, None),
        ("conv2.weight", 6, None),
    ]
    first = groups["conv1.weight"]
    assert {(m.name, m.dim, m.role) for m in first.members} == {
        ("conv1.weight", 0, "output"),
        ("bn1.weight", 0, "channel"),
        ("bn1.bias", 0, "channel"),
        ("bn1.running_mean", 0, "channel"),
        ("bn1.running_var", 0, "channel"),
        ("conv2.weight", 1, "input"),
    }
    assert all(member.indices == one(4) for member in first.members)
    assert first.indices([3, 1])["conv2.weight", 1] == [1, 3]


def test_what_cannot_be_removed_says_why(tiny_cnn):
    groups = find_channel_groups(tiny_cnn, torch.zeros(1, 1, 8, 8))
    assert groups["fc.weight"].reason == "the network returns it"
    [read] = groups.of("conv1.weight", 1)
    assert read.reason == "it is of the network's input"


def test_one_channel_is_many_columns_after_flattening():
    model = nn.Sequential(conv(3, 5), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(20, 7))
    group = find_channel_groups(model, IMAGE)["0.weight"]
    [columns] = [member for member in group.members if member.name == "4.weight"]
    assert columns.dim == 1
    assert columns.indices[1] == (4, 5, 6, 7)
    check_cut(model, (3, 8, 8))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 6), conv(6, 4), conv(4, 6)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(self.norm(self.b(F.relu(self.a(x)))) + x)
        return self.fc(x.mean((2, 3)))


def test_what_is_added_stands_or_falls_together():
    groups = find_channel_groups(Residual(), IMAGE)
    assert sizes(Residual()) == {"stem.weight": 6, "a.weight": 4}
    assert [member.name for member in groups["stem.weight"].filters()] == [
        "stem.weight",
        "stem.bias",
        "b.weight",
        "b.bias",
    ]
    check_cut(Residual(), (3, 8, 8))


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 2), conv(3, 3), conv(5, 4)

    def forward(self, x):
        return self.head(torch.cat([self.a(x), self.b(x).relu_()], 1)).flatten(1)


def test_concatenated_channels_follow_one_another():
    groups = find_channel_groups(Concatenated(), IMAGE)
    assert sizes(Concatenated()) == {"a.weight": 2, "b.weight": 3}
    assert groups["b.weight"].indices([0])["head.weight", 1] == [2]
    check_cut(Concatenated(), (3, 8, 8))


def test_a_depthwise_convolution_goes_with_what_it_reads():
    model = nn.Sequential(conv(3, 4), conv(4, 4, groups=4), conv(4, 2), nn.Flatten())
    groups = find_channel_groups(model, IMAGE)
    assert sizes(model) == {"0.weight": 4}
    assert groups["0.weight"].indices([2])["1.weight", 0] == [2]
    check_cut(model, (3, 8, 8))


def test_a_convolution_of_many_small_groups_loses_whole_groups():
    model = nn.Sequential(conv(3, 8), conv(8, 16, groups=4), conv(16, 2), nn.Flatten())
    groups = find_channel_groups(model, IMAGE)
    assert sizes(model) == {"0.weight": 4}
    indices = groups["0.weight"].indices([1])
    assert indices["0.weight", 0] == [2, 3]
    assert indices["1.weight", 0] == [4, 5, 6, 7]
    assert ("1.weight", 1) not in indices
    check_cut(model, (3, 8, 8))


def test_a_convolution_of_few_large_groups_loses_the_same_channels_of_each():
    model = nn.Sequential(conv(3, 8), conv(8, 6, groups=2), conv(6, 2), nn.Flatten())
    groups = find_channel_groups(model, IMAGE)
    assert sizes(model) == {"0.weight": 4, "1.weight": 3}
    assert groups["0.weight"].indices([1]) == {
        ("0.weight", 0): [1, 5],
        ("0.bias", 0): [1, 5],
        ("1.weight", 1): [1],
    }
    assert groups["1.weight"].indices([0])["1.weight", 0] == [0, 3]
    check_cut(model, (3, 8, 8))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_transposed_convolutions(groups):
    model = nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 8, 2, 2, groups=groups), conv(8, 2), nn.Flatten())
    found = find_channel_groups(model, IMAGE)
    if groups == 1:
        assert sizes(model) == {"0.weight": 8, "1.weight": 8}
        assert found["1.weight"].indices([5]) == {
            ("1.weight", 1): [5],
            ("1.bias", 0): [5],
            ("2.weight", 1): [5],
        }
    elif groups == 2:
        assert sizes(model) == {"0.weight": 4, "1.weight": 4}
    else:
        assert sizes(model) == {"0.weight": 8}
    assert found.macs() == sum(layer.macs for layer in count_macs(model, IMAGE))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.excite, self.head = (
            conv(3, 8),
            nn.Linear(8, 4),
            nn.Linear(4, 8),
            conv(8, 2),
        )

    def forward(self, x):
        x = self.conv(x)
        scale = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1).flatten(1))))
        return self.head(x * torch.sigmoid(scale)[:, :, None, None]).flatten(1)


def test_squeeze_and_excite_goes_with_its_channels():
    assert sizes(SqueezeExcite()) == {"conv.weight": 8, "squeeze.weight": 4}
    check_cut(SqueezeExcite(), (3, 8, 8))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.head = conv(3, 4), conv(4, 4), conv(4, 2)

    def forward(self, x):
        return self.head(self.twice(self.twice(self.stem(x)).relu())).flatten(1)


def test_a_module_called_twice_ties_what_it_reads_to_what_it_makes():
    groups = find_channel_groups(Shared(), IMAGE)
    assert sizes(Shared()) == {"stem.weight": 4}
    assert {("twice.weight", 0), ("twice.weight", 1)} <= groups["stem.weight"].indices([0]).keys()
    check_cut(Shared(), (3, 8, 8))


class Attention(nn.Module):
    """Two heads of three channels over the pixels of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.q, self.k, self.v = conv(3, 5), *(nn.Linear(5, 6) for _ in range(3))
        self.out = nn.Linear(6, 2)

    def heads(self, x):
        return x.view(x.shape[0], x.shape[1], 2, -1).transpose(1, 2)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        x = torch.softmax(q @ k.transpose(-2, -1) * 0.5, -1) @ v
        return self.out(x.transpose(1, 2).flatten(2)).mean(1)


def test_a_head_of_attention_is_a_unit():
    groups = find_channel_groups(Attention(), IMAGE)
    assert sizes(Attention()) == {"stem.weight": 5, "q.weight": 2}
    indices = groups["q.weight"].indices([1])
    assert indices["v.weight", 0] == indices["k.bias", 0] == indices["out.weight", 1] == [3, 4, 5]


def test_fused_attention_is_followed_as_the_products_that_it_stands_for():
    class Fused(Attention):
        def forward(self, x):
            x = self.stem(x).flatten(2).transpose(1, 2)
            x = F.scaled_dot_product_attention(*(self.heads(f(x)) for f in (self.q, self.k, self.v)))
            return self.out(x.transpose(1, 2).flatten(2)).mean(1)

    assert sizes(Fused()) == sizes(Attention())
    assert find_channel_groups(Fused(), IMAGE).macs() == find_channel_groups(Attention(), IMAGE).macs()


def test_a_layer_norm_over_the_channels_is_noted():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    groups = find_channel_groups(model, torch.zeros(1, 4))
    assert groups["0.weight"].normalized_by == ("1",)
    assert groups["2.weight"].normalized_by == ()


class Reader(nn.Module):
    def __init__(self, between) -> None:
        super().__init__()
        self.make, self.between, self.read = conv(3, 4), between, nn.LazyConv2d(2, 1)
        self.eval()(IMAGE)

    def forward(self, x):
        return self.read(self.between(self.make(x))).flatten(1)


@pytest.mark.parametrize(
    "between, reason",
    [
        (lambda x: x.softmax(1), "softmax is over its channels"),
        (lambda x: x.mean(1, keepdim=True), "mean is over its channels"),
        (lambda x: x[:, :3], "slice takes channels by their number"),
        (lambda x: x.flip(1), "flip takes channels by their number"),
        (lambda x: F.pad(x, (0, 0, 0, 0, 0, 2)), "pad is over its channels"),
        (lambda x: torch.cat(x.split([1, 3], 1), 1), "split_with_sizes is into parts of different sizes"),
        (lambda x: x + torch.ones(1, 4, 1, 1), "add is with a tensor of fixed size"),
        (
            lambda x: x + torch.tensor([[[1.0]], [[2.0]], [[3.0]], [[4.0]]]),
            "it is in step with a constant of the network",
        ),
        (lambda x: x + torch.ones_like(x), "add is with a tensor of fixed size"),
        (lambda x: x.sort(1).values, "sort does not say which of its channels belong to which"),
        (lambda x: F.group_norm(x, 2), "group_norm does not say which of its channels belong to which"),
        (lambda x: x * x.mean(1, keepdim=True), "mean is over its channels"),
    ],
)
def test_what_takes_channels_for_more_than_channels_keeps_them(between, reason):
    groups = find_channel_groups(Reader(between), IMAGE).of("make.weight", 0)
    assert reason in {group.reason for group in groups}


def test_a_scale_for_each_place_does_not_tie_the_channels():
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.gate, self.read = conv(3, 4), conv(3, 1), conv(4, 2)

        def forward(self, x):
            return self.read(self.make(x) * self.gate(x).sigmoid()).flatten(1)

    groups = find_channel_groups(Gate(), IMAGE)
    assert sizes(Gate()) == {"make.weight": 4}
    assert groups["gate.weight"].reason == "mul meets all channels of another operand with it"


def test_a_single_filter_stays():
    model = nn.Sequential(conv(3, 1), conv(1, 2), nn.Flatten())
    assert (
        find_channel_groups(model, IMAGE)["0.weight"].reason
        == "it is all that 0.weight has along dimension 0"
    )


def test_halves_and_shuffles_are_cut_alike():
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.left, self.right = conv(3, 8), conv(4, 2), conv(4, 2)

        def forward(self, x):
            a, b = self.make(x).chunk(2, 1)
            return torch.cat([self.left(a), self.right(b)], 1).flatten(1)

    group = find_channel_groups(Shuffled(), IMAGE)["make.weight"]
    assert group.size == 4
    assert group.indices([1])["make.weight", 0] == [1, 5]
    check_cut(Shuffled(), (3, 8, 8))


def test_pixel_shuffle_takes_a_square_of_channels_for_one():
    model = nn.Sequential(conv(3, 8), nn.PixelShuffle(2), conv(2, 3), nn.PixelUnshuffle(2), conv(12, 2))
    groups = find_channel_groups(model, IMAGE)
    assert sizes(model) == {"0.weight": 2, "2.weight": 3}
    assert groups["0.weight"].indices([1])["0.weight", 0] == [4, 5, 6, 7]
    assert groups["2.weight"].indices([0])["4.weight", 1] == [0, 1, 2, 3]


def test_a_parameter_that_is_an_operand_goes_with_its_channels():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.read = conv(3, 4), conv(4, 2)
            self.scale = nn.Parameter(torch.rand(4, 1, 1))

        def forward(self, x):
            return self.read(self.scale * self.make(x)).flatten(1)

    group = find_channel_groups(Scaled(), IMAGE)["make.weight"]
    assert ("scale", 0, "channel") in {(m.name, m.dim, m.role) for m in group.members}
    check_cut(Scaled(), (3, 8, 8))


@pytest.mark.parametrize("tied", [False, True])
def test_nothing_of_a_language_model_with_an_lstm_is_removable(tied):
    model = RNNModel(11, 6, 6, 2, tied=tied)
    groups = find_channel_groups(model, (torch.zeros(3, 1, dtype=torch.long), model.init_hidden(1)))
    assert groups.removable() == ()
    [embedded] = groups.of("encoder.weight", 1)
    assert embedded.reason == "lstm in rnn does not say which of its channels belong to which"


def test_groups_have_canonical_names_and_leave_the_model_as_it_was(tiny_cnn):
    tiny_cnn.train()
    before = {name: value.clone() for name, value in tiny_cnn.state_dict().items()}
    groups = find_channel_groups(nn.DataParallel(tiny_cnn), torch.zeros(1, 1, 8, 8))
    assert groups["conv1.weight"].size == 4
    assert tiny_cnn.training
    assert all(torch.equal(before[name], value) for name, value in tiny_cnn.state_dict().items())


def test_a_model_that_cannot_be_traced_is_refused():
    class Fickle(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(GraphTraceError, match="Fickle: torch.export cannot trace it for its channel groups"):
        find_channel_groups(Fickle(), IMAGE)


@pytest.mark.parametrize(
    "arch, dataset, units",
    [
        # stem + 3 x (inner) in each of three stages, and the streams 16, 32, 64
        ("resnet20_cifar", "cifar10", 3 * (16 + 32 + 64) + 16 + 32 + 64),
        ("simplenet_cifar", "cifar10", 6 + 16 + 120 + 84),
        ("plain20_cifar", "cifar10", 7 * 16 + 6 * 32 + 6 * 64),
        ("preact_resnet20_cifar", "cifar10", None),
        ("vgg11_cifar", "cifar10", None),
        ("simplenet_mnist", "mnist", 20 + 50 + 500),
    ],
)
def test_models_of_the_zoo(arch, dataset, units):
    shape = (1, 28, 28) if dataset == "mnist" else (3, 32, 32)
    model = create_model(False, dataset, arch, parallel=False)
    found = sizes(model, torch.zeros(1, *shape))
    if units is not None:
        assert sum(found.values()) == units
    check_cut(model, shape)


@pytest.mark.parametrize("number", [lambda w: torch.dot(w[0], w[0]), torch.trace, torch.median])
def test_an_unknown_operation_that_comes_to_one_number_leaves_the_rest_as_it_is(number):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
            self.table = nn.Parameter(torch.randn(3, 3))

        def forward(self, x):
            return self.last(self.first(x)) * number(self.table)

    (group,) = find_channel_groups(Scaled(), torch.zeros(1, 4)).of("first.weight", 0)
    assert (group.size, group.reason) == (6, None)


def test_a_computed_weight_is_told_as_the_reason():
    model = nn.Sequential(nn.Linear(4, 6), nn.utils.parametrizations.spectral_norm(nn.Linear(6, 2)))
    (group,) = find_channel_groups(model, torch.zeros(1, 4)).of("0.weight", 0)
    assert group.reason == (
        "the weight of linear in 1 is computed from other tensors; take the parametrization off first "
        "(torch.nn.utils.parametrize.remove_parametrizations)"
    )
