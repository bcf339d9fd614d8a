from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.packing.cursor import Cursor, DamagedSectionError
from distiller.packing.symbols import lanes_of, read_symbols, symbol_form, write_symbols
from tests.packing import slow_reader

CONSTANT, PLAIN, HUFFMAN, RANS = range(4)


def drawn(alphabet: int, count: int, spread: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.choice(alphabet, count, p=rng.dirichlet(np.full(alphabet, spread))).astype(np.uint16)


@settings(max_examples=60)
@given(st.integers(1, 300), st.integers(0, 3000), st.sampled_from([0.01, 0.1, 1, 100]), st.integers(0, 2**32))
def test_symbols_read_back(alphabet, count, spread, seed):
    symbols = drawn(alphabet, count, spread, seed)
    data = write_symbols(symbols, alphabet)
    cursor = Cursor(data)
    np.testing.assert_array_equal(read_symbols(cursor, alphabet, count), symbols)
    assert cursor.place == len(data)
    assert slow_reader.symbols(slow_reader.Bytes(data), alphabet, count) == symbols.tolist()


@pytest.mark.parametrize(
    "alphabet, count, spread, form",
    [
        (1, 100, 1, CONSTANT),
        (16, 40, 100, PLAIN),
        (256, 5000, 0.3, HUFFMAN),
        (3, 33_000, 1, RANS),
        (256, 33_000, 0.1, RANS),
        (3000, 33_000, 1, HUFFMAN),
    ],
)
def test_the_smallest_form_is_taken_and_many_lanes_read_back(alphabet, count, spread, form):
    symbols = drawn(alphabet, count, spread, 3)
    data = write_symbols(symbols, alphabet)
    assert data[0] == form
    found = symbol_form(np.bincount(symbols, minlength=alphabet))
    assert found.kind == form
    assert abs(found.size - len(data)) <= 2 + 0.005 * len(data)
    np.testing.assert_array_equal(read_symbols(Cursor(data), alphabet, count), symbols)
    assert slow_reader.symbols(slow_reader.Bytes(data), alphabet, count) == symbols.tolist()


def test_lanes_are_as_documented():
    assert [lanes_of(count) for count in (0, 8191, 8192, 10**9)] == [1, 1, 2, 16384]


@pytest.mark.parametrize(
    "data, alphabet, told",
    [
        (b"\4", 5, "has symbols in the unknown form 4"),
        (b"\0\7", 5, "has the number 7 where less than 5 is possible"),
        (b"\1\xff\xff", 5, "has the symbol 7 of 5"),
        (b"\2\3\4", 5, "has the number 4 where less than 3 is possible"),
        (b"\3\0\2\0", 5, "has frequencies of 0 bits"),
        (b"\3\0\2\x10", 5, "has frequencies of 16 bits"),
        (b"\3\0\2\x08\x11", 5, "has frequencies of a wrong sum"),
        (b"\2\0\2\x11\xff\xff\xff\xff\x0f", 5, "asks for 536870912 bytes where 0 are left"),
    ],
)
def test_what_no_packing_writes_is_refused(data, alphabet, told):
    with pytest.raises(DamagedSectionError) as error:
        read_symbols(Cursor(data), alphabet, 5)
    assert str(error.value) == told


@settings(max_examples=100)
@given(st.binary(max_size=60), st.integers(1, 300), st.integers(0, 2000))
def test_any_bytes_give_symbols_or_an_error(data, alphabet, count):
    try:
        found = read_symbols(Cursor(data), alphabet, count)
    except DamagedSectionError:
        return
    assert found.shape == (count,)
    assert not count or 0 <= int(found.min()) <= int(found.max()) < alphabet
