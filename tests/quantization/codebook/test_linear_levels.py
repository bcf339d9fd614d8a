"""Linear levels against numpy, and `quant(w, f)` as methods.md 2.2 says it, element by element."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.errors import QuantizationError
from distiller.quantization.codebook.linear_levels import (
    effective_bits,
    level_count,
    linear_levels,
    nearest_level,
    quantize_by_fraction,
)

finite = st.floats(-100, 100, width=32)


def haiku_levels(weight: np.ndarray, fraction: float) -> np.ndarray:
    """As in methods.md 2.2, with k = 1 corrected; where the weight is unchanged, its own values."""
    values = np.unique(weight.astype(np.float64))
    k = len(values) - round(fraction * len(values))
    if k >= len(values):
        return values
    return np.linspace(values[0], values[-1], k + 1)[1:-1] if k > 1 else values[[0, -1]].mean(keepdims=True)


@pytest.mark.parametrize("count", [1, 2, 3, 16, 255])
def test_levels_are_those_of_linspace(count):
    low, high = torch.tensor([-1.7, 0.0], dtype=torch.float64), torch.tensor([2.9, 1e-3], dtype=torch.float64)
    for found, lo, hi in zip(linear_levels(low, high, count), low, high, strict=True):
        expected = np.linspace(lo.item(), hi.item(), count) if count > 1 else [(lo.item() + hi.item()) / 2]
        assert found.numpy() == pytest.approx(np.array(expected), rel=1e-12)
    inner = linear_levels(low, high, count, is_interior=True)[0]
    assert inner.numpy() == pytest.approx(np.linspace(-1.7, 2.9, count + 2)[1:-1], rel=1e-12, abs=1e-12)


@given(low=finite, width=st.floats(0, 50, width=32), count=st.integers(2, 40))
def test_the_ends_are_exact(low, width, count):
    ends = torch.tensor(low), torch.tensor(low) + width
    levels = linear_levels(*ends, count)
    assert (levels[0], levels[-1]) == ends
    assert (levels.diff() >= 0).all()


def test_of_two_levels_equally_near_it_is_the_upper_one():
    levels = torch.tensor([0.0, 1.0, 2.0])
    assert nearest_level(torch.tensor([-9.0, 0.25, 0.5, 1.0, 1.5, 9.0]), levels).tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(st.integers(-20, 20).map(lambda x: x / 4), min_size=1, max_size=30),
    fraction=st.sampled_from([-0.5, 0.0, 0.1, 0.3, 0.5, 0.75, 0.9, 1.0, 1.5]),
)
def test_quant_by_fraction_is_the_nearest_of_haikus_levels(values, fraction):
    weight = np.array(values)
    found = quantize_by_fraction(torch.from_numpy(weight), fraction).numpy()
    levels = haiku_levels(weight, fraction)
    assert np.abs(found[:, None] - levels).min(1) == pytest.approx(0, abs=1e-12)
    assert np.abs(found - weight) == pytest.approx(np.abs(weight[:, None] - levels).min(1), abs=1e-12)


def test_quant_by_fraction_gives_ties_to_the_upper_level():
    weight = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 6.0])  # f = 0.5: k = 3, levels 2 and 4
    assert quantize_by_fraction(weight, 0.5).tolist() == [2.0, 2.0, 2.0, 4.0, 4.0, 4.0]


def test_quant_by_fraction_drops_both_ends():
    weight = torch.arange(9.0)  # f = 0.5: k = 9 - round(4.5) = 5, the ends dropped leave 4
    found = quantize_by_fraction(weight, 0.5)
    assert found.unique().tolist() == pytest.approx([1.6, 3.2, 4.8, 6.4])


def test_one_level_is_the_middle_where_the_original_has_none():
    """A defect of nn-compress-haiku: with k = 1 its list of levels is empty."""
    weight = torch.tensor([0.0, 1.0, 2.0, 5.0])
    assert level_count(4, 0.75) == 1
    for fraction in (0.75, 1.0, 2.0):
        assert quantize_by_fraction(weight, fraction).tolist() == [2.5] * 4


def test_share_of_distinct_values_leaves_many_bits():
    """The reason why its axis never reaches 8 bits (methods.md, section 0, row 9)."""
    assert level_count(2_000_000, 0.9) == 200_000
    assert effective_bits(level_count(2_000_000, 0.9)) == pytest.approx(17.6, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float64])
def test_types_and_formats_are_kept(dtype):
    weight = torch.randn(4, 3, 3, 3).to(dtype, memory_format=torch.channels_last)
    found = quantize_by_fraction(weight, 0.9)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_what_cannot_be_quantized_is_refused():
    for weight in (torch.tensor([1.0, float("nan")]), torch.empty(0)):
        with pytest.raises(QuantizationError, match="must hold numbers, all of them finite"):
            quantize_by_fraction(weight, 0.5)
    with pytest.raises(QuantizationError) as refused:
        quantize_by_fraction(torch.ones(3), float("inf"))
    assert (
        str(refused.value) == "level_count: fraction must be a share of the distinct values, 0 to 1, got inf"
    )
