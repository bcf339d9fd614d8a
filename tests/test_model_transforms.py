"""Folded models compute what the original does in evaluation mode; fused sequences stay within the rules."""

from collections import OrderedDict
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from distiller.errors import DistillerError, GraphTraceError, UsageError
from distiller.graph import AdjacentsEntry, OpSimpleMetadata, SummaryGraph
from distiller.model_transforms import fold_batch_norms, fuse_modules

CONVOLUTIONS = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
}


def lived_in(norm: nn.Module) -> nn.Module:
    """A batch norm as after training: no statistic or parameter has its first value."""
    for name, value in [*norm.named_buffers(), *norm.named_parameters()]:
        if value.is_floating_point():
            with torch.no_grad():
                value.uniform_(0.5, 2) if "var" in name else value.normal_()
    return norm


def pair_by_hand() -> OrderedDict:
    """The adjacency of a model `Sequential(layer, norm)`, as a user may write it."""
    layer, norm = OpSimpleMetadata("0", "Conv"), OpSimpleMetadata("1", "BatchNormalization")
    return OrderedDict({"0": AdjacentsEntry(layer, [], [norm]), "1": AdjacentsEntry(norm, [layer], [])})


def types_of(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.children()]


@settings(max_examples=40, deadline=None)
@given(
    dims=st.sampled_from([1, 2, 3]),
    transposed=st.booleans(),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    affine=st.booleans(),
    stride=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_a_folded_convolution_equals_convolution_and_norm(
    dims, transposed, groups, bias, affine, stride, seed
):
    torch.manual_seed(seed)
    conv, conv_transposed, norm = CONVOLUTIONS[dims]
    layer = (conv_transposed if transposed else conv)(4, 6, 2, stride=stride, groups=groups, bias=bias)
    model = nn.Sequential(layer, lived_in(norm(6, affine=affine))).eval()
    x = torch.randn(2, 4, *[4] * dims)
    expected = model(x)
    fold_batch_norms(model, adjacency_map=pair_by_hand())
    assert types_of(model)[1] == "Identity"
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_linear_layer_equals_layer_and_norm(bias):
    model = nn.Sequential(nn.Linear(5, 7, bias=bias), lived_in(nn.BatchNorm1d(7))).eval()
    x = torch.randn(3, 5)
    expected = model(x)
    fold_batch_norms(model, torch.randn(2, 5))
    assert types_of(model) == ["Linear", "Identity"]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_folded_residual_network_equals_the_original(tiny_resnet):
    x = torch.randn(2, 3, 8, 8)
    expected = tiny_resnet.eval()(x)
    folded = fold_batch_norms(tiny_resnet, x[:1])
    assert folded is tiny_resnet
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def tiny_resnet() -> nn.Module:
    class Resnet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn2 = lived_in(nn.BatchNorm2d(4))  # registered before what it follows
            self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
            self.bn1 = lived_in(nn.BatchNorm2d(4))
            self.relu = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(4, 4, 3, padding=1, groups=4)

        def forward(self, x):
            x = self.relu(self.bn1(self.conv1(x)))
            return self.relu(x + self.bn2(self.conv2(x)))

    return Resnet()


def test_folded_layers_name_their_norm_and_old_parameters_stay_as_they_were(tiny_resnet):
    old = tiny_resnet.conv1.weight
    before = old.detach().clone()
    fold_batch_norms(tiny_resnet, torch.zeros(1, 3, 8, 8))
    assert tiny_resnet.conv1.fused_modules == ["bn1"]
    assert tiny_resnet.conv2.fused_modules == ["bn2"]
    assert tiny_resnet.conv1.weight is not old
    assert torch.equal(old, before)


def test_the_graph_of_a_folded_model_has_no_norms(tiny_resnet):
    fold_batch_norms(tiny_resnet, torch.zeros(1, 3, 8, 8))
    graph = SummaryGraph(tiny_resnet, torch.zeros(1, 3, 8, 8))
    assert graph.layers_topological_order() == ["conv1", "relu", "conv2"]


class Pair(nn.Module):
    """A convolution and a norm, wired by `call`."""

    def __init__(self, call) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.other = nn.BatchNorm2d(3)
        self.call = call

    def forward(self, x):
        return self.call(self, x)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda m, x: m.bn(y := m.conv(x)) + y, id="the convolution has a second reader"),
        pytest.param(lambda m, x: (y := m.conv(x), m.bn(y)), id="the convolution is an output"),
        pytest.param(lambda m, x: m.other(m.conv(m.bn(m.conv(x)))), id="the convolution is called twice"),
        pytest.param(lambda m, x: m.bn(m.conv(m.bn(x))), id="the norm is called twice"),
        pytest.param(lambda m, x: m.bn(m.conv(x).relu()), id="a functional operation stands between"),
        pytest.param(lambda m, x: m.bn(m.conv(x) + x), id="the norm reads a sum"),
        pytest.param(lambda m, x: m.conv(m.bn(x)), id="the norm stands before"),
    ],
)
def test_a_norm_that_is_not_the_only_reader_is_not_folded(call):
    model = Pair(call).eval()
    state = deepcopy(model.state_dict())
    fold_batch_norms(model, torch.zeros(1, 3, 2, 2))
    assert types_of(model) == ["Conv2d", "BatchNorm2d", "BatchNorm2d"]
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_a_norm_over_another_dimension_than_the_channels_is_not_folded():
    # BatchNorm1d on (N, L, C) normalises L; here L equals the layer's C
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    fold_batch_norms(model, torch.zeros(2, 4, 3))
    assert types_of(model) == ["Linear", "BatchNorm1d"]


