from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distiller.packing.cursor import (
    Cursor,
    DamagedSectionError,
    pack_bits,
    signed_varint,
    unpack_bits,
    varint,
)


@given(st.integers(0, 2**62))
def test_a_whole_number_reads_back(value):
    cursor = Cursor(varint(value))
    assert cursor.varint(2**63) == value
    cursor.finish()


@given(st.integers(-(2**40), 2**40))
def test_a_number_with_a_sign_reads_back(value):
    assert Cursor(signed_varint(value)).signed(2**41) == value


def test_numbers_near_zero_take_one_byte():
    assert [signed_varint(value) for value in (0, -1, 1, -2)] == [b"\0", b"\1", b"\2", b"\3"]
    assert varint(300) == b"\xac\x02"


@given(st.integers(1, 32), st.data())
def test_numbers_of_so_many_bits_read_back(width, data):
    values = np.array(data.draw(st.lists(st.integers(0, 2**width - 1))), dtype=np.int64)
    packed = pack_bits(values, width)
    assert len(packed) == -(-width * values.size // 8)
    np.testing.assert_array_equal(unpack_bits(packed, width, values.size), values)


def test_the_first_number_is_in_the_highest_bits():
    assert pack_bits(np.array([5, 1, 0]), 3) == bytes([0b10100100, 0])


@pytest.mark.parametrize(
    "data, read, told",
    [
        (b"ab", lambda c: c.take(3), "asks for 3 bytes where 2 are left"),
        (b"", lambda c: c.byte(), "asks for 1 bytes where 0 are left"),
        (b"\x05", lambda c: c.varint(5), "has the number 5 where less than 5 is possible"),
        (b"\x80" * 11, lambda c: c.varint(5), "has a number without end"),
        (b"abc", lambda c: c.array("<u4", 2**60), "asks for 4611686018427387904 bytes where 3 are left"),
        (b"\0\0\1", lambda c: c.finish(), "has bytes left over after byte 0"),
    ],
)
def test_nothing_is_read_that_is_not_there(data, read, told):
    with pytest.raises(DamagedSectionError) as error:
        read(Cursor(data))
    assert str(error.value) == told


def test_zeros_may_be_left():
    Cursor(b"\0\0").finish()
