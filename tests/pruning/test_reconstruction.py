from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from distiller.pruning.reconstruction import gram_matrix, input_samples, reconstructed_weights


def error(samples: torch.Tensor, weights: torch.Tensor, new: torch.Tensor) -> float:
    return float((samples.double() @ (new - weights).double().T).square().sum())


def kept_columns(columns: int, pruned: list[int]) -> torch.Tensor:
    is_kept = torch.ones(columns, dtype=torch.bool)
    is_kept[pruned] = False
    return is_kept


def test_the_weights_are_those_of_numpys_least_squares():
    samples, weights = torch.randn(200, 9, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    samples[:, 3] += samples[:, 1] - samples[:, 7]  # inputs that tell of each other
    is_kept = kept_columns(9, [3, 4])
    found = reconstructed_weights(weights, gram_matrix(samples), is_kept)
    outputs = samples.numpy() @ weights.numpy().T
    expected = np.linalg.lstsq(samples.numpy()[:, is_kept], outputs, rcond=None)[0].T
    np.testing.assert_allclose(found[:, is_kept].numpy(), expected, rtol=1e-9)
    assert not found[:, ~is_kept].any()


def test_with_nothing_pruned_the_weights_stay():
    weights = torch.randn(4, 9)
    found = reconstructed_weights(weights, gram_matrix(torch.randn(5, 9)), kept_columns(9, []))
    assert torch.equal(found, weights)


def test_with_everything_pruned_nothing_is_left():
    found = reconstructed_weights(torch.ones(2, 3), torch.eye(3).double(), kept_columns(3, [0, 1, 2]))
    assert not found.any()


def test_columns_that_are_zero_already_change_nothing():
    weights = torch.randn(4, 6)
    weights[:, 2] = 0
    found = reconstructed_weights(weights, gram_matrix(torch.randn(50, 6)), kept_columns(6, [2]))
    assert torch.equal(found, weights)


def test_a_column_that_others_make_up_for_is_lost_without_error():
    samples = torch.randn(100, 5, dtype=torch.float64)
    samples[:, 0] = 2 * samples[:, 1] - samples[:, 4]
    weights = torch.randn(3, 5, dtype=torch.float64)
    found = reconstructed_weights(weights, gram_matrix(samples), kept_columns(5, [0]))
    assert error(samples, weights, found) < 1e-20


def test_where_the_data_tell_nothing_the_weights_stay():
    samples = torch.randn(50, 4, dtype=torch.float64)
    samples[:, 1] = 0  # an input that is never there
    weights = torch.randn(3, 4, dtype=torch.float64)
    found = reconstructed_weights(weights, gram_matrix(samples), kept_columns(4, [0]))
    torch.testing.assert_close(found[:, 1], weights[:, 1])


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(2, 12),
    st.integers(0, 12),
    st.integers(0, 10_000),
    st.sampled_from([0, -3, -7]),
)
def test_the_error_is_never_above_that_of_leaving_the_columns_out(rows, columns, rank, seed, decades):
    """Also with fewer samples than columns, inputs that depend on each other, and scales far apart."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(rows, columns, generator=generator)
    if rank:
        samples = samples[:, :1] * torch.randn(1, columns, generator=generator) if rank == 1 else samples
        samples[:, -1] = samples[:, 0]
    samples = samples * torch.logspace(0, decades, columns)
    weights = torch.randn(3, columns, generator=generator)
    is_kept = torch.rand(columns, generator=generator) < 0.6
    found = reconstructed_weights(weights, gram_matrix(samples), is_kept)
    plain = error(samples, weights, weights * is_kept)
    size = float((samples.double() @ weights.double().T).square().sum())
    assert found.isfinite().all()
    assert error(samples, weights, found) <= plain * (1 + 1e-5) + 1e-10 * size


LAYERS = [
    nn.Conv2d(3, 5, 3),
    nn.Conv2d(3, 5, 3, padding=1),
    nn.Conv2d(3, 5, 3, stride=2, padding=1),
    nn.Conv2d(3, 5, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
    nn.Conv2d(3, 5, 3, padding="same", dilation=2),
    nn.Conv2d(3, 5, 2, padding="valid"),
    nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
    nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(3, 5, 1),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_all_positions_of_a_convolution_are_what_it_multiplies(layer):
    images = torch.randn(2, 3, 7, 8)
    samples = input_samples(layer, images, 1000, torch.Generator())
    outputs = samples @ layer.weight.flatten(1).T + layer.bias
    expected = layer(images).movedim(1, 3).flatten(0, 2)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


def test_all_positions_are_those_of_unfold():
    layer = nn.Conv2d(3, 5, 3, stride=2, padding=1)
    images = torch.randn(2, 3, 7, 8)
    expected = F.unfold(images, 3, padding=1, stride=2).movedim(1, 2).flatten(0, 1)
    assert torch.equal(input_samples(layer, images, 1000, torch.Generator()), expected)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_drawn_positions_are_of_the_image_they_belong_to(layer):
    images = torch.randn(3, 3, 9, 9)
    before = torch.get_rng_state()
    samples = input_samples(layer, images, 4, torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert samples.shape == (12, layer.weight[0].numel())
    outputs = (samples @ layer.weight.flatten(1).T + layer.bias).view(3, 4, 5)
    expected = layer(images).flatten(2).movedim(1, 2)  # (images, positions, 5)
    for of_image, possible in zip(outputs, expected, strict=True):
        distances = (of_image.unsqueeze(1) - possible.unsqueeze(0)).abs().amax(2)  # (4, positions)
        assert (distances.amin(1) < 1e-4).all()


def test_positions_are_spread_over_the_image():
    layer = nn.Conv2d(1, 1, 1)
    image = torch.arange(20.0).view(1, 1, 4, 5)
    drawn = input_samples(layer, image, 10, torch.Generator().manual_seed(0)).flatten()
    generator = torch.Generator().manual_seed(1)
    seen = torch.cat([input_samples(layer, image, 10, generator) for _ in range(50)]).unique()
    assert len(drawn) == 10
    assert seen.tolist() == list(range(20))


def test_how_images_are_split_into_mini_batches_does_not_matter():
    layer, images = nn.Conv2d(3, 5, 3), torch.randn(8, 3, 9, 9)
    together = input_samples(layer, images, 10, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    apart = torch.cat([input_samples(layer, part, 10, generator) for part in images.split([1, 5, 2])])
    assert torch.equal(apart, together)


def test_a_linear_layer_reads_all_rows():
    samples = input_samples(nn.Linear(3, 2), torch.arange(24.0).view(2, 4, 3), 1, torch.Generator())
    assert torch.equal(samples, torch.arange(24.0).view(8, 3))


def test_an_image_without_a_batch_is_one():
    image = torch.randn(3, 5, 5)
    layer = nn.Conv2d(3, 2, 3)
    alone = input_samples(layer, image, 100, torch.Generator())
    assert torch.equal(alone, input_samples(layer, image.unsqueeze(0), 100, torch.Generator()))
