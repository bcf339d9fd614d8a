"""Range coding in the form of rANS: a symbol costs the logarithm of its frequency, to fractions of a bit.

    encode   x -> (x // f) * 2^r + c + x mod f         (symbols from the last to the first)
    decode   s: the symbol whose [c, c + f) holds x mod 2^r;  x -> f * (x >> r) + x mod 2^r - c

with f and c the frequency of the symbol and the sum of those before it, of 2^r in all. The state x stays in
[2^16, 2^32): before a symbol is encoded that would lead out of it (x >= f * 2^(32 - r)) the low 16 bits are
written, and a decoded state below 2^16 takes 16 bits in. Symbols go to lanes in turns, symbol i to lane
i mod lanes; words are in the order in which they are read: by symbol. A state begins at 2^16, so that is what
a decoder must end with.
Source: Duda, "Asymmetric numeral systems", arXiv 1311.2540; Giesen, "Interleaved entropy coders",
arXiv 1402.3392.
Knows nothing about files.
"""

from __future__ import annotations

import numpy as np

from distiller.packing.cursor import DamagedSectionError

__all__ = ["frequencies", "rans_decode", "rans_encode"]

_LOW = 1 << 16
_FEW_LANES = 8


def frequencies(counts: np.ndarray, precision: int) -> np.ndarray:
    """Frequencies of sum 2^precision, none 0 for a symbol that occurs.

    Args:
        counts: how often each symbol occurs, (alphabet,); two symbols or more do.
        precision: 1 to 15; 2^precision is at least the number of symbols that occur.

    Returns:
        int64, (alphabet,).
    """
    total = 1 << precision
    exact = counts * (total / counts.sum())
    found = np.where(counts > 0, np.maximum(1, np.floor(exact + 0.5)), 0).astype(np.int64)
    while (excess := int(found.sum()) - total) != 0:
        # What one unit more or less of a symbol changes the length of the text by decides.
        able = np.flatnonzero(found > 1) if excess > 0 else np.flatnonzero(found)
        step = -1 if excess > 0 else 1
        cost = counts[able] * np.log2(found[able] / (found[able] + step))
        chosen = able[np.argsort(cost, kind="stable")[: min(abs(excess), able.size)]]
        found[chosen] += step
    return found


def rans_encode(
    symbols: np.ndarray, freqs: np.ndarray, precision: int, lanes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The last state of each lane, uint32, (lanes,), and the words, uint16.

    Args:
        symbols: whole numbers below the alphabet, (count,).
        freqs: (alphabet,), of sum 2^precision.
        precision: 1 to 15.
        lanes: 1 or more, not more than symbols.
    """
    begins = np.cumsum(freqs) - freqs
    if lanes < _FEW_LANES:
        return _encode_few(symbols, freqs, begins, precision, lanes)
    state = np.full(lanes, _LOW, dtype=np.int64)
    words: list[np.ndarray] = []
    last = (symbols.size - 1) // lanes * lanes
    for begin in range(last, -1, -lanes):
        chunk = symbols[begin : begin + lanes]
        x = state[: chunk.size]
        freq = freqs[chunk]
        is_full = x >= freq << (32 - precision)
        words.append((x[is_full] & 0xFFFF).astype(np.uint16))
        x[is_full] >>= 16
        quotient, rest = np.divmod(x, freq)
        x[:] = (quotient << precision) + rest + begins[chunk]
    joined = np.concatenate(words[::-1]) if words else np.empty(0, dtype=np.uint16)
    return state.astype(np.uint32), joined


def rans_decode(
    states: np.ndarray, words: np.ndarray, freqs: np.ndarray, precision: int, count: int
) -> np.ndarray:
    """What `rans_encode` has made its text of: uint16, (count,).

    Raises:
        DamagedSectionError: the states and words are of no text of so many symbols.
    """
    begins = np.cumsum(freqs) - freqs
    symbol_of = np.repeat(np.arange(freqs.size), freqs)
    lanes = states.size
    state = states.astype(np.int64)
    if lanes and int(state.min()) < _LOW:
        raise DamagedSectionError("has a state that is too small")
    if lanes < _FEW_LANES:
        return _decode_few(state, words, freqs, (begins, symbol_of, precision), count)
    freq_of = freqs[symbol_of]
    rest_of = np.arange(1 << precision) - begins[symbol_of]
    names = symbol_of.astype(np.uint16)
    waiting = words.astype(np.int64)
    found = np.empty(count, dtype=np.uint16)
    place, mask = 0, (1 << precision) - 1
    for begin in range(0, count, lanes):
        x = state[: min(lanes, count - begin)]
        slot = x & mask
        found[begin : begin + x.size] = names[slot]
        x >>= precision
        x *= freq_of[slot]
        x += rest_of[slot]
        low = np.flatnonzero(x < _LOW)
        if low.size:
            taken = waiting[place : place + low.size]
            if taken.size < low.size:
                raise DamagedSectionError("has too few words")
            x[low] = x[low] << 16 | taken
            place += low.size
    if place != words.size or not bool((state == _LOW).all()):
        raise DamagedSectionError("has words or states that do not end where they should")
    return found


def _encode_few(
    symbols: np.ndarray, freqs: np.ndarray, begins: np.ndarray, precision: int, lanes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The same for so few lanes that numpy's calls would cost more than they save."""
    freq_of, begin_of = freqs.tolist(), begins.tolist()
    state, words = [_LOW] * lanes, []
    for index in range(symbols.size - 1, -1, -1):
        symbol, lane = int(symbols[index]), index % lanes
        x, freq = state[lane], freq_of[symbol]
        if x >= freq << (32 - precision):
            words.append(x & 0xFFFF)
            x >>= 16
        state[lane] = ((x // freq) << precision) + x % freq + begin_of[symbol]
    return np.array(state, dtype=np.uint32), np.array(words[::-1], dtype=np.uint16)


def _decode_few(
    states: np.ndarray,
    words: np.ndarray,
    freqs: np.ndarray,
    table: tuple[np.ndarray, np.ndarray, int],
    count: int,
) -> np.ndarray:
    freq_of, begin_of, symbol_of, precision = freqs.tolist(), table[0].tolist(), table[1].tolist(), table[2]
    state, waiting = states.tolist(), words.tolist()
    found, place, mask, lanes = [], 0, (1 << precision) - 1, len(state)
    for index in range(count):
        x = state[index % lanes]
        slot = x & mask
        symbol = symbol_of[slot]
        x = freq_of[symbol] * (x >> precision) + slot - begin_of[symbol]
        if x < _LOW:
            if place == len(waiting):
                raise DamagedSectionError("has too few words")
            x = x << 16 | waiting[place]
            place += 1
        state[index % lanes] = x
        found.append(symbol)
    if place != len(waiting) or any(x != _LOW for x in state):
        raise DamagedSectionError("has words or states that do not end where they should")
    return np.array(found, dtype=np.uint16)
