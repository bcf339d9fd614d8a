import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distiller.errors import DistillerError
from distiller.interfaces import EpochWindow, StepContext
from distiller.masks import MaskStore
from distiller.pruning.n_to_m import NMPruner, n_to_m_mask, n_to_m_sparsity


def by_loops(weight: np.ndarray, n: int, m: int) -> np.ndarray:
    mask = np.ones(weight.shape)
    for out in range(weight.shape[0]):
        for position in np.ndindex(weight.shape[2:]):
            for start in range(0, weight.shape[1], m):
                group = [(out, i, *position) for i in range(start, min(start + m, weight.shape[1]))]
                ranked = sorted(group, key=lambda index: abs(weight[index]))  # stable: lower index first
                for index in ranked[: max(0, len(group) - n)]:
                    mask[index] = 0
    return mask


@given(
    shape=st.sampled_from([(3, 8), (2, 7), (2, 3), (2, 8, 2), (2, 6, 2, 3), (2, 1, 3, 3)]),
    ratio=st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2), (3, 3), (1, 1)]),
    seed=st.integers(0, 1000),
    is_tied=st.booleans(),
)
def test_the_n_largest_of_each_m_input_channels_stay(shape, ratio, seed, is_tied):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight = weight.round() if is_tied else weight
    assert np.array_equal(n_to_m_mask(weight, *ratio).numpy(), by_loops(weight.numpy(), *ratio))


def test_two_of_four_by_hand():
    weight = torch.tensor([[0.1, -0.9, 0.5, 0.2, 3.0, 3.0, -3.0, 3.0]])
    assert n_to_m_mask(weight).tolist() == [[0, 1, 1, 0, 0, 0, 1, 1]]


def test_of_an_incomplete_group_n_stay():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.3, 0.1, 0.2]])
    assert n_to_m_mask(weight).tolist() == [[0, 0, 1, 1, 1, 0, 1]]
    assert n_to_m_mask(weight[:, :6]).tolist() == [[0, 0, 1, 1, 1, 1]]


def test_a_depthwise_convolution_is_left_whole():
    assert bool((n_to_m_mask(nn.Conv2d(8, 8, 3, groups=8).weight) == 1).all())


def test_every_four_weights_of_a_row_have_two_zeros_as_sparse_tensor_cores_ask_for():
    mask = n_to_m_mask(torch.randn(32, 64))
    assert bool((mask.view(-1, 4).sum(1) == 2).all())


def test_a_bias_is_refused_by_name():
    model = nn.Linear(8, 4)
    ctx = StepContext(model, MaskStore(model), None, EpochWindow.spanning(0, 2), 0)
    with pytest.raises(DistillerError) as error:
        NMPruner("nm", "bias").compute_masks({"bias": model.bias.detach()}, ctx)
    assert str(error.value) == (
        "pruner 'nm', 'bias': N:M pruning wants a tensor of 2 dimensions or more, got shape (4,)"
    )


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (3, 4), (4, 4), (1, 7), (2, 64)])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 6, 8, 9])
def test_the_sparsity_told_is_that_of_the_mask(n, m, channels):
    mask = n_to_m_mask(torch.randn(3, channels, 2), n, m)
    assert n_to_m_sparsity(channels, n, m) == pytest.approx(float((mask == 0).float().mean()))


def test_a_layer_of_too_few_channels_is_not_promised_a_sparsity():
    model = nn.Sequential(nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5))
    ctx = StepContext(model, MaskStore(model), None, EpochWindow.spanning(0, 2), 0)
    pruner = NMPruner("nm", "*.weight")
    assert pruner.target_sparsity(ctx) == {"0.weight": 0.0, "1.weight": pytest.approx(1 / 3)}
    weights = {name: model.get_parameter(name) for name in ("0.weight", "1.weight")}
    assert pruner.too_small(weights, ctx) == ("0.weight",)


def test_the_target_is_that_of_whole_groups():
    model = nn.Linear(8, 4)
    ctx = StepContext(model, MaskStore(model), None, EpochWindow.spanning(0, 2), 0)
    assert NMPruner("nm", ["weight"], n=1).target_sparsity(ctx) == {"weight": 0.75}


@pytest.mark.parametrize(
    ("n", "m", "text"),
    [
        (0, 4, "n must be from 1 to m, which is 4, got 0"),
        (5, 4, "n must be from 1 to m, which is 4, got 5"),
        (2, -1, "m must be 1 or more, got -1"),
    ],
)
def test_the_ratio_is_checked(n, m, text):
    with pytest.raises(DistillerError) as error:
        NMPruner("nm", "weight", n, m)
    assert str(error.value) == text


def test_a_group_longer_than_the_channels_is_all_of_them_and_takes_no_memory_of_its_own():
    weight = torch.tensor([[0.1, -0.4, 0.3]])
    assert n_to_m_mask(weight, 2, 2**16).tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("m", [2**16 + 1, 10**9])
def test_a_group_that_no_layer_has_is_refused(m):
    with pytest.raises(DistillerError) as error:
        NMPruner("nm", "weight", 2, m)
    assert str(error.value) == f"m must be at most 65536, got {m}"
