from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.packing.cursor import DamagedSectionError
from distiller.packing.rans import frequencies, rans_decode, rans_encode

COUNTS = st.lists(st.integers(0, 10**6), min_size=2, max_size=60).filter(lambda c: sum(n > 0 for n in c) > 1)


@given(COUNTS, st.integers(6, 15))
def test_frequencies_have_the_sum_and_leave_no_symbol_out(counts, precision):
    freqs = frequencies(np.array(counts), precision)
    assert freqs.sum() == 2**precision
    assert ((freqs > 0) == (np.array(counts) > 0)).all()


def test_as_many_symbols_as_frequencies():
    assert frequencies(np.array([1000, 1, 1, 1]), 2).tolist() == [1, 1, 1, 1]


@settings(max_examples=40)
@given(COUNTS, st.integers(6, 15), st.integers(1, 20), st.integers(0, 2**32))
def test_a_text_reads_back_from_any_number_of_lanes(counts, precision, lanes, seed):
    counts = np.array(counts)
    symbols = np.random.default_rng(seed).choice(counts.size, 300, p=counts / counts.sum()).astype(np.uint16)
    freqs = frequencies(counts, precision)
    states, words = rans_encode(symbols, freqs, precision, lanes)
    assert states.shape == (lanes,)
    np.testing.assert_array_equal(rans_decode(states, words, freqs, precision, symbols.size), symbols)


def test_a_symbol_costs_the_logarithm_of_its_frequency():
    rng = np.random.default_rng(0)
    share = np.array([0.9, 0.06, 0.03, 0.01])
    symbols = rng.choice(4, 100_000, p=share)
    counts = np.bincount(symbols)
    entropy = -(counts * np.log2(counts / counts.sum())).sum()  # 0.59 bits a symbol; of Huffman 1.14
    states, words = rans_encode(symbols, frequencies(counts, 12), 12, 8)
    assert entropy <= 16 * words.size + 32 * states.size <= 1.005 * entropy + 32 * 8


@pytest.mark.parametrize("lanes", [1, 9])
def test_what_is_no_text_is_refused(lanes):
    symbols = np.array([0, 1, 2, 1] * 200)
    freqs = np.array([64, 128, 64])
    states, words = rans_encode(symbols, freqs, 8, lanes)
    for broken, told in (
        ((states, words[:-1], 800), "has too few words"),
        ((states, np.append(words, words[:1]), 800), "has words or states that do not end where they should"),
        ((states, words, 700), "has words or states that do not end where they should"),
        ((np.where(np.arange(lanes) == 0, 9, states), words, 800), "has a state that is too small"),
    ):
        with pytest.raises(DamagedSectionError, match=f"^{told}$"):
            rans_decode(broken[0], broken[1], freqs, 8, broken[2])
