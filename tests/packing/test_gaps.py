from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distiller.packing.cursor import Cursor, DamagedSectionError
from distiller.packing.gaps import LARGEST, best_fineness, read_gaps, write_gaps
from tests.packing import slow_reader


@settings(max_examples=60)
@given(st.lists(st.integers(0, LARGEST - 1) | st.integers(0, 40)), st.integers(0, 8))
def test_numbers_of_any_size_read_back(numbers, fineness):
    values = np.array(numbers, dtype=np.int64)
    data = write_gaps(values, fineness)
    cursor = Cursor(data)
    np.testing.assert_array_equal(read_gaps(cursor, values.size), values)
    assert cursor.place == len(data)
    assert slow_reader.gaps(slow_reader.Bytes(data), values.size) == numbers


@pytest.mark.parametrize("density", [0.5, 0.04, 0.001])
def test_gaps_at_random_cost_what_their_positions_say(density):
    values = np.random.default_rng(0).geometric(density, 40_000) - 1
    fineness, size = best_fineness(values)
    data = write_gaps(values, fineness)
    entropy = -(density * np.log2(density) + (1 - density) * np.log2(1 - density)) / density * values.size / 8
    assert len(data) <= 1.01 * entropy + 40
    assert abs(len(data) - size) <= 20


def test_an_unknown_fineness_is_refused():
    with pytest.raises(DamagedSectionError, match="^has gaps of the unknown fineness 9$"):
        read_gaps(Cursor(b"\x09"), 1)