def test_tied_weights_are_folded_in_one_place_only():
    model = nn.Sequential(nn.Linear(4, 4), lived_in(nn.BatchNorm1d(4)), nn.ReLU(), nn.Linear(4, 4)).eval()
    model[3].weight = model[0].weight
    x = torch.randn(2, 4)
    expected = model(x)
    torch.testing.assert_close(fold_batch_norms(model, x)(x), expected)


def test_a_norm_without_running_statistics_is_refused_and_nothing_changes():
    good = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    bad = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False))
    model = nn.Sequential(good, bad)
    with pytest.raises(DistillerError) as caught:
        fold_batch_norms(model, torch.randn(2, 4))
    assert str(caught.value) == (
        "1.1: cannot be folded into '1.0', it has no running statistics; "
        "make it with track_running_stats=True"
    )
    assert types_of(good) == ["Linear", "BatchNorm1d"]


def test_a_layer_with_a_computed_weight_is_refused():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4))
    with pytest.raises(
        DistillerError, match=r"^0: '1' cannot be folded into it, its weight or bias is computed"
    ):
        fold_batch_norms(model, torch.randn(2, 4))


class Fused(nn.Module):
    def __init__(self, parts) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x):
        return self.parts(x)


def test_the_fused_module_stands_under_all_names_of_the_first():
    model = Pair(lambda m, x: m.bn(m.conv(x)))
    model.alias = model.conv
    fuse_modules(model, [nn.Conv2d, nn.BatchNorm2d], Fused, torch.zeros(1, 3, 2, 2))
    assert isinstance(model.conv, Fused)
    assert model.alias is model.conv


def test_the_fused_module_stands_in_the_place_of_the_first_and_names_the_others():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).train()
    fuse_modules(model, [nn.Linear, (nn.BatchNorm1d, nn.LayerNorm), nn.ReLU], Fused, torch.zeros(2, 4))
    assert types_of(model) == ["Fused", "Identity", "Identity", "Linear"]
    assert model[0].fused_modules == ["1", "2"]
    assert model[1].training


def test_sequences_do_not_overlap():
    model = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU())
    fuse_modules(model, [nn.ReLU, nn.ReLU], Fused, torch.zeros(1))
    assert types_of(model) == ["Fused", "Identity", "ReLU"]


def test_what_the_function_refuses_stays():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    fuse_modules(model, [nn.Linear, nn.ReLU], lambda parts: None, torch.zeros(1, 4))
    assert types_of(model) == ["Linear", "ReLU"]


def test_neither_input_nor_adjacency_is_an_error():
    with pytest.raises(UsageError) as caught:
        fold_batch_norms(nn.Sequential(nn.ReLU()))
    assert str(caught.value) == "folding batch norms: neither dummy_input nor adjacency_map given; give one"
    with pytest.raises(ValueError, match=r"^fusing modules: neither dummy_input nor adjacency_map given"):
        fuse_modules(nn.ReLU(), [nn.ReLU, nn.ReLU], Fused)


def test_a_sequence_of_one_type_is_an_error():
    with pytest.raises(UsageError) as caught:
        fuse_modules(nn.ReLU(), [nn.ReLU], Fused, torch.zeros(1))
    assert str(caught.value) == "types_sequence: at least two module types wanted, got 1"


def test_a_model_that_cannot_be_traced_says_who_asked():
    model = Pair(lambda m, x: x if x.sum() > 0 else m.bn(m.conv(x)))
    with pytest.raises(
        GraphTraceError, match=r"^Pair: .* for folding batch norms: .*adjacency_map made by hand$"
    ):
        fold_batch_norms(model, torch.zeros(1, 3, 2, 2))
