from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distiller.errors import DistillerError
from distiller.layerwise.stored_bytes import code_bits, gap_bytes, part_bytes, payload_bytes


@given(st.integers(1, 2**24))
def test_a_code_has_the_rounded_up_logarithm(levels):
    assert code_bits(levels) == math.ceil(math.log2(levels))


def test_no_level_is_refused():
    with pytest.raises(DistillerError) as error:
        code_bits(0)
    assert str(error.value) == "code_bits: at least one level is needed, got 0"


def gap_codes(kept: list[bool], width: int) -> list[int]:
    """The codes one after the other; the largest means so many left out and no value."""
    codes, left_out = [], 0
    for is_kept in kept:
        if not is_kept:
            left_out += 1
            continue
        while left_out >= 2**width - 1:
            codes.append(2**width - 1)
            left_out -= 2**width - 1
        codes.append(left_out)
        left_out = 0
    return codes


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 40))
def test_gaps_take_the_codes_that_an_encoder_writes(kept, before):
    kept = [False] * before + kept
    expected = min(-(-width * len(gap_codes(kept, width)) // 8) for width in range(1, 17))
    assert gap_bytes(torch.tensor(kept, dtype=torch.bool)) == expected


def test_pruned_weights_are_values_and_the_cheaper_of_bitmap_and_gaps():
    half = torch.zeros(8000)
    half[::2] = 1.0
    assert part_bytes(half, is_pruned=True) == 4 * 4000 + 1000
    few = torch.zeros(8000)
    few[::800] = 1.0
    assert part_bytes(few, is_pruned=True) == 4 * 10 + gap_bytes(few != 0)
    assert gap_bytes(few != 0) < 1000


def test_nothing_is_stored_larger_than_it_was():
    full = torch.ones(100)
    assert part_bytes(full, is_pruned=True) == 400
    assert part_bytes(full, levels=99, table_bytes=4 * 99) == 400
    assert part_bytes(full) == 400


@pytest.mark.parametrize("levels, expected", [(2, 13 + 8), (16, 50 + 8), (17, 63 + 8), (1, 8)])
def test_quantized_weights_are_codes_and_a_table(levels, expected):
    assert part_bytes(torch.ones(100), levels=levels, table_bytes=8) == expected


def test_pruned_and_quantized_weights_are_codes_of_those_that_are_left():
    part = torch.zeros(1000)
    part[:100] = 1.0
    positions = min(125, gap_bytes(part != 0))
    assert part_bytes(part, is_pruned=True, levels=16, table_bytes=64) == 50 + positions + 64


def test_zero_as_one_level_more_may_be_the_smallest():
    part = torch.ones(1000)
    part[::2] = 0.0  # positions: a bit for each element; with zero as a level: nothing for half of them
    assert part_bytes(part, is_pruned=True, levels=1, table_bytes=4) == min(0 + 125, 125) + 4


def test_half_precision_has_half_the_bytes():
    assert part_bytes(torch.ones(10, dtype=torch.float16)) == 20


@pytest.mark.parametrize(
    "techniques, fraction, expected",
    [
        (("prune",), 0.9, 200 * 4),
        (("svd",), 0.9, 3 * (20 + 100) * 4 - (20 + 100) * 4),  # rank 2 of 20
        (("svd",), 0.1, 20 * 100 * 4),  # rank 18, above 16.7
        (("quant",), 0.5, 2000 * 10 // 8),  # 999 levels
        (("kmeans",), 0.5, 2000 * 10 // 8),
        (("svd", "prune"), 0.9, (4 + 20) * 4),
        (("prune", "quant"), 0.5, 1000 * 9 // 8),  # 499 levels of 1000 values
        (("quant",), 0.0, 2000 * 4),
        (("svd", "prune", "kmeans"), 1.0, 0),
    ],
)
def test_payloads_are_the_shares_multiplied(techniques, fraction, expected):
    assert payload_bytes((20, 100), techniques, fraction) == expected


def test_a_convolution_is_a_matrix_of_its_filters():
    assert payload_bytes((20, 4, 5, 5), ("svd",), 0.9) == payload_bytes((20, 100), ("svd",), 0.9)


def test_counting_looks_at_the_zeros_there_are():
    part = torch.from_numpy(np.random.default_rng(0).normal(size=64).astype(np.float32))
    part[:32] = 0.0
    assert part_bytes(part, is_pruned=True) == 32 * 4 + gap_bytes(part != 0)
