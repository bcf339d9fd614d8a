from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.packing.cursor import Cursor, DamagedSectionError, varint
from distiller.packing.gaps import write_gaps
from distiller.packing.tensors import (
    DTYPES,
    ENCODINGS,
    kind_of,
    mapped,
    patterns_of,
    read_map,
    read_tensor,
    tensor_of,
    write_tensor,
)
from tests.packing.networks import normal, pruned, rounded, shared, shared_by_rows


def there_and_back(tensor) -> tuple[str, int]:
    """Encoding and bytes of a tensor that reads back bit for bit."""
    kind, patterns = kind_of(tensor.dtype), patterns_of(tensor)
    encoding, data = write_tensor(patterns, kind, tensor.shape)
    assert encoding in ENCODINGS
    cursor = Cursor(data)
    found = tensor_of(
        read_tensor(encoding, cursor, kind, tensor.shape, patterns.size), tensor.dtype, tensor.shape
    )
    assert cursor.place == len(data)
    assert found.dtype == tensor.dtype
    assert found.shape == tensor.shape
    assert found.is_contiguous()
    np.testing.assert_array_equal(patterns_of(found), patterns)
    return encoding, len(data)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (64,), (7, 3, 3, 3)], ids=str)
def test_all_bits_of_every_type_and_shape_come_back(dtype, shape):
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    if dtype == torch.bool:
        raw %= 2
    tensor = raw.flatten().view(dtype).view(shape)
    there_and_back(tensor)
    there_and_back(torch.zeros_like(tensor))


@settings(max_examples=60)
@given(
    st.lists(
        st.sampled_from(
            [0, 0x80000000, 0x7FC00000, 0x7FC00001, 0xFF800001, 0x7F800000, 0xFF800000, 1, 0x807FFFFF]
        )
        | st.integers(0, 2**32 - 1),
        max_size=120,
    ),
    st.integers(1, 5),
)
def test_signed_zeros_infinities_subnormal_numbers_and_the_bits_of_nans_come_back(numbers, rows):
    numbers = numbers[: len(numbers) // rows * rows]
    tensor = torch.from_numpy(np.array(numbers, dtype=np.uint32).view(np.float32))
    there_and_back(tensor.view(rows, -1) if numbers else tensor)


@pytest.mark.parametrize(
    "tensor, encoding, most_bits",
    [
        (lambda: normal(100, 200), "dense/planes", 27),
        (lambda: torch.zeros(100, 200), "sparse/raw", 0.001),
        (lambda: torch.full((100, 200), 0.1), "dense/codebook", 0.01),
        (lambda: pruned(normal(100, 200), 0.9), "sparse/planes", 0.47 + 2.9),
        (
            lambda: torch.where(torch.arange(200) < 40, pruned(normal(100, 200), 0.5), 0),
            "columns/planes",
            3.1,
        ),
        (lambda: shared((100, 200), 16), "dense/codebook", 3.6),
        (lambda: pruned(shared((100, 200), 16), 0.95), "dense/codebook", 0.286 + 0.23),
        (lambda: rounded(normal(100, 200), 8, False), "dense/grid", 7.1),
        (lambda: rounded(normal(100, 200), 4, True), "dense/rowgrid", 3.6),
        (lambda: pruned(rounded(normal(100, 200), 4, True), 0.9), "dense/rowgrid", 0.47 + 0.53),
        (lambda: pruned(rounded(normal(100, 2000), 4, True), 0.98), "sparse/rowgrid", 0.142 + 0.08),
        (lambda: shared_by_rows(100, 200, 4), "dense/rowcodebook", 2 + 4 * 32 / 200 + 0.1),
        (lambda: torch.sign(normal(100, 200)) * normal(100, 1).abs(), "dense/rowgrid", 1 + 32 / 200 + 0.01),
        (lambda: normal(100, 200) > 0, "dense/codebook", 1.01),
        (lambda: torch.tensor(12345), "dense/raw", 64),
        (lambda: normal(100, 200).bfloat16(), "dense/planes", 11),
    ],
)
def test_a_tensor_costs_what_its_method_promises(tensor, encoding, most_bits):
    tensor = tensor()
    found, size = there_and_back(tensor)
    assert found == encoding
    assert 8 * size / tensor.numel() <= most_bits


def test_a_tensor_in_another_order_of_memory_comes_back_in_its_own():
    there_and_back(normal(4, 6, 3, 3).to(memory_format=torch.channels_last))
    there_and_back(normal(6, 4).T)
    there_and_back(torch.view_as_complex(normal(5, 2)).conj())


def test_codes_follow_from_values():
    values = shared((30, 40), 16)
    _, codes = torch.unique(values, return_inverse=True)
    kind = kind_of(torch.uint8)
    table = mapped(patterns_of(values), patterns_of((codes + 3).byte()), kind)
    assert table is not None
    assert len(table) == 1 + values.unique().numel()
    found = read_map(patterns_of(values), Cursor(table), kind)
    np.testing.assert_array_equal(found, patterns_of((codes + 3).byte()))
    codes[0, 0] = (codes[0, 0] + 1) % 16
    assert mapped(patterns_of(values), patterns_of(codes.byte()), kind) is None
    with pytest.raises(DamagedSectionError, match="^has a table of "):
        read_map(patterns_of(values[:1, :2]), Cursor(table), kind)


@pytest.mark.parametrize("gaps", [[0, 11], [12], [2**40 - 1] * 3, [2**39] * 12], ids=str)
def test_values_behind_the_last_element_are_refused(gaps):
    data = varint(len(gaps)) + write_gaps(np.array(gaps), 5) + bytes(100)
    for encoding in ("sparse/raw", "columns/raw"):
        with pytest.raises(DamagedSectionError, match="^has values behind the last of its 12 elements$"):
            read_tensor(encoding, Cursor(data), kind_of(torch.float32), (3, 4), 12)


@settings(max_examples=150)
@given(st.binary(max_size=80), st.sampled_from([name for name in ENCODINGS if "/" in name]))
def test_any_bytes_give_a_tensor_or_an_error(data, encoding):
    try:
        found = read_tensor(encoding, Cursor(data), kind_of(torch.float32), (3, 20), 60)
    except DamagedSectionError:
        return
    assert found.shape == (60,)
