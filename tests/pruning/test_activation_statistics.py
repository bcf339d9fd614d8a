import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distiller.pruning.activation_statistics import (
    RunningMean,
    observe,
    sums_per_channel,
    zeros_per_channel,
)


@pytest.mark.parametrize(
    ("shape", "channel_dim"), [((4, 3, 5, 2), -3), ((4, 3, 5), -2), ((4, 7, 3), -1), ((4, 3), -1)]
)
def test_channels_are_counted_and_summed_by_themselves(shape, channel_dim):
    activations = torch.relu(torch.randn(shape))
    by_hand = np.moveaxis(activations.numpy(), channel_dim, 0).reshape(3, -1)
    zeros = zeros_per_channel(activations, channel_dim)
    assert zeros.tolist() == (by_hand == 0).sum(axis=1).tolist()
    assert zeros.dtype == torch.int64
    sums = sums_per_channel(activations, channel_dim)
    np.testing.assert_allclose(sums.numpy(), by_hand.astype(np.float64).sum(axis=1), rtol=1e-12)


def test_half_precision_is_summed_in_double():
    assert sums_per_channel(torch.full((4096, 1), 1.0, dtype=torch.float16), -1).item() == 4096
    assert sums_per_channel(torch.full((70000, 1), 1.0, dtype=torch.float16), -1).item() == 70000


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_the_mean_does_not_depend_on_how_values_are_split(sizes):
    values = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(1)).double()
    mean = RunningMean()
    for part in values.split(sizes):
        mean.add(part.sum(0), len(part))
    np.testing.assert_allclose(mean.mean().numpy(), values.numpy().mean(axis=0), rtol=1e-9, atol=1e-12)


def test_counts_stay_exact_past_what_single_precision_holds():
    mean = RunningMean()
    mean.add(torch.tensor([2**24]), 2**25)
    mean.add(torch.tensor([1]), 1)
    assert mean.mean().item() == (2**24 + 1) / (2**25 + 1)


def test_each_device_has_its_own_sum():
    """The copies of a DataParallel add at the same time; a sum that was saved on a GPU may be taken up elsewhere."""
    mean = RunningMean()
    mean.add(torch.tensor([1.0]), 1)
    state = mean.state_dict()
    loaded = RunningMean.from_state({"cuda:0": state["cpu"]})
    loaded.add(torch.tensor([4.0]), 2)
    assert loaded.mean().tolist() == [5 / 3]
    assert sorted(loaded.state_dict()) == ["cpu", "cuda:0"]


def test_a_mean_that_is_taken_up_goes_on_bit_by_bit():
    parts = torch.randn(6, 4, dtype=torch.float64)
    whole, first = RunningMean(), RunningMean()
    for part in parts:
        whole.add(part, 5)
    for part in parts[:3]:
        first.add(part, 5)
    state = first.state_dict()
    resumed = RunningMean.from_state(state)
    for part in parts[3:]:
        first.add(part * 7, 1)  # the state is not changed by what comes after it
        resumed.add(part, 5)
    assert torch.equal(resumed.mean(), whole.mean())


@pytest.mark.parametrize("of_input", [False, True])
def test_only_training_is_looked_at_and_without_gradients(of_input):
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True))
    seen: list[torch.Tensor] = []
    handle = observe(model, model, model[0], of_input, seen.append)
    inputs = torch.randn(3, 2)
    model.eval()
    model(inputs)
    assert seen == []
    model.train()
    model(inputs)
    (value,) = seen
    assert not value.requires_grad
    if of_input:
        assert torch.equal(value, inputs)
    handle.remove()
    model(inputs)
    assert len(seen) == 1


def test_a_batch_norm_that_is_frozen_by_itself_is_looked_at():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    seen: list[torch.Tensor] = []
    observe(model, model, model[1], False, seen.append)
    model.train()
    model[1].eval()
    model(torch.randn(1, 1, 2, 2))
    assert len(seen) == 1


def test_a_wrapped_model_is_looked_into():
    inner = nn.Sequential(nn.Linear(2, 2))
    model = nn.DataParallel(inner)
    seen: list[torch.Tensor] = []
    observe(model, model, inner[0], False, seen.append)
    model.train()(torch.randn(1, 2))
    model.eval()(torch.randn(1, 2))
    assert len(seen) == 1
