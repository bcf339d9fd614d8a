import numpy as np
import pytest
import torch

from distiller.data_loggers.activation_channels import (
    activation_channels_apoz,
    activation_channels_l1,
    activation_channels_means,
)
from distiller.errors import UsageError

FUNCTIONS = {
    "activation_channels_l1": activation_channels_l1,
    "activation_channels_means": activation_channels_means,
    "activation_channels_apoz": activation_channels_apoz,
}
# Two images, two channels of 1 x 2.
FEATURE_MAPS = torch.tensor([[[[1.0, 0.0]], [[-2.0, 2.0]]], [[[0.0, 0.0]], [[3.0, 0.0]]]])


def test_the_l1_norm_of_a_channel_is_summed_over_positions_and_averaged_over_images():
    assert activation_channels_l1(FEATURE_MAPS).tolist() == [(1 + 0) / 2, (4 + 3) / 2]


def test_the_mean_of_a_channel_is_over_images_and_positions():
    assert activation_channels_means(FEATURE_MAPS).tolist() == [1 / 4, (-2 + 2 + 3 + 0) / 4]


def test_apoz_is_the_percentage_of_zeros():
    assert activation_channels_apoz(FEATURE_MAPS).tolist() == [75.0, 25.0]


def test_the_features_of_a_linear_layer_are_taken_together():
    features = torch.tensor([[1.0, -2.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]])
    assert activation_channels_l1(features).item() == 3.0
    assert activation_channels_means(features).item() == 0.25
    assert activation_channels_apoz(features).item() == 100 * 5 / 8


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 5, 6), (3, 4, 2, 3, 2)])
def test_channels_are_dimension_1_whatever_stands_behind_it(shape):
    activation = torch.randn(shape).relu()
    values = activation.numpy()
    rest = (0, *range(2, len(shape)))
    expected = {
        "activation_channels_l1": np.abs(values).sum(rest) / shape[0],
        "activation_channels_means": values.mean(rest),
        "activation_channels_apoz": 100 * (values == 0).mean(rest),
    }
    for name, function in FUNCTIONS.items():
        np.testing.assert_allclose(function(activation).numpy(), expected[name], rtol=1e-5)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_memory_layout_and_precision_do_not_matter(function):
    activation = torch.randn(2, 3, 4, 5).half()
    expected = function(activation.float())
    assert torch.equal(function(activation), expected)
    assert torch.allclose(
        function(activation.float().to(memory_format=torch.channels_last)), expected, rtol=1e-5
    )


def test_sums_do_not_leave_the_range_of_half_precision():
    assert activation_channels_l1(torch.full((1, 1, 100, 100), 60.0).half()).tolist() == [600_000.0]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(), (3,), (0, 3), (2, 0, 4)])
def test_what_is_no_activation_is_refused(name, shape):
    with pytest.raises(UsageError) as caught:
        FUNCTIONS[name](torch.zeros(shape))
    assert (
        str(caught.value) == f"{name}: needs (batch, channels, ...) or (batch, features), got shape {shape}"
    )


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_no_gradient_is_kept(function):
    assert not function(torch.ones(2, 2, 2, requires_grad=True)).requires_grad
