"""Layers in another floating-point type than what is around them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from distiller.quantization.ptq_precision import PRECISIONS, FPWrapper, converted

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("name", list(PRECISIONS))
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 3, 3),
        nn.ConvTranspose2d(4, 3, 3, groups=1),
        nn.Linear(6, 5),
        nn.BatchNorm2d(4),
        nn.Softmax(dim=1),
        nn.MaxPool2d(2),
    ],
)
def test_computes_in_the_type_and_returns_that_of_its_input(layer, name) -> None:
    wrapper, dtype = FPWrapper(copy.deepcopy(layer).eval(), name), PRECISIONS[name]
    with torch.no_grad():
        expected = copy.deepcopy(layer).eval().to(dtype)(X.to(dtype))
        assert torch.equal(wrapper(X), expected.float())
        assert wrapper(X.double()).dtype is torch.float64
    assert {tensor.dtype for tensor in wrapper.state_dict().values() if tensor.is_floating_point()} <= {dtype}


def test_an_embedding_returns_the_type_that_it_had() -> None:
    layer = nn.Embedding(5, 3).double()
    weight = layer.weight.detach().clone()
    wrapper = FPWrapper(layer, 16)
    with torch.no_grad():
        output = wrapper(torch.tensor([1, 4]))
    assert torch.equal(output, weight.half().double()[[1, 4]])


def test_tensors_nested_in_arguments_and_results_are_converted() -> None:
    lstm = nn.LSTM(6, 4).eval()
    state = torch.zeros(1, 2, 4), torch.ones(1, 2, 4)
    x = torch.randn(3, 2, 6)
    wrapper = FPWrapper(copy.deepcopy(lstm), 64)
    with torch.no_grad():
        output, (h, c) = wrapper(x, state)
        expected = lstm(x, state)[0]
    assert {each.dtype for each in (output, h, c)} == {torch.float32}
    torch.testing.assert_close(output, expected)


def test_arguments_that_are_no_real_numbers_pass() -> None:
    class Pick(nn.Module):
        def forward(self, x: Any, index: Any, scale: float = 1.0, other: Any = None) -> Any:
            assert (x.dtype, index.dtype, scale, other["y"].dtype) == (
                torch.float64,
                torch.int64,
                2.0,
                torch.float64,
            )
            return {"picked": x[index], "index": index}

    found = FPWrapper(Pick(), 64)(torch.ones(3), torch.tensor(1), scale=2.0, other={"y": torch.ones(1)})
    assert (found["picked"].dtype, found["index"].dtype) == (torch.float32, torch.int64)


def test_parameters_that_others_share_stay_what_they_are() -> None:
    encoder, decoder = nn.Embedding(5, 3), nn.Linear(3, 5)
    decoder.weight = encoder.weight
    converted(encoder, torch.float16)
    assert encoder.weight.dtype is torch.float16
    assert decoder.weight.dtype is torch.float32


def test_buffers_are_converted_and_integers_are_not() -> None:
    norm = converted(nn.BatchNorm1d(3), torch.bfloat16)
    kinds = {name: value.dtype for name, value in norm.state_dict().items()}
    assert kinds.pop("num_batches_tracked") is torch.int64
    assert set(kinds.values()) == {torch.bfloat16}


def test_shows_its_type() -> None:
    assert repr(FPWrapper(nn.ReLU(), "bf16")) == "FPWrapper(\n  bfloat16\n  (wrapped_module): ReLU()\n)"
