from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.packing.cursor import DamagedSectionError
from distiller.packing.huffman import LONGEST, canonical_codes, code_lengths, huffman_decode, huffman_encode

COUNTS = st.lists(st.integers(0, 1000), min_size=2, max_size=40).filter(lambda c: sum(n > 0 for n in c) > 1)


def total_bits_of_huffmans_tree(counts) -> int:
    """The sum of the merged weights: what the shortest code takes."""
    heap = [int(count) for count in counts if count]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


@given(COUNTS)
def test_lengths_are_those_of_the_shortest_code(counts):
    lengths = code_lengths(np.array(counts))
    assert int((lengths * np.array(counts)).sum()) == total_bits_of_huffmans_tree(counts)
    assert ((lengths > 0) == (np.array(counts) > 0)).all()


def test_no_code_is_longer_than_15_bits_however_rare_its_symbol():
    fibonacci = [1, 1]
    while len(fibonacci) < 30:
        fibonacci.append(sum(fibonacci[-2:]))
    lengths = code_lengths(np.array(fibonacci)).astype(int)
    assert lengths.max() == LONGEST
    assert sum(2.0**-length for length in lengths) == 1
    assert (np.diff(lengths) <= 0).all()  # the more frequent, the shorter


def test_4096_symbols_have_codes():
    lengths = code_lengths(np.arange(1, 4097))
    assert sum(2.0 ** -lengths.astype(float)) == 1


def test_codes_are_canonical():
    # The example of RFC 1951, section 3.2.2.
    codes = canonical_codes(np.array([3, 3, 3, 3, 3, 2, 4, 4], dtype=np.uint8))
    assert [format(code, "b") for code in codes] == ["10", "11", "100", "101", "110", "0", "1110", "1111"]


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [2, 2, 2], [0, 0], [15, 1]])
def test_lengths_of_no_complete_code_are_refused(lengths):
    with pytest.raises(
        DamagedSectionError, match="^has lengths of codes that leave some out, or are too many$"
    ):
        canonical_codes(np.array(lengths, dtype=np.uint8))


@settings(max_examples=40)
@given(COUNTS, st.integers(1, 20), st.integers(0, 2**32))
def test_a_text_reads_back_from_any_number_of_lanes(counts, lanes, seed):
    counts = np.array(counts)
    symbols = np.random.default_rng(seed).choice(counts.size, 300, p=counts / counts.sum()).astype(np.uint16)
    lengths = code_lengths(counts)
    lane_bits, data = huffman_encode(symbols, lengths, lanes)
    assert lane_bits.sum() == lengths[symbols].sum()
    np.testing.assert_array_equal(huffman_decode(data, lane_bits, lengths, symbols.size), symbols)


@pytest.mark.parametrize("lanes", [1, 9])
def test_a_text_that_is_not_one_ends_nowhere_else(lanes):
    lengths = np.array([1, 2, 2], dtype=np.uint8)
    symbols = np.array([0, 1, 2] * 30)
    lane_bits, data = huffman_encode(symbols, lengths, lanes)
    wrong = lane_bits.copy()
    wrong[0] -= 1
    for bits, count in ((wrong, 90), (lane_bits, 81), (lane_bits, 500)):
        with pytest.raises(
            DamagedSectionError, match="^has Huffman codes that do not end where they should$"
        ):
            huffman_decode(data, bits, lengths, count)
