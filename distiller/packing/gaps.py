"""Whole numbers without an upper end, such as gaps between non-zero weights: a symbol, and bits that follow.

With k = `fineness`: a number below 2^k is its own symbol. Another one has e = floor(log2 v) >= k; its symbol
is 2^k + (e - k) 2^k + the k bits that follow its highest one, and the e - k bits below those follow as they
are. Numbers of one symbol differ by less than a factor of 1 + 2^-k, and are about equally frequent where gaps
are at random: next to nothing is lost, however long the gaps are, and the table of symbols stays small.
Knows nothing about tensors.
"""

from __future__ import annotations

import numpy as np

from distiller.packing.cursor import Cursor, DamagedSectionError
from distiller.packing.symbols import read_symbols, symbol_form, write_symbols

__all__ = ["LARGEST", "best_fineness", "read_gaps", "write_gaps"]

LARGEST = 1 << 40
"""Numbers are below it."""
_FINENESS = (0, 1, 2, 3, 4, 5)
_MOST = 8


def best_fineness(values: np.ndarray) -> tuple[int, int]:
    """The fineness that makes numbers shortest, and the bytes that they take with it, within a few.

    Args:
        values: int64, (count,), 0 up to 2^40.
    """
    sizes = {fineness: _size(values, fineness) for fineness in _FINENESS}
    best = min(sizes, key=lambda fineness: sizes[fineness])
    return best, sizes[best]


def write_gaps(values: np.ndarray, fineness: int) -> bytes:
    """Numbers, read back by `read_gaps`.

    Args:
        values: int64, (count,), 0 up to 2^40.
        fineness: 0 to 8.
    """
    if not values.size:
        return b""
    tokens, extra = _tokens(values, fineness)
    symbols = write_symbols(tokens.astype(np.uint16), _alphabet(fineness))
    ends = np.cumsum(extra)
    single = np.zeros(int(ends[-1]), dtype=np.uint8)
    for bit in range(int(extra.max())):
        has = extra > bit
        single[(ends - 1 - bit)[has]] = (values[has] >> bit) & 1
    return bytes([fineness]) + symbols + np.packbits(single).tobytes()


def read_gaps(cursor: Cursor, count: int) -> np.ndarray:
    """What `write_gaps` wrote: int64, (count,).

    Raises:
        DamagedSectionError: it is not what that writes.
    """
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    fineness = cursor.byte()
    if fineness > _MOST:
        raise DamagedSectionError(f"has gaps of the unknown fineness {fineness}")
    tokens = read_symbols(cursor, _alphabet(fineness), count).astype(np.int64)
    unit = 1 << fineness
    is_long = tokens >= unit
    extra = np.where(is_long, (tokens - unit) >> fineness, 0)
    heads = np.where(is_long, unit + ((tokens - unit) & (unit - 1)), tokens)
    ends = np.cumsum(extra)
    total = int(ends[-1])
    single = np.unpackbits(np.frombuffer(cursor.take(-(-total // 8)), dtype=np.uint8), count=total)
    values, starts = heads, ends - extra
    for bit in range(int(extra.max())):
        has = np.flatnonzero(extra > bit)
        values[has] = (values[has] << 1) | single[starts[has] + bit]
    return values


def _alphabet(fineness: int) -> int:
    return (1 << fineness) * (41 - fineness)


def _tokens(values: np.ndarray, fineness: int) -> tuple[np.ndarray, np.ndarray]:
    """The symbol of each number, and how many bits follow it."""
    unit = 1 << fineness
    extra = np.maximum(np.frexp(np.maximum(values, 1).astype(np.float64))[1] - 1 - fineness, 0).astype(
        np.int64
    )
    heads = values >> extra
    tokens = np.where(values < unit, values, unit + (extra << fineness) + (heads & (unit - 1)))
    return tokens, np.where(values < unit, 0, extra)


def _size(values: np.ndarray, fineness: int) -> int:
    if not values.size:
        return 0
    tokens, extra = _tokens(values, fineness)
    counts = np.bincount(tokens, minlength=_alphabet(fineness))
    return 1 + symbol_form(counts).size + -(-int(extra.sum()) // 8)
