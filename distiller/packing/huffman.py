"""Canonical Huffman codes of at most 15 bits, of many symbols at a time.

Codes follow from their lengths: shorter ones first, of one length those of smaller symbols first, each the
one before it plus one. Symbols go to lanes in turns, symbol i to lane i mod lanes; the bits of a lane follow
those of the lane before it without a gap. All lanes are read at once, which makes numpy fast enough.
Source of the lengths: Larmore and Hirschberg, "A fast algorithm for optimal length-limited Huffman codes",
Journal of the ACM 37, 1990.
Knows nothing about files.
"""

from __future__ import annotations

import numpy as np

from distiller.packing.cursor import DamagedSectionError

__all__ = ["LONGEST", "canonical_codes", "code_lengths", "huffman_decode", "huffman_encode"]

LONGEST = 15
"""Bits of the longest code."""
_CHUNK = 1 << 20
_FEW_LANES = 8


def code_lengths(counts: np.ndarray) -> np.ndarray:
    """The lengths that make a text shortest, none above 15, by package-merge.

    Args:
        counts: how often each symbol occurs, (alphabet,); two symbols or more do, 2^15 at most.

    Returns:
        uint8, (alphabet,); 0 for a symbol that does not occur.
    """
    symbols = np.flatnonzero(counts)
    order = symbols[np.argsort(counts[symbols], kind="stable")]
    leaves = counts[order].astype(np.int64)
    levels: list[np.ndarray] = []
    row = leaves
    for _ in range(LONGEST - 1):
        pairs = row[: row.size // 2 * 2].reshape(-1, 2).sum(1)
        both = np.concatenate([leaves, pairs])
        places = np.argsort(both, kind="stable")
        levels.append(places < leaves.size)
        row = both[places]
    depth = np.zeros(leaves.size, dtype=np.uint8)
    chosen = 2 * leaves.size - 2
    for is_leaf in reversed(levels):
        taken = int(is_leaf[:chosen].sum())
        depth[:taken] += 1
        chosen = 2 * (min(chosen, is_leaf.size) - taken)
    depth[:chosen] += 1
    lengths = np.zeros(counts.size, dtype=np.uint8)
    lengths[order] = depth
    return lengths


def canonical_codes(lengths: np.ndarray) -> np.ndarray:
    """The code of each symbol, int64, (alphabet,).

    Raises:
        DamagedSectionError: no complete code has these lengths.
    """
    used = lengths[lengths > 0].astype(np.int64)
    if not used.size or int((1 << (LONGEST - used)).sum()) != 1 << LONGEST:
        raise DamagedSectionError("has lengths of codes that leave some out, or are too many")
    order = np.lexsort((np.arange(lengths.size), lengths))
    order = order[lengths[order] > 0]
    shares = 1 << (LONGEST - lengths[order].astype(np.int64))
    begins = np.concatenate([[0], np.cumsum(shares)[:-1]])
    codes = np.zeros(lengths.size, dtype=np.int64)
    codes[order] = begins >> (LONGEST - lengths[order].astype(np.int64))
    return codes


def huffman_encode(symbols: np.ndarray, lengths: np.ndarray, lanes: int) -> tuple[np.ndarray, bytes]:
    """The bits of each lane, (lanes,), and all of them together.

    Args:
        symbols: whole numbers below the alphabet, (count,).
        lengths: of the codes of the alphabet, (alphabet,).
        lanes: 1 or more, not more than symbols.
    """
    codes = canonical_codes(lengths)
    lane_bits = np.array([int(lengths[symbols[lane::lanes]].sum(dtype=np.int64)) for lane in range(lanes)])
    total = int(lane_bits.sum())
    single = np.zeros(total, dtype=np.uint8)
    start = 0
    for lane in range(lanes):
        own = symbols[lane::lanes]
        for begin in range(0, own.size, _CHUNK):
            chunk = own[begin : begin + _CHUNK]
            sizes = lengths[chunk].astype(np.int64)
            ends = start + np.cumsum(sizes)
            values = codes[chunk]
            for bit in range(int(sizes.max())):  # from the last bit of each code
                has = sizes > bit
                single[(ends - 1 - bit)[has]] = (values[has] >> bit) & 1
            start = int(ends[-1])
    return lane_bits, np.packbits(single).tobytes()


def huffman_decode(data: bytes, lane_bits: np.ndarray, lengths: np.ndarray, count: int) -> np.ndarray:
    """What `huffman_encode` has made its text of: uint16, (count,).

    Raises:
        DamagedSectionError: a lane does not end where it should.
    """
    width = int(lengths.max(initial=0))
    codes = canonical_codes(lengths)
    order = np.flatnonzero(lengths)
    order = order[np.argsort(codes[order] << (width - lengths[order].astype(np.int64)))]
    shares = 1 << (width - lengths[order].astype(np.int64))
    symbol_of = np.repeat(order, shares).astype(np.uint16)
    length_of = np.repeat(lengths[order], shares).astype(np.int64)
    lanes = lane_bits.size
    ends = np.cumsum(lane_bits.astype(np.int64))
    places = ends - lane_bits
    if lanes < _FEW_LANES:
        return _decode_few(data, places, ends, (symbol_of, length_of, width), count)
    raw = np.concatenate([np.frombuffer(data, dtype=np.uint8), np.zeros(3, dtype=np.uint8)]).astype(np.int64)
    windows = (raw[:-2] << 16) | (raw[1:-1] << 8) | raw[2:]
    found = np.empty(count, dtype=np.uint16)
    mask = (1 << width) - 1
    for begin in range(0, count, lanes):
        active = min(lanes, count - begin)
        now = places[:active]
        seen = windows.take(now >> 3, mode="clip") >> (24 - width - (now & 7)) & mask
        found[begin : begin + active] = symbol_of[seen]
        now += length_of[seen]
    if not np.array_equal(places, ends):
        raise DamagedSectionError("has Huffman codes that do not end where they should")
    return found


def _decode_few(
    data: bytes,
    places: np.ndarray,
    ends: np.ndarray,
    table: tuple[np.ndarray, np.ndarray, int],
    count: int,
) -> np.ndarray:
    """The same for so few lanes that numpy's calls would cost more than they save."""
    symbol_of, length_of, width = table[0].tolist(), table[1].tolist(), table[2]
    found = np.empty(count, dtype=np.uint16)
    lanes, mask = places.size, (1 << width) - 1
    padded = data + bytes(3)
    for lane in range(lanes):
        place, last, out = int(places[lane]), int(ends[lane]), []
        for _ in range(lane, count, lanes):
            first = place >> 3
            if first >= len(data):
                break
            window = padded[first] << 16 | padded[first + 1] << 8 | padded[first + 2]
            seen = window >> (24 - width - (place & 7)) & mask
            out.append(symbol_of[seen])
            place += length_of[seen]
        if place != last or len(out) != len(range(lane, count, lanes)):
            raise DamagedSectionError("has Huffman codes that do not end where they should")
        found[lane::lanes] = out
    return found
