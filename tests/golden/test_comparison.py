"""Files that differ are noticed, and those that another machine writes are not."""

from __future__ import annotations

import pytest

from tests.golden.comparison import differences, five_digits

DATA = "conv1:\n  max: 7.3574\n  mean: -3.1416e-05\n  count: 12\n"


@pytest.mark.parametrize(
    ("was", "now"),
    [("7.3574", "7.3576"), ("-3.1416e-05", "3.1416e-05"), ("12", "13"), ("conv1", "conv2"), ("max", "maximum"),
     ("  max", " max"), ("7.3574", "nan"), ("  count: 12\n", ""), ("count: 12", "count: 12.0")],
)  # fmt: skip
def test_a_change_is_told_with_its_line(was, now):
    found = differences(DATA.replace(was, now), DATA)
    assert any(was.strip() in line for line in found if line.startswith("-"))


def test_the_fifth_digit_may_be_another_by_one():
    assert differences(DATA.replace("7.3574", "7.3575").replace("3.1416", "3.1415"), DATA) == []


def test_of_a_table_the_last_digit_that_is_shown_may():
    table = "fc.weight  12.50  0.00012\n"
    assert differences(table.replace("0.00012", "0.00013"), table, is_table=True) == []
    assert differences(table.replace("12.50", "12.52"), table, is_table=True) != []
    assert differences(table.replace("  12.50", " 12.50"), table, is_table=True) != []


def test_numbers_with_a_point_are_rounded_and_nothing_else():
    assert five_digits("a.0.b: 7.357358932495117, 1.0, 1234567.5, 3e8, (256, 3), v1") == (
        "a.0.b: 7.3574, 1.0, 1.2346e+06, 3e8, (256, 3), v1"
    )
    assert five_digits("0.00001234567 -0.5 1e-05 2.5e-07") == "1.2346e-05 -0.5 1e-05 2.5e-07"
