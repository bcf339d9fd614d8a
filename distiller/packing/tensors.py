"""One tensor as a section of a packed file, and back, bit for bit.

An encoding is `<places>/<values>`. The values are in a form of `values.py`; the places are

    dense     all elements, in order
    sparse    those that are not exactly 0 (all bits zero), in order; before them their number, and how many
              zeros are before each
    columns   alike, in the order of the transposed (dimension 0, all others) matrix: zeros of a pruned
              network often stand in columns

or it is one of

    same      the tensor is equal to one before it
    map       its elements follow from those of one before it, that has few different ones: a table says how

Every way is tried, and the smallest taken. Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from distiller.packing.cursor import Cursor, DamagedSectionError, varint
from distiller.packing.gaps import LARGEST, best_fineness, read_gaps, write_gaps
from distiller.packing.values import VALUE_FORMS, Kind, ValueForm, read_values, value_forms

__all__ = [
    "DTYPES",
    "ENCODINGS",
    "MOST_ELEMENTS",
    "kind_of",
    "mapped",
    "patterns_of",
    "read_map",
    "read_tensor",
    "tensor_of",
    "write_tensor",
]

MOST_ELEMENTS = LARGEST
_PLACES = ("dense", "sparse", "columns")
ENCODINGS = ("same", "map", *(f"{places}/{values}" for places in _PLACES for values in VALUE_FORMS))
_MOST_MAPPED = 256
_MOST_PRESENT = 0.99
"""Share of elements that are not 0, above which it is of no use to say which."""
_UNSIGNED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64",
        "complex128", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool",
    )
}  # fmt: skip
"""The types that tensors can have, by name."""


@dataclass(frozen=True, slots=True)
class _Places:
    """Which elements have a value that is written: those that are not 0, in an order."""

    name: str
    size: int
    write: Callable[[], bytes]
    indices: np.ndarray | None  # of the elements, in order; None: all


def kind_of(dtype: torch.dtype) -> Kind:
    """What the values of a tensor of this type are; complex numbers are two."""
    halves = 2 if dtype.is_complex else 1
    return Kind(dtype.itemsize // halves, dtype.is_floating_point or dtype.is_complex)


def patterns_of(tensor: Tensor) -> np.ndarray:
    """The bits of a tensor's elements as unsigned whole numbers, in order; complex numbers are two."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().flatten()
    plain = torch.view_as_real(plain).flatten() if plain.is_complex() else plain
    size = plain.element_size()
    return plain.view(_UNSIGNED[size]).numpy().view(f"u{size}")


def tensor_of(patterns: np.ndarray, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The tensor whose `patterns_of` these are."""
    kind = kind_of(dtype)
    native = np.array(patterns, dtype=f"u{kind.size}")  # a copy of its own
    flat = torch.from_numpy(native.view(f"i{kind.size}") if kind.size > 1 else native)
    if dtype.is_complex:
        real = flat.view(torch.float32 if kind.size == 4 else torch.float64)
        return torch.view_as_complex(real.view(-1, 2)).view(tuple(shape))
    return flat.view(dtype).view(tuple(shape))


def write_tensor(patterns: np.ndarray, kind: Kind, shape: Sequence[int]) -> tuple[str, bytes]:
    """The smallest encoding, and its bytes.

    Args:
        patterns: of the elements, in order.
        kind: what they are.
        shape: of the tensor.
    """
    rows, row_size = _rows_of(shape, patterns.size)
    found: list[tuple[int, str, _Places, ValueForm]] = []
    for places in _places(patterns, rows, row_size):
        indices = places.indices
        own = patterns if indices is None else patterns[indices]
        of_each = None
        if rows > 1:
            of_each = (np.arange(patterns.size) if indices is None else indices) // row_size
        found += [
            (places.size + form.size, f"{places.name}/{form.name}", places, form)
            for form in value_forms(own, kind, of_each, rows)
        ]
    _, name, places, form = min(found, key=lambda candidate: candidate[0])
    return name, places.write() + form.write()


def read_tensor(encoding: str, cursor: Cursor, kind: Kind, shape: Sequence[int], count: int) -> np.ndarray:
    """What `write_tensor` wrote: the patterns, (count,).

    Raises:
        DamagedSectionError: it is not what that writes.
    """
    rows, row_size = _rows_of(shape, count)
    where, _, form = encoding.partition("/")
    if where == "dense":
        return read_values(form, cursor, count, kind, lambda: np.arange(count) // row_size, rows)
    present = cursor.varint(count + 1)
    gaps = read_gaps(cursor, present)
    if float(gaps.sum(dtype=np.float64)) + present > count:
        raise DamagedSectionError(f"has values behind the last of its {count} elements")
    indices = np.cumsum(gaps + 1) - 1
    if where == "columns":
        indices = indices % rows * row_size + indices // rows
    values = read_values(form, cursor, present, kind, lambda: indices // row_size, rows)
    patterns = np.zeros(count, dtype=kind.numpy)
    patterns[indices] = values
    return patterns


def mapped(source: np.ndarray, patterns: np.ndarray, kind: Kind) -> bytes | None:
    """The table by which patterns follow from those of another tensor; None if they do not.

    Args:
        source: the other's, as many.
        patterns: of the tensor.
        kind: what they are.
    """
    different, first, codes = np.unique(source, return_index=True, return_inverse=True)
    if different.size > _MOST_MAPPED:
        return None
    table = patterns[first]
    if not np.array_equal(table[codes.reshape(-1)], patterns):
        return None
    return varint(different.size) + table.astype(kind.numpy).tobytes()


def read_map(source: np.ndarray, cursor: Cursor, kind: Kind) -> np.ndarray:
    """What `mapped` made the table of.

    Raises:
        DamagedSectionError: the table is not of this source.
    """
    different, codes = np.unique(source, return_inverse=True)
    size = cursor.varint(_MOST_MAPPED + 1)
    if different.size != size:
        raise DamagedSectionError(f"has a table of {size} for a tensor of {different.size} different values")
    return cursor.array(kind.numpy.str, size)[codes.reshape(-1)]


def _rows_of(shape: Sequence[int], count: int) -> tuple[int, int]:
    """Rows, and values of each; complex numbers are two values."""
    rows = shape[0] if len(shape) > 1 and prod(shape) else 1
    return rows, max(1, count // max(1, rows))


def _places(patterns: np.ndarray, rows: int, row_size: int) -> list[_Places]:
    found = [_Places("dense", 0, lambda: b"", None)]
    indices = np.flatnonzero(patterns)
    if indices.size > _MOST_PRESENT * patterns.size:
        return found
    ways = [_by_gaps("sparse", indices, indices)]
    if rows > 1 and row_size > 1:
        turned = indices % row_size * rows + indices // row_size
        order = np.argsort(turned, kind="stable")
        ways.append(_by_gaps("columns", indices[order], turned[order]))
    return [*found, min(ways, key=lambda way: way.size)]  # the values are the same ones in any order


def _by_gaps(name: str, indices: np.ndarray, places: np.ndarray) -> _Places:
    gaps = np.diff(places, prepend=-1) - 1
    fineness, size = best_fineness(gaps)
    head = varint(places.size)
    return _Places(name, len(head) + size, lambda: head + write_gaps(gaps, fineness), indices)
