"""Texts with numbers in them, compared as a reader would."""

from __future__ import annotations

import math
import re

_NUMBER = re.compile(r"-?\b\d+\.\d+(?:e[+-]?\d+)?\b")
_DIGITS = 5


def five_digits(text: str) -> str:
    """The text with its numbers (those with a point) rounded to five significant digits."""
    return _NUMBER.sub(lambda number: _rounded(float(number[0])), text)


def differences(text: str, expected: str, is_table: bool = False) -> list[str]:
    """The lines that differ, as `-expected` and `+text`; [] when there are none.

    Numbers with a point may differ by one in the last digit: of a table the last that is shown,
    elsewhere the fifth. All else, whole numbers and spaces included, must be the same.
    """
    lines, expected_lines = text.splitlines(), expected.splitlines()
    if len(lines) != len(expected_lines):
        missing = [f"-{line}" for line in expected_lines if line not in lines]
        return [f"{len(expected_lines)} lines expected, got {len(lines)}", *missing] + [
            f"+{line}" for line in lines if line not in expected_lines
        ]
    pairs = zip(lines, expected_lines, strict=True)
    return [line for now, then in pairs if not _same(now, then, is_table) for line in (f"-{then}", f"+{now}")]


def _same(line: str, expected: str, is_table: bool) -> bool:
    if _NUMBER.split(line) != _NUMBER.split(expected):
        return False
    pairs = zip(_NUMBER.findall(line), _NUMBER.findall(expected), strict=True)
    return all(abs(float(now) - float(then)) <= 1.001 * _last_digit(then, is_table) for now, then in pairs)


def _last_digit(number: str, is_table: bool) -> float:
    mantissa, _, exponent = number.partition("e")
    if is_table:
        return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    size = abs(float(number))
    return 10.0 ** (math.floor(math.log10(size)) - _DIGITS + 1) if size else 10.0**-_DIGITS


def _rounded(number: float) -> str:
    text = f"{number:.{_DIGITS}g}"
    mantissa, e, exponent = text.partition("e")
    return (mantissa if "." in mantissa else f"{mantissa}.0") + e + exponent
