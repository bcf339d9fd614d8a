"""A reader of packed files written from docs/packed_files.md alone: pure Python, a bit and a symbol at a time."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from dataclasses import dataclass, field
from math import prod

SIZES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "complex64": 4,
    "complex128": 8, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1,
    "bool": 1,
}  # fmt: skip


@dataclass
class Bytes:
    data: bytes
    place: int = 0

    def take(self, count: int) -> bytes:
        assert self.place + count <= len(self.data)
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.number(1)
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def signed(self) -> int:
        value = self.varint()
        return -(value + 1) // 2 if value % 2 else value // 2


@dataclass
class Bits:
    data: bytes
    place: int = 0

    def read(self, count: int) -> int:
        value = 0
        for _ in range(count):
            value = value << 1 | self.data[self.place // 8] >> (7 - self.place % 8) & 1
            self.place += 1
        return value


def bits(source: Bytes, count: int) -> Bits:
    return Bits(source.take((count + 7) // 8))


def symbols(source: Bytes, alphabet: int, n: int) -> list[int]:
    if n == 0:
        return []
    form = source.number(1)
    if form == 0:
        return [source.varint()] * n
    if form == 1:
        width = max(1, (alphabet - 1).bit_length())
        stream = bits(source, width * n)
        return [stream.read(width) for _ in range(n)]
    first, span = source.varint(), source.varint()
    lanes = min(max(1, n // 4096), 16384)
    found = [0] * n
    if form == 2:
        stream = bits(source, 4 * span)
        lengths = {first + i: stream.read(4) for i in range(span)}
        codes, code, before = {}, 0, 0
        for symbol in sorted((s for s in lengths if lengths[s]), key=lambda s: (lengths[s], s)):
            code <<= lengths[symbol] - before
            codes[lengths[symbol], code] = symbol
            code, before = code + 1, lengths[symbol]
        assert code == 1 << before  # complete
        sizes = [source.varint()] if lanes == 1 else [source.number(4) for _ in range(lanes)]
        stream = bits(source, sum(sizes))
        for lane in range(lanes):
            end = stream.place + sizes[lane]
            for i in range(lane, n, lanes):
                length = code = 0
                while (length, code) not in codes:
                    length, code = length + 1, code << 1 | stream.read(1)
                found[i] = codes[length, code]
            assert stream.place == end
        return found
    assert form == 3
    r = source.number(1)
    stream = bits(source, 4 * span)
    widths = [stream.read(4) for _ in range(span)]
    stream = bits(source, sum(max(0, width - 1) for width in widths))
    frequencies = [1 << width - 1 | stream.read(width - 1) if width else 0 for width in widths]
    assert sum(frequencies) == 2**r
    begins = [sum(frequencies[:i]) for i in range(span)]
    of_slot = [i for i in range(span) for _ in range(frequencies[i])]
    states = [source.number(4) for _ in range(lanes)]
    words = [source.number(2) for _ in range(source.varint())]
    place = 0
    for i in range(n):
        x = states[i % lanes]
        symbol = of_slot[x % 2**r]
        x = frequencies[symbol] * (x // 2**r) + x % 2**r - begins[symbol]
        if x < 2**16:
            x, place = 2**16 * x + words[place], place + 1
        states[i % lanes], found[i] = x, first + symbol
    assert place == len(words)
    assert set(states) == {2**16}
    return found


def gaps(source: Bytes, n: int) -> list[int]:
    if n == 0:
        return []
    k = source.number(1)
    tokens = symbols(source, 2**k * (41 - k), n)
    extra = [(t - 2**k) // 2**k if t >= 2**k else 0 for t in tokens]
    stream = bits(source, sum(extra))
    return [
        (2**k + (t - 2**k) % 2**k) * 2**e + stream.read(e) if t >= 2**k else t
        for t, e in zip(tokens, extra, strict=True)
    ]


def single(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def values(source: Bytes, form: str, n: int, dtype: str, rows: list[int], row_count: int) -> list[int]:
    size = SIZES[dtype]
    if form == "raw":
        return [source.number(size) for _ in range(n)]
    if form == "planes":
        planes = [symbols(source, 256, n) for _ in range(size)]
        found = [int.from_bytes(bytes(column), "big") for column in zip(*planes, strict=True)]
        if ("float" in dtype or "complex" in dtype) and size > 1:
            found = [value >> 1 | (value & 1) << (8 * size - 1) for value in found]
        return found
    if form == "codebook":
        count = source.varint() + 1
        table = [source.number(size) for _ in range(count)]
        return [table[symbol] for symbol in symbols(source, count, n)]
    if form == "rowcodebook":
        counts = gaps(source, row_count)
        tables = [[source.number(size) for _ in range(count)] for count in counts]
        codes = symbols(source, max(counts), n)
        return [tables[row][code] for row, code in zip(rows, codes, strict=True)]
    if form.endswith("+"):
        number = source.varint()
        jumps = gaps(source, number)
        patterns = [source.number(4) for _ in range(number)]
        found = values(source, form[:-1], n, dtype, rows, row_count)
        place = -1
        for jump, pattern in zip(jumps, patterns, strict=True):
            place += jump + 1
            found[place] = pattern
        return found
    scales = [struct.unpack("<f", source.take(4))[0] for _ in range(1 if form == "grid" else row_count)]
    low = source.signed()
    alphabet = source.varint() + 1
    steps = [symbol + low for symbol in symbols(source, alphabet, n)]
    of_each = [scales[0]] * n if form == "grid" else [scales[row] for row in rows]
    products = [single(step * scale) for step, scale in zip(steps, of_each, strict=True)]  # exact in float64
    return [int.from_bytes(struct.pack("<f", product), "little") for product in products]


@dataclass
class Slow:
    structure: object
    others: list = field(default_factory=list)
    tensors: dict[str, tuple[str, list[int], list[int]]] = field(default_factory=dict)


def read(data: bytes) -> Slow:
    """Name -> (type, shape, patterns), of every tensor of the state."""
    assert hashlib.blake2b(data[:-16], digest_size=16).digest() == data[-16:]
    source = Bytes(data[:-16])
    assert source.take(8) == bytes.fromhex("8944535A0D0A1A0A")
    assert source.number(4) == 1
    stored, size = source.number(4), source.number(4)
    text = zlib.decompress(source.take(stored))
    assert len(text) == size
    assert source.number(4) == zlib.crc32(data[8 : 20 + stored])
    header = json.loads(text)
    done: list[tuple[str, list[int], list[int]]] = []
    for _name, dtype, shape, encoding, length in header["tensors"] + header["others"]:
        section = Bytes(source.take(length))
        assert source.number(4) == zlib.crc32(section.data)
        patterns = decoded(section, dtype, shape, encoding, done)
        assert not any(section.data[section.place :])
        done.append((dtype, shape, patterns))
    assert source.place == len(source.data)
    names = [entry[0] for entry in header["tensors"]]
    return Slow(header["structure"], done[len(names) :], dict(zip(names, done, strict=False)))


def decoded(section: Bytes, dtype: str, shape: list[int], encoding: str, done: list) -> list[int]:
    count = prod(shape) * (2 if dtype.startswith("complex") else 1)
    if encoding == "same":
        return done[section.varint()][2]
    if encoding == "map":
        other = done[section.varint()][2]
        table = [section.number(SIZES[dtype]) for _ in range(section.varint())]
        return [table[sorted(set(other)).index(pattern)] for pattern in other]
    where, form = encoding.split("/")
    rows = shape[0] if len(shape) > 1 and count else 1
    columns = max(1, count // rows)
    indices = list(range(count))
    if where != "dense":
        indices, place = [], -1
        for gap in gaps(section, section.varint()):
            place += gap + 1
            indices.append(place if where == "sparse" else place % rows * columns + place // rows)
    patterns = [0] * count
    found = values(section, form, len(indices), dtype, [index // columns for index in indices], rows)
    for index, pattern in zip(indices, found, strict=True):
        patterns[index] = pattern
    return patterns
