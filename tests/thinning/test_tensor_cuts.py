"""What stays of a tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distiller.tensor_cuts import cut, cut_shape


@given(st.data())
def test_a_cut_is_what_numpy_takes_of_each_dimension(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    kept = {
        dim: sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
        for dim, size in enumerate(shape)
        if data.draw(st.booleans())
    }
    tensor = torch.arange(int(np.prod(shape))).reshape(shape)
    indices = np.ix_(*[kept.get(dim, range(size)) for dim, size in enumerate(shape)])
    assert np.array_equal(cut(tensor, kept).numpy(), tensor.numpy()[indices])
    assert cut_shape(shape, kept) == tuple(len(part.flat) for part in indices)


def test_a_cut_has_memory_and_gradients_of_its_own():
    param = nn.Parameter(torch.ones(3, 2))
    for kept in ({0: (0, 2)}, {0: (0, 1, 2)}):
        smaller = cut(param, kept)
        assert not smaller.requires_grad
        smaller.zero_()
        assert param.eq(1).all()


@pytest.mark.parametrize(
    "shape, memory_format", [((4, 4, 3, 3), torch.channels_last), ((4, 4, 3, 3, 3), torch.channels_last_3d)]
)
def test_a_cut_lies_in_memory_as_the_tensor_did(shape, memory_format):
    tensor = torch.randn(shape).to(memory_format=memory_format)
    assert cut(tensor, {0: (1, 2), 1: (0, 1, 3)}).is_contiguous(memory_format=memory_format)
    assert cut(tensor.contiguous(), {0: (1, 2)}).is_contiguous()


def test_a_cut_keeps_type_and_numbers_of_no_dimension():
    assert cut(torch.tensor(3), {}).item() == 3
    assert cut(torch.ones(4, dtype=torch.bool), {0: (1,)}).dtype == torch.bool
