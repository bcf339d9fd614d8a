"""The values of a tensor, exactly, in the smallest of a few forms.

A value is the whole number that its bits are (its *pattern*), of 1, 2, 4 or 8 bytes, the lowest first.

    raw           the patterns
    planes        each byte of the patterns as symbols, the highest first; of floating-point numbers of 2
                  bytes and more the sign is moved to the lowest bit before, so that the exponent of float32
                  is a byte of its own
    codebook      the different patterns, ascending, and of each value which one it is
    rowcodebook   alike, with different patterns for each row
    grid          float32 alone: k * scale, computed in float32, with whole k
    rowgrid       alike, with a scale for each row
    grid+         `grid`, but for the least and the largest value; training that quantizes weights over their
                  range has these two in full precision
    rowgrid+      alike, with a scale, a least and a largest value for each row

A row is what has one index in dimension 0. Knows nothing about where in a tensor the values are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from distiller.packing.cursor import Cursor, DamagedSectionError, signed_varint, varint
from distiller.packing.gaps import best_fineness, read_gaps, write_gaps
from distiller.packing.grids import grid_scale, on_grid, row_scales
from distiller.packing.symbols import LARGEST_ALPHABET, read_symbols, symbol_form, write_symbols

__all__ = ["VALUE_FORMS", "Kind", "ValueForm", "read_values", "value_forms"]

_SAMPLE = 8192
_MOST_IN_A_ROW = 256
_LARGEST_K = 1 << 24


@dataclass(frozen=True, slots=True)
class Kind:
    """What the values of a tensor are.

    Attributes:
        size: bytes of one.
        is_float: whether it is a floating-point number.
    """

    size: int
    is_float: bool

    @property
    def numpy(self) -> np.dtype:
        """The type of the patterns, little-endian."""
        return np.dtype(f"<u{self.size}")


@dataclass(frozen=True, slots=True)
class ValueForm:
    """A form that the values can have.

    Attributes:
        name: one of `VALUE_FORMS`.
        size: bytes, within a few.
        write: makes them.
    """

    name: str
    size: int
    write: Callable[[], bytes]


def value_forms(patterns: np.ndarray, kind: Kind, rows: np.ndarray | None, row_count: int) -> list[ValueForm]:
    """The forms that are worth a look.

    Args:
        patterns: unsigned whole numbers of `kind.size` bytes, (count,).
        kind: what they are.
        rows: the row of each, (count,); None: the tensor has no rows.
        row_count: rows of the tensor.
    """
    forms = [ValueForm("raw", patterns.nbytes, lambda: patterns.astype(kind.numpy).tobytes())]
    if not patterns.size:
        return forms
    forms.append(_planes(patterns, kind))
    stride = max(1, patterns.size // _SAMPLE)
    sample = np.unique(patterns[::stride][:_SAMPLE])
    if sample.size <= _SAMPLE // 2:
        forms += _codebook(patterns, kind)
    is_single = kind.size == 4 and kind.is_float
    if is_single:
        forms += _grid(patterns, None, 1)
    if rows is not None and row_count > 1:
        forms += _row_codebook(patterns, kind, rows, row_count)
        if is_single:
            forms += _grid(patterns, rows, row_count)
    return forms


def read_values(
    name: str, cursor: Cursor, count: int, kind: Kind, rows: Callable[[], np.ndarray], row_count: int
) -> np.ndarray:
    """What the form `name` wrote: the patterns, (count,).

    Args:
        name: of the form.
        cursor: where they begin.
        count: how many there are.
        kind: what they are.
        rows: gives the row of each.
        row_count: rows of the tensor.

    Raises:
        DamagedSectionError: it is not what the form writes.
    """
    if name == "raw":
        return cursor.array(kind.numpy.str, count)
    if count == 0:
        raise DamagedSectionError(f"has no values, in the form '{name}'")
    if name == "planes":
        return _read_planes(cursor, count, kind)
    if name == "codebook":
        size = cursor.varint(LARGEST_ALPHABET) + 1
        table = cursor.array(kind.numpy.str, size)
        return table[read_symbols(cursor, size, count)]
    if name == "rowcodebook":
        return _read_row_codebook(cursor, count, kind, rows(), row_count)
    if not (kind.size == 4 and kind.is_float):
        raise DamagedSectionError(f"has values in the form '{name}', which is for float32 alone")
    places, others = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=kind.numpy)
    if name.endswith("+"):
        number = cursor.varint(count + 1)
        gaps = read_gaps(cursor, number)
        if float(gaps.sum(dtype=np.float64)) + number > count:
            raise DamagedSectionError(f"has extremes behind the last of its {count} values")
        places, others = np.cumsum(gaps + 1) - 1, cursor.array(kind.numpy.str, number)
    has_rows = name.startswith("row")
    scales = cursor.array("<f4", row_count if has_rows else 1)
    low = cursor.signed(_LARGEST_K + 1)
    size = cursor.varint(LARGEST_ALPHABET) + 1
    steps = read_symbols(cursor, size, count).astype(np.int64) + low
    patterns = on_grid(steps, scales[rows()] if has_rows else scales[0])
    patterns[places] = others
    return patterns


def _planes(patterns: np.ndarray, kind: Kind) -> ValueForm:
    turned = _turned(patterns, kind)

    def plane(index: int) -> np.ndarray:
        return ((turned >> turned.dtype.type(8 * index)) & turned.dtype.type(255)).astype(np.uint8)

    order = range(kind.size - 1, -1, -1)
    size = sum(symbol_form(np.bincount(plane(index), minlength=256)).size for index in order)
    return ValueForm("planes", size, lambda: b"".join(write_symbols(plane(index), 256) for index in order))


def _read_planes(cursor: Cursor, count: int, kind: Kind) -> np.ndarray:
    turned = np.zeros(count, dtype=kind.numpy)
    for index in range(kind.size - 1, -1, -1):
        turned |= read_symbols(cursor, 256, count).astype(kind.numpy) << kind.numpy.type(8 * index)
    if not _moves_sign(kind):
        return turned
    one, top = kind.numpy.type(1), kind.numpy.type(8 * kind.size - 1)
    return (turned >> one) | (turned << top)


def _turned(patterns: np.ndarray, kind: Kind) -> np.ndarray:
    if not _moves_sign(kind):
        return patterns
    one, top = patterns.dtype.type(1), patterns.dtype.type(8 * kind.size - 1)
    return (patterns << one) | (patterns >> top)


def _moves_sign(kind: Kind) -> bool:
    return kind.is_float and kind.size > 1


def _codebook(patterns: np.ndarray, kind: Kind) -> list[ValueForm]:
    table, codes = np.unique(patterns, return_inverse=True)
    if table.size > LARGEST_ALPHABET:
        return []
    codes = codes.reshape(-1)
    counts = np.bincount(codes, minlength=table.size)
    head = varint(table.size - 1) + table.astype(kind.numpy).tobytes()
    size = len(head) + symbol_form(counts).size
    return [ValueForm("codebook", size, lambda: head + write_symbols(codes, table.size, counts))]


def _row_codebook(patterns: np.ndarray, kind: Kind, rows: np.ndarray, row_count: int) -> list[ValueForm]:
    first = patterns[rows == rows[0]]
    if kind.size > 4 or np.unique(first).size > min(_MOST_IN_A_ROW, max(2, first.size // 2)):
        return []
    keys = rows.astype(np.uint64) << np.uint64(32) | patterns.astype(np.uint64)
    pairs, places = np.unique(keys, return_inverse=True)
    of_row = np.bincount((pairs >> np.uint64(32)).astype(np.int64), minlength=row_count)
    if int(of_row.max()) > _MOST_IN_A_ROW:
        return []
    begins = np.cumsum(of_row) - of_row
    codes = places.reshape(-1) - begins[rows]
    alphabet = int(of_row.max())
    head = write_gaps(of_row, 0) + (pairs & np.uint64(0xFFFFFFFF)).astype(kind.numpy).tobytes()
    counts = np.bincount(codes, minlength=alphabet)
    size = len(head) + symbol_form(counts).size
    return [ValueForm("rowcodebook", size, lambda: head + write_symbols(codes, alphabet, counts))]


def _read_row_codebook(
    cursor: Cursor, count: int, kind: Kind, rows: np.ndarray, row_count: int
) -> np.ndarray:
    of_row = read_gaps(cursor, row_count)
    if int(of_row.max(initial=0)) > _MOST_IN_A_ROW:
        raise DamagedSectionError(f"has a row of {int(of_row.max())} different values")
    table = cursor.array(kind.numpy.str, int(of_row.sum()))
    codes = read_symbols(cursor, max(1, int(of_row.max(initial=0))), count).astype(np.int64)
    if bool((codes >= of_row[rows]).any()):
        raise DamagedSectionError("has a value that its row has not")
    return table[(np.cumsum(of_row) - of_row)[rows] + codes]


def _grid(patterns: np.ndarray, rows: np.ndarray | None, row_count: int) -> list[ValueForm]:
    """The values on a grid, or all but the extremes."""
    values = patterns.view(np.float32)
    if not bool(np.isfinite(values).all()):
        return []
    name = "grid" if rows is None else "rowgrid"
    scales = _scales(values, rows, row_count)
    if scales is not None:
        return _grid_form(name, values, scales, rows)
    places = _extremes(values, rows)
    scales = _scales(_without(values, places), rows, row_count)
    if scales is None:
        return []
    of_each = scales[0] if rows is None else scales[rows[places]]
    is_on_it = on_grid(np.rint(values[places].astype(np.float64) / of_each), of_each) == patterns[places]
    places = places[~is_on_it]
    gaps = np.diff(places, prepend=-1) - 1
    head = varint(places.size) + write_gaps(gaps, best_fineness(gaps)[0]) + patterns[places].tobytes()
    rest = _grid_form(name, _without(values, places), scales, rows)
    return [_behind(head, form) for form in rest]


def _behind(head: bytes, form: ValueForm) -> ValueForm:
    return ValueForm(f"{form.name}+", len(head) + form.size, lambda: head + form.write())


def _scales(values: np.ndarray, rows: np.ndarray | None, row_count: int) -> np.ndarray | None:
    """Of the grid, or of that of each row."""
    if rows is not None:
        return row_scales(values, rows, row_count)
    patterns = values.view(np.uint32)
    sample = np.unique(patterns[:: max(1, patterns.size // _SAMPLE)][:_SAMPLE])
    scale = grid_scale(values, sample.view(np.float32))
    return None if scale is None else np.array([scale], dtype=np.float32)


def _extremes(values: np.ndarray, rows: np.ndarray | None) -> np.ndarray:
    """Where the least and the largest value are, of all or of each row; ascending."""
    if rows is None:
        return np.unique([values.argmin(), values.argmax()])
    order = np.lexsort((values, rows))
    begins = np.flatnonzero(np.diff(rows[order], prepend=-1))
    ends = np.append(begins[1:], rows.size) - 1
    return np.unique(order[np.append(begins, ends)])


def _without(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The values with 0, which is on every grid, in these places."""
    rest = values.copy()
    rest[places] = 0
    return rest


def _grid_form(name: str, values: np.ndarray, scales: np.ndarray, rows: np.ndarray | None) -> list[ValueForm]:
    of_each = scales[0] if rows is None else scales[rows]
    rounded = np.rint(values.astype(np.float64) / of_each)
    least, most = float(rounded.min()), float(rounded.max())
    if not (most - least < LARGEST_ALPHABET and max(-least, most) <= _LARGEST_K):  # NaN is neither
        return []
    steps, low, high = rounded.astype(np.int64), int(least), int(most)
    if not np.array_equal(on_grid(steps, of_each), values.view(np.uint32)):
        return []
    alphabet = high - low + 1
    head = scales.astype("<f4").tobytes() + signed_varint(low) + varint(alphabet - 1)
    shifted = steps - low
    counts = np.bincount(shifted, minlength=alphabet)
    size = len(head) + symbol_form(counts).size
    return [ValueForm(name, size, lambda: head + write_symbols(shifted, alphabet, counts))]


VALUE_FORMS = ("raw", "planes", "codebook", "rowcodebook", "grid", "rowgrid", "grid+", "rowgrid+")
