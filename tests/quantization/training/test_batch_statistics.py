from __future__ import annotations

import pytest
import torch
from torch import nn

from distiller.quantization.training.batch_statistics import (
    channel_statistics,
    per_channel,
    update_running_statistics,
)


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (4, 3, 5, 2), (2, 3, 2, 2, 2)])
def test_statistics_are_those_of_var_mean(shape):
    x = torch.randn(shape, dtype=torch.float64) * 3 + 5
    mean, variance = channel_statistics(x)
    expected, expected_mean = torch.var_mean(x, dim=[0, *range(2, x.dim())], correction=0)
    assert torch.allclose(mean, expected_mean)
    assert torch.allclose(variance, expected)


def test_gradients_pass_gradcheck():
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(channel_statistics, (x,))


def test_half_precision_is_averaged_in_single():
    x = torch.full((64, 1, 64), 0.1, dtype=torch.bfloat16)
    mean, _ = channel_statistics(x)
    assert mean.dtype is torch.float32
    assert mean.item() == pytest.approx(x[0, 0, 0].item(), rel=1e-3)


def test_values_per_channel_stand_along_dimension_one():
    assert per_channel(torch.arange(3.0), torch.zeros(2, 3, 4, 4)).shape == (1, 3, 1, 1)
    assert per_channel(torch.arange(3.0), torch.zeros(2, 3)).shape == (1, 3)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_updated_as_a_batch_norm_does(momentum):
    ours, theirs = nn.BatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    for seed in range(3):
        x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) + seed
        theirs(x)
        mean, variance = channel_statistics(x)
        update_running_statistics(ours, mean, variance * (100 / 99))
    assert torch.allclose(ours.running_mean, theirs.running_mean, atol=1e-6)
    assert torch.allclose(ours.running_var, theirs.running_var, atol=1e-6)
    assert torch.equal(ours.num_batches_tracked, theirs.num_batches_tracked)
