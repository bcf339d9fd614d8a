from __future__ import annotations

import re

import numpy as np
import pytest

from distiller.packing.cursor import Cursor, DamagedSectionError, varint
from distiller.packing.gaps import write_gaps
from distiller.packing.values import VALUE_FORMS, Kind, read_values, value_forms
from tests.packing.networks import normal, rounded, shared, shared_by_rows

FLOAT32 = Kind(4, True)
ROWS = np.repeat(np.arange(20), 100)


def but_extremes(weight, rows):
    """The least value a little less, the largest a little larger, of each row."""
    weight = weight.view(rows, -1).clone()
    for place, factor in ((weight.argmin(1), 1.003), (weight.argmax(1), 1.0007)):
        weight[range(rows), place] *= factor
    return weight.view(20, 100)


def forms(weight) -> dict:
    return {
        form.name: form for form in value_forms(weight.numpy().view(np.uint32).ravel(), FLOAT32, ROWS, 20)
    }


@pytest.mark.parametrize(
    "weight, best",
    [
        (normal(20, 100), "planes"),
        (shared((20, 100), 8), "codebook"),
        (shared_by_rows(20, 100, 2), "rowcodebook"),
        (rounded(normal(20, 100), 5, False), "grid"),
        (rounded(normal(20, 100), 5, True), "rowgrid"),
        (but_extremes(rounded(normal(20, 100), 8, False), 1), "grid+"),
        (but_extremes(rounded(normal(20, 100), 5, True), 20), "rowgrid+"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_form_reads_back_and_the_best_is_that_of_the_method(weight, best):
    found = forms(weight)
    assert min(found.values(), key=lambda form: form.size).name == best
    for name, form in found.items():
        data = form.write()
        assert abs(len(data) - form.size) <= 0.01 * len(data) + 4
        cursor = Cursor(data)
        patterns = read_values(name, cursor, 2000, FLOAT32, lambda: ROWS, 20)
        np.testing.assert_array_equal(patterns, weight.numpy().view(np.uint32).ravel())
        assert cursor.place == len(data)


@pytest.mark.parametrize("name", [name for name in VALUE_FORMS if "grid" in name])
def test_a_grid_of_another_type_is_refused(name):
    with pytest.raises(DamagedSectionError, match=re.escape(f"'{name}', which is for float32 alone")):
        read_values(name, Cursor(bytes(100)), 2, Kind(2, True), lambda: ROWS[:2], 1)


@pytest.mark.parametrize("gaps", [[0, 9], [10], [2**40 - 1] * 3], ids=str)
def test_extremes_behind_the_last_value_are_refused(gaps):
    data = varint(len(gaps)) + write_gaps(np.array(gaps), 5) + bytes(100)
    for name in ("grid+", "rowgrid+"):
        with pytest.raises(DamagedSectionError, match="^has extremes behind the last of its 10 values$"):
            read_values(name, Cursor(data), 10, FLOAT32, lambda: ROWS[:10], 1)


def test_a_code_that_its_row_has_not_is_refused():
    rows, table = np.array([0, 0, 1]), np.arange(3, dtype="<u4").tobytes()
    section = write_gaps(np.array([1, 2]), 0) + table
    read = read_values("rowcodebook", Cursor(section + b"\1\x20"), 3, FLOAT32, lambda: rows, 2)
    assert read.tolist() == [0, 0, 2]
    with pytest.raises(DamagedSectionError, match="^has a value that its row has not$"):
        read_values("rowcodebook", Cursor(section + b"\1\x40"), 3, FLOAT32, lambda: rows, 2)
    with pytest.raises(DamagedSectionError, match="^has a row of 300 different values$"):
        read_values("rowcodebook", Cursor(write_gaps(np.array([1, 300]), 0)), 3, FLOAT32, lambda: rows, 2)


@pytest.mark.parametrize("largest", [3e38, float("inf"), float("nan")])
def test_values_too_far_apart_for_a_grid_have_another_form(largest):
    """Without a warning of numbers that no integer is."""
    values = np.array([0, 1, 2, largest], dtype=np.float32)
    names = {form.name for form in value_forms(values.view(np.uint32), FLOAT32, np.arange(4), 4)}
    assert "raw" in names
    assert not {name for name in names if "grid" in name and not name.startswith("row")}
