"""Rows and matrices against the layers themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distiller.quantization.refinement.layer_rows import (
    as_matrices,
    as_weight,
    channel_dim,
    draw_positions,
    groups_of,
    input_rows,
    output_rows,
    positions_in,
)

LAYERS = {
    "1d, strided": (lambda: nn.Conv1d(4, 6, 3, padding=1, stride=2), (2, 4, 9)),
    "2d, same, dilated": (lambda: nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2), (2, 4, 7, 6)),
    "2d, grouped, reflecting": (
        lambda: nn.Conv2d(4, 8, 3, padding=(2, 1), stride=(2, 1), groups=2, padding_mode="reflect"),
        (2, 4, 7, 6),
    ),
    "2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (2, 4, 7, 6)),
    "3d": (lambda: nn.Conv3d(2, 3, 2, stride=2, padding=1), (2, 2, 5, 4, 3)),
    "1d transposed, grouped": (
        lambda: nn.ConvTranspose1d(4, 6, 4, stride=3, padding=1, output_padding=1, groups=2),
        (2, 4, 5),
    ),
    "2d transposed, dilated": (
        lambda: nn.ConvTranspose2d(
            4, 6, (3, 2), stride=(2, 3), padding=(1, 0), dilation=(2, 1), output_padding=(1, 2)
        ),
        (2, 4, 5, 4),
    ),
    "2d transposed, cropping": (lambda: nn.ConvTranspose2d(4, 4, 2, padding=2, groups=4), (2, 4, 7, 7)),
    "3d transposed": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 3, 4, 3)),
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "linear on sequences": (lambda: nn.Linear(5, 7), (3, 4, 2, 5)),
    "linear on one input": (lambda: nn.Linear(5, 7), (5,)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("wanted", [5, 1000])
@torch.no_grad()
def test_rows_times_matrices_are_the_layers_output(kind, wanted) -> None:
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    output = layer(x)
    inputs = 1 if len(shape) == 1 else shape[0]
    positions = draw_positions(inputs, positions_in(layer, output), wanted, torch.Generator().manual_seed(1))
    rows, matrices = input_rows(layer, x, positions), as_matrices(layer.weight, layer)
    bias = layer.bias.reshape(groups_of(layer), 1, -1)
    torch.testing.assert_close(
        rows @ matrices.transpose(1, 2) + bias, output_rows(layer, output, positions), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_matrices_become_the_weight_again(kind) -> None:
    layer = LAYERS[kind][0]()
    assert torch.equal(as_weight(as_matrices(layer.weight, layer), layer), layer.weight)


@pytest.mark.parametrize("kind", LAYERS)
def test_channels_are_where_the_bias_is_added(kind) -> None:
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    nn.init.zeros_(layer.weight)
    with torch.no_grad():
        channels_last = layer(x).movedim(channel_dim(layer), -1)
    assert torch.equal(channels_last, layer.bias.detach().expand_as(channels_last))


def test_positions_are_different_ones_of_each_input() -> None:
    positions = draw_positions(50, 9, 4, torch.Generator().manual_seed(0))
    assert positions.shape == (50, 4)
    assert all(len(set(row)) == 4 and max(row) < 9 for row in positions.tolist())
    assert len({tuple(sorted(row)) for row in positions.tolist()}) > 10


def test_all_positions_are_taken_where_no_more_are_wanted() -> None:
    assert draw_positions(2, 3, 8, torch.Generator()).tolist() == [[0, 1, 2], [0, 1, 2]]
