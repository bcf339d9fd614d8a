"""Weights of few values that are quantized alike, beside small quantizers written here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distiller.apputils.stored_weights import same_numbers, stored_weight


def rows_of(weight: Tensor, by_row: bool) -> Tensor:
    return weight.reshape(weight.shape[0] if by_row else 1, -1)


def over_its_range(weight: Tensor, by_row: bool, levels: int = 15) -> Tensor:
    own = rows_of(weight, by_row)
    scale = own.abs().amax(1, keepdim=True) * 2 / levels
    return (torch.round(own / scale) * scale).reshape(weight.shape)


def between_its_ends(weight: Tensor, by_row: bool) -> Tensor:
    own = rows_of(weight, by_row)
    low, high = own.aminmax(dim=1, keepdim=True)
    step = (high - low) / 7
    return (torch.round((own - low) / step) * step + low).reshape(weight.shape)


def its_signs(weight: Tensor, by_row: bool) -> Tensor:
    own = rows_of(weight, by_row)
    mean = own.abs().sum(1, keepdim=True) / (own != 0).sum(1, keepdim=True).clamp_min(1)
    return (own.sign() * mean).reshape(weight.shape)


def bent(weight: Tensor, by_row: bool) -> Tensor:
    own = torch.tanh(weight)
    return 2 * torch.round((own / (2 * own.abs().max()) + 0.5) * 7) / 7 - 1


QUANTIZERS = [over_its_range, between_its_ends, its_signs, bent]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(QUANTIZERS),
    st.booleans(),
    st.integers(1, 6),
    st.sampled_from([1, 2, 7, 100, 3001]),
    st.floats(1e-6, 1e3),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.integers(0, 2**31),
)
def test_a_weight_of_few_values_is_quantized_to_the_same(quantizer, by_row, rows, size, scale, pruned, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, size, generator=generator) * scale
    weight[torch.rand(rows, size, generator=generator) < pruned] = 0
    if not weight.any() and quantizer is not its_signs:
        return  # these divide by its range
    computed = quantizer(weight, by_row)
    if not computed.isfinite().all():
        return
    stored = stored_weight(weight, computed, lambda other: quantizer(other, by_row))
    if stored is None:
        assert quantizer is between_its_ends  # whose grid is on no multiples: rounding may differ
        return
    assert torch.equal(quantizer(stored, by_row), computed)
    for own, few in zip(rows_of(stored, by_row), rows_of(computed, by_row), strict=True):
        assert own.unique().numel() <= few.unique().numel() + 2


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("quantizer", QUANTIZERS[:1] + QUANTIZERS[2:])
def test_large_weights_have_one(quantizer, by_row):
    weight = torch.randn(40, 25_000, generator=torch.Generator().manual_seed(1))
    computed = quantizer(weight, by_row)
    stored = stored_weight(weight, computed, lambda other: quantizer(other, by_row))
    assert stored is not None
    assert torch.equal(quantizer(stored, by_row), computed)


def test_what_is_quantized_to_itself_is_stored_so():
    weight = torch.randn(5, 7)
    computed = torch.round(weight)
    assert torch.equal(stored_weight(weight, computed, torch.round), computed)  # type: ignore[arg-type]


def test_where_every_bit_counts_there_is_none():
    weight = torch.randn(3, 50)

    def summed(other: Tensor) -> Tensor:
        return torch.round(other) + other.sum()

    assert stored_weight(weight, summed(weight), summed) is None
    assert stored_weight(weight * torch.nan, torch.ones(3, 50), torch.zeros_like) is None


def test_numbers_are_the_same_where_nans_are():
    one = torch.tensor([1.0, torch.nan, -0.0])
    assert same_numbers(one, torch.tensor([1.0, torch.nan, 0.0]))
    assert not same_numbers(one, torch.tensor([1.0, 2.0, 0.0]))
