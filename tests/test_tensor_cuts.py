from __future__ import annotations

import pytest
import torch
from torch import nn

from distiller.tensor_cuts import cut, cut_shape, replace_data


def test_what_stays_is_selected_along_each_dimension():
    tensor = torch.arange(24).view(2, 3, 4)
    assert torch.equal(cut(tensor, {1: (0, 2), 2: (3,)}), tensor[:, [0, 2]][:, :, [3]])
    assert cut_shape(tensor.shape, {1: (0, 2), 2: (3,)}) == (2, 2, 1)


def test_what_stays_is_a_copy_of_the_same_memory_format():
    tensor = torch.randn(2, 6, 3, 3).to(memory_format=torch.channels_last)
    smaller = cut(tensor, {1: (0, 2, 5)})
    assert smaller.is_contiguous(memory_format=torch.channels_last)
    assert cut(tensor, {}).shape == tensor.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_parameter_takes_gradients_of_its_new_shape_while_an_old_graph_is_alive(dtype):
    """PyTorch: 'returned an invalid gradient ... expected shape compatible with' the shape of before."""
    layer = nn.Linear(8, 3).to(dtype)
    loss = layer(torch.randn(2, 8, dtype=dtype)).sum()
    loss.backward()
    weight = layer.weight
    replace_data(weight, cut(weight, {1: (0, 1, 4)}))
    assert weight.grad is None
    assert layer.weight is weight
    layer(torch.randn(2, 3, dtype=dtype)).sum().backward()
    assert weight.grad is not None
    assert (weight.grad.shape, weight.dtype) == ((3, 3), dtype)
    assert loss.grad_fn is not None  # the old graph
