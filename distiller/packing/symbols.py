"""Symbols of a small alphabet, in the smallest of four forms.

    constant   all are the same one
    plain      each in as many bits as the alphabet needs
    huffman    `huffman.py`
    rans       `rans.py`

What a form takes is found out from how often each symbol occurs, before anything is encoded.
Knows nothing about what symbols stand for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from distiller.packing.cursor import Cursor, DamagedSectionError, pack_bits, varint
from distiller.packing.huffman import code_lengths, huffman_decode, huffman_encode
from distiller.packing.rans import frequencies, rans_decode, rans_encode

__all__ = ["LARGEST_ALPHABET", "SymbolForm", "lanes_of", "read_symbols", "symbol_form", "write_symbols"]

LARGEST_ALPHABET = 1 << 16
_CONSTANT, _PLAIN, _HUFFMAN, _RANS = range(4)
_MOST_CODED = 4096
"""Symbols that occur, for which a table is worth trying."""
_PRECISIONS = (8, 10, 12, 14, 15)
_LANE_SYMBOLS = 4096
_MOST_LANES = 1 << 14


@dataclass(frozen=True, slots=True)
class SymbolForm:
    """How symbols are to be written, and what that takes.

    Attributes:
        kind: constant, plain, huffman or rans, by number.
        size: bytes, within two for rANS.
        precision: of rANS.
    """

    kind: int
    size: int
    precision: int = 0


def lanes_of(count: int) -> int:
    """How many lanes so many symbols are written in."""
    return min(max(1, count // _LANE_SYMBOLS), _MOST_LANES)


def symbol_form(counts: np.ndarray) -> SymbolForm:
    """The smallest form.

    Args:
        counts: how often each symbol occurs, (alphabet,).
    """
    total, used = int(counts.sum()), np.flatnonzero(counts)
    if used.size <= 1:
        return SymbolForm(_CONSTANT, 4)
    forms = [SymbolForm(_PLAIN, 1 + -(-total * _width(counts.size) // 8))]
    if used.size <= _MOST_CODED and total > used.size:
        span, lanes = int(used[-1] - used[0]) + 1, lanes_of(total)
        lengths = code_lengths(counts)
        bits = int((counts * lengths).sum())
        head = 1 + len(varint(int(used[0]))) + len(varint(span))
        directory = 4 * lanes if lanes > 1 else len(varint(bits))
        forms.append(SymbolForm(_HUFFMAN, head + -(-span * 4 // 8) + directory + -(-bits // 8)))
        for precision in _PRECISIONS:
            if used.size <= 1 << precision:
                freqs = frequencies(counts, precision)
                size = head + 1 + _table_bytes(freqs[used[0] : used[-1] + 1]) + 4 * lanes + 2
                ideal = float((counts[used] * (precision - np.log2(freqs[used]))).sum()) - 16 * lanes
                forms.append(SymbolForm(_RANS, size + max(0, int(ideal / 8) + 1), precision))
    return min(forms, key=lambda form: form.size)


def write_symbols(symbols: np.ndarray, alphabet: int, counts: np.ndarray | None = None) -> bytes:
    """The symbols in their smallest form.

    Args:
        symbols: whole numbers below the alphabet, (count,); none: nothing is written.
        alphabet: 1 to 65,536.
        counts: how often each occurs, where that is known.
    """
    if not symbols.size:
        return b""
    counts = np.bincount(symbols, minlength=alphabet) if counts is None else counts
    form = symbol_form(counts)
    head = bytes([form.kind])
    if form.kind == _CONSTANT:
        return head + varint(int(symbols[0]))
    if form.kind == _PLAIN:
        return head + pack_bits(symbols, _width(alphabet))
    used = np.flatnonzero(counts)
    first, span = int(used[0]), int(used[-1] - used[0]) + 1
    head += varint(first) + varint(span)
    own, lanes = counts[first : first + span], lanes_of(symbols.size)
    shifted = symbols - symbols.dtype.type(first)
    if form.kind == _HUFFMAN:
        lengths = code_lengths(own)
        lane_bits, data = huffman_encode(shifted, lengths, lanes)
        directory = lane_bits.astype("<u4").tobytes() if lanes > 1 else varint(int(lane_bits[0]))
        return head + pack_bits(lengths, 4) + directory + data
    freqs = frequencies(own, form.precision)
    states, words = rans_encode(shifted, freqs, form.precision, lanes)
    table = bytes([form.precision]) + _table(freqs)
    return head + table + states.astype("<u4").tobytes() + varint(words.size) + words.astype("<u2").tobytes()


def read_symbols(cursor: Cursor, alphabet: int, count: int) -> np.ndarray:
    """What `write_symbols` wrote: whole numbers below the alphabet, (count,).

    Raises:
        DamagedSectionError: it is not what that writes.
    """
    if count == 0:
        return np.zeros(0, dtype=np.uint16)
    kind = cursor.byte()
    if kind == _CONSTANT:
        return np.full(count, cursor.varint(alphabet), dtype=np.uint16)
    if kind == _PLAIN:
        found = cursor.bits(_width(alphabet), count)
        if int(found.max()) >= alphabet:
            raise DamagedSectionError(f"has the symbol {int(found.max())} of {alphabet}")
        return found
    if kind not in (_HUFFMAN, _RANS):
        raise DamagedSectionError(f"has symbols in the unknown form {kind}")
    first = cursor.varint(alphabet)
    span = cursor.varint(alphabet - first + 1)
    lanes = lanes_of(count)
    if kind == _HUFFMAN:
        lengths = cursor.bits(4, span).astype(np.uint8)
        if lanes > 1:
            lane_bits = cursor.array("<u4", lanes).astype(np.int64)
        else:
            lane_bits = np.array([cursor.varint(1 << 48)])
        data = cursor.take(-(-int(lane_bits.sum()) // 8))
        return huffman_decode(data, lane_bits, lengths, count) + np.uint16(first)
    precision = cursor.byte()
    if not 1 <= precision <= 15:
        raise DamagedSectionError(f"has frequencies of {precision} bits")
    freqs = _read_table(cursor, span)
    if int(freqs.sum()) != 1 << precision:
        raise DamagedSectionError("has frequencies of a wrong sum")
    states = cursor.array("<u4", lanes)
    words = cursor.array("<u2", cursor.varint(1 << 48))
    return rans_decode(states, words, freqs, precision, count) + np.uint16(first)


def _width(alphabet: int) -> int:
    return max(1, (alphabet - 1).bit_length())


def _bit_lengths(freqs: np.ndarray) -> np.ndarray:
    return np.where(freqs > 0, np.floor(np.log2(np.maximum(freqs, 1))).astype(np.int64) + 1, 0)


def _table_bytes(freqs: np.ndarray) -> int:
    lengths = _bit_lengths(freqs)
    return -(-4 * freqs.size // 8) + -(-int(np.maximum(lengths - 1, 0).sum()) // 8)


def _table(freqs: np.ndarray) -> bytes:
    """The bit length of each frequency in 4 bits; then, of each, what follows its highest bit."""
    lengths = _bit_lengths(freqs)
    rest = "".join(f"{freq:b}"[1:] for freq in freqs.tolist() if freq)
    digits = np.frombuffer(rest.encode(), dtype=np.uint8) - ord("0")
    return pack_bits(lengths, 4) + np.packbits(digits).tobytes()


def _read_table(cursor: Cursor, span: int) -> np.ndarray:
    lengths = cursor.bits(4, span).tolist()
    total = sum(max(0, length - 1) for length in lengths)
    digits = "".join(map(str, cursor.bits(1, total).tolist()))
    found, place = [], 0
    for length in lengths:
        rest = digits[place : place + max(0, length - 1)]
        found.append(int(f"1{rest}", 2) if length else 0)
        place += len(rest)
    return np.array(found, dtype=np.int64)
