"""Which batch norm is behind a layer; the rest of `distiller/graph.py` is tested in `test_graph.py`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distiller.graph import SummaryGraph, batch_norm_behind
from tests.test_graph import Calls


def norm_behind(call, input_shape: tuple[int, ...], passed=(), **submodules: nn.Module) -> str | None:
    """The name of the batch norm behind the module `layer`."""
    graph = SummaryGraph(Calls(call, **submodules), torch.zeros(input_shape))
    found = batch_norm_behind(graph, graph.ops["layer"], passed)
    return None if found is None else found.name


@pytest.mark.parametrize(
    ("layer", "norm", "input_shape", "found"),
    [
        (nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), (1, 2, 5, 5), "norm"),
        (nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), (1, 2, 5), "norm"),
        (nn.Linear(4, 3), nn.BatchNorm1d(3), (2, 4), "norm"),
        (nn.Linear(4, 3), nn.BatchNorm1d(3), (2, 3, 4), None),  # the norm is over the sequence
        (nn.ConvTranspose2d(3, 3, 3), nn.BatchNorm2d(3), (1, 3, 5, 5), None),  # filters are inputs
        (nn.ReLU(), nn.BatchNorm1d(3), (2, 3), None),
        (nn.Conv2d(2, 3, 3), nn.Identity(), (1, 2, 5, 5), None),
    ],
)
def test_a_batch_norm_over_the_channels_of_a_layer_is_behind_it(layer, norm, input_shape, found):
    assert norm_behind(lambda m, x: m.norm(m.layer(x)), input_shape, layer=layer, norm=norm) == found


@pytest.mark.parametrize(
    ("call", "passed", "found"),
    [
        (lambda m, x: m.norm(F.dropout(m.layer(x))), (), "norm"),
        (lambda m, x: m.norm(torch.relu(m.layer(x))), (), None),
        (lambda m, x: m.norm(torch.relu(m.layer(x))), ("Relu",), "norm"),
        (lambda m, x: F.max_pool2d(torch.relu(m.layer(x)), 2), ("Relu", "MaxPool"), None),
        (lambda m, x: (m.norm(m.layer(x)), x), (), "norm"),
        (lambda m, x: [m.norm(y) + y for y in [m.layer(x)]], (), None),
        (lambda m, x: [(m.norm(y), y) for y in [m.layer(x)]], (), None),
        (lambda m, x: [(m.norm(y), y) for y in [torch.relu(m.layer(x))]], ("Relu",), None),
        (lambda m, x: m.norm(m.layer(x).transpose(1, 3)[:, :3]), ("Transpose",), None),
        (
            lambda m, x: F.batch_norm(m.layer(x), m.norm.running_mean, m.norm.running_var),
            (),
            "BatchNormalization",
        ),
    ],
)
def test_a_batch_norm_is_behind_a_layer_only_if_nothing_else_reads_it(call, passed, found):
    layer, norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)
    assert norm_behind(call, (1, 2, 4, 5), passed, layer=layer, norm=norm) == found
