"""Packed codes against a big integer, and sizes against arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distiller.errors import QuantizationError
from distiller.quantization.codebook.packing import codebook_bytes, pack_codes, unpack_codes

codes_of_width = st.integers(1, 8).flatmap(
    lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1), max_size=40))
)


@given(codes_of_width)
def test_packed_codes_are_the_digits_of_one_number(given_codes):
    bits, codes = given_codes
    number = sum(code << (bits * place) for place, code in enumerate(codes))
    expected = number.to_bytes(-(-len(codes) * bits // 8), "little")
    packed = pack_codes(torch.tensor(codes, dtype=torch.int64), bits)
    assert bytes(packed.tolist()) == expected


@given(codes_of_width)
def test_unpacked_codes_are_the_ones_packed(given_codes):
    bits, codes = given_codes
    tensor = torch.tensor(codes, dtype=torch.uint8)
    assert torch.equal(unpack_codes(pack_codes(tensor, bits), bits, len(codes)), tensor)


def test_order_is_that_of_elements_whatever_the_memory_format():
    codes = torch.randint(0, 8, (2, 3, 2, 2), dtype=torch.uint8)
    last = codes.to(memory_format=torch.channels_last)
    assert torch.equal(pack_codes(last, 3), pack_codes(codes, 3))


def test_bytes_are_codes_and_values_and_a_bit_for_each_that_may_be_pruned():
    assert codebook_bytes(1000, 4, 16) == 500 + 64
    assert codebook_bytes(9, 3, 8, value_bytes=2) == 4 + 16
    assert codebook_bytes(1000, 4, 16, has_pruned=True) == 500 + 64 + 125


def test_what_does_not_fit_is_refused():
    for width in (0, 9, True):
        with pytest.raises(QuantizationError, match=f"^codebook_bytes: bits must be 1 to 8, got {width}$"):
            codebook_bytes(3, width, 2)
    with pytest.raises(QuantizationError, match=r"^pack_codes: codes of 2 bits are 0 to 3, got 1 to 4$"):
        pack_codes(torch.tensor([1, 4]), 2)
    with pytest.raises(QuantizationError) as refused:
        unpack_codes(torch.zeros(3, dtype=torch.uint8), 4, 8)
    assert str(refused.value) == (
        "unpack_codes: 8 codes of 4 bits are 4 bytes (uint8), got 3 elements of torch.uint8"
    )
