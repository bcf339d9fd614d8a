"""Reading a packed section from front to back, never past its end; and the numbers such a section is made of.

    varint     7 bits a byte, the lowest first; the highest bit says that another byte follows
    signed     2v for v >= 0, -2v - 1 for v < 0, as a varint
    bits       the first one in the highest bit of the first byte; what is left of the last byte is 0

Knows nothing about what the numbers mean.
"""

from __future__ import annotations

import numpy as np

__all__ = ["Cursor", "DamagedSectionError", "pack_bits", "signed_varint", "unpack_bits", "varint"]

_LONGEST_VARINT = 10


class DamagedSectionError(Exception):
    """A section that no packing can have written; becomes an error that names the file and the tensor."""


class Cursor:
    """The bytes of a section and how far they have been read.

    Every method raises `DamagedSectionError` rather than read past the end.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.place = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > len(self.data) - self.place:
            raise DamagedSectionError(f"asks for {count} bytes where {len(self.data) - self.place} are left")
        found = self.data[self.place : self.place + count]
        self.place += count
        return found

    def byte(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def varint(self, below: int) -> int:
        """The next whole number, less than `below`."""
        value = 0
        for index in range(_LONGEST_VARINT):
            byte = self.byte()
            value |= (byte & 127) << (7 * index)
            if byte < 128:
                if value >= below:
                    raise DamagedSectionError(f"has the number {value} where less than {below} is possible")
                return value
        raise DamagedSectionError("has a number without end")

    def signed(self, below: int) -> int:
        """The next number with a sign, of a magnitude less than `below`."""
        value = self.varint(2 * below)
        return -((value + 1) >> 1) if value & 1 else value >> 1

    def array(self, kind: str, count: int) -> np.ndarray:
        """The next `count` little-endian numbers of a numpy type such as '<u2'."""
        return np.frombuffer(self.take(count * np.dtype(kind).itemsize), dtype=kind)

    def bits(self, width: int, count: int) -> np.ndarray:
        """The next `count` numbers of `width` bits each, up to the end of their last byte."""
        return unpack_bits(self.take(-(-width * count // 8)), width, count)

    def finish(self) -> None:
        """See to it that nothing but zeros, which pad a section, is left."""
        if any(self.data[self.place :]):
            raise DamagedSectionError(f"has bytes left over after byte {self.place}")


def varint(value: int) -> bytes:
    """A whole number from 0."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def signed_varint(value: int) -> bytes:
    """A whole number with a sign."""
    return varint(2 * value if value >= 0 else -2 * value - 1)


def pack_bits(values: np.ndarray, width: int) -> bytes:
    """Numbers of `width` bits, 0 to 32, one after the other without gaps.

    Args:
        values: (count,), each less than 2^width.
        width: 0 to 32.
    """
    if width == 0 or values.size == 0:
        return b""
    if width == 8:
        return values.astype(np.uint8).tobytes()
    single = np.empty((values.size, width), dtype=np.uint8)
    for bit in range(width):
        single[:, width - 1 - bit] = (values >> values.dtype.type(bit)) & values.dtype.type(1)
    return np.packbits(single.ravel()).tobytes()


def unpack_bits(data: bytes, width: int, count: int) -> np.ndarray:
    """What `pack_bits` has packed: int64, (count,)."""
    raw = np.frombuffer(data, dtype=np.uint8)
    if width == 8:
        return raw.astype(np.int64)
    single = np.unpackbits(raw, count=width * count).reshape(count, width)
    values = np.zeros(count, dtype=np.int64)
    for bit in range(width):
        values = (values << 1) | single[:, bit]
    return values
