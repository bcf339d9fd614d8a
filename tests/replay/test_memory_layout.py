from __future__ import annotations

import pytest
import torch

from distiller.replay.memory_layout import is_channels_last, to_channels_last


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (8, 4, 1, 1), (1, 1, 3, 3), (2, 3, 1, 5)])
def test_what_is_made_of_a_tensor_is_in_its_layout_however_few_channels_it_has(shape):
    value = torch.randn(shape)
    laid_out = to_channels_last(value)
    assert torch.equal(laid_out, value)
    _, channels, height, width = shape
    assert laid_out.stride() == (channels * height * width, 1, channels * width, channels)
    weight = to_channels_last(torch.randn(6, shape[1], 1, 1))
    assert torch.conv2d(laid_out, weight).is_contiguous(memory_format=torch.channels_last)


def test_what_is_laid_out_so_already_is_not_copied():
    value = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert to_channels_last(value) is value


def test_of_other_dimensions_nothing_is_laid_out_so():
    assert not is_channels_last(torch.randn(2, 3, 4))
    assert not is_channels_last(torch.randn(2, 3, 4, 5))
