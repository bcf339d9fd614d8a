"""The header of a packed file: what is in it and where, checked before anything is believed.

    8 bytes   89 44 53 5A 0D 0A 1A 0A
    uint32    version, 1
    uint32    bytes of the header as stored
    uint32    bytes of the header
    ...       the header, JSON in UTF-8, compressed (zlib)
    uint32    CRC-32 of all of this but the first 8 bytes
    ...       a section for each tensor, and after each the CRC-32 of it
    16 bytes  BLAKE2b of all that is before

Knows nothing about what sections hold.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

from distiller.errors import CheckpointError, did_you_mean
from distiller.packing.tensors import DTYPES, ENCODINGS, MOST_ELEMENTS

__all__ = ["CHECKSUM", "DIGEST", "MAGIC", "Entry", "Header", "least_section", "read_header", "written_header"]

MAGIC = b"\x89DSZ\r\n\x1a\n"
VERSION = 1
CHECKSUM = 4
DIGEST = 16
_PRELUDE = struct.Struct("<III")
_LARGEST = 1 << 28
_RATIO = 1 << 16
_COPY = "use another copy of the file"


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor and its section.

    Attributes:
        name: in the state; or where in the structure it is.
        dtype: name of its type.
        shape: of the tensor.
        encoding: of the section.
        length: bytes of the section, without its checksum.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    encoding: str
    length: int

    @property
    def nbytes(self) -> int:
        """What the tensor takes in memory."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Header:
    """What a file holds.

    Attributes:
        structure: plain data as JSON.
        tensors: the state, in order.
        others: tensors of the structure, behind them.
        end: place of the first section.
    """

    structure: Any
    tensors: tuple[Entry, ...]
    others: tuple[Entry, ...]
    end: int

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All, in the order of their sections."""
        return self.tensors + self.others

    @property
    def file_bytes(self) -> int:
        """What the whole file must have."""
        return self.end + sum(entry.length + CHECKSUM for entry in self.entries) + DIGEST


def least_section(nbytes: int) -> int:
    """The bytes that a section of a tensor of so many bytes must have at least: a 65,536th."""
    return -(-nbytes // _RATIO)


def written_header(structure: Any, tensors: list[Entry], others: list[Entry]) -> bytes:
    """All that is before the first section.

    Raises:
        CheckpointError: it would be larger than what is read.
    """
    tables = [
        [[e.name, e.dtype, list(e.shape), e.encoding, e.length] for e in part] for part in (tensors, others)
    ]
    document = {"structure": structure, "tensors": tables[0], "others": tables[1]}
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    if len(text) > _LARGEST:
        raise CheckpointError(f"pack: the structure takes {len(text):,} bytes, more than {_LARGEST:,}")
    stored = zlib.compress(text, 9)
    body = _PRELUDE.pack(VERSION, len(stored), len(text)) + stored
    return MAGIC + body + struct.pack("<I", zlib.crc32(body))


def read_header(file: BinaryIO, size: int, path: Any) -> Header:
    """Read and check what is before the first section.

    Args:
        file: at its beginning.
        size: of the file.
        path: for messages.

    Raises:
        CheckpointError: it is no packed file, of another version, cut off or damaged.
    """
    magic = file.read(len(MAGIC))
    if magic != MAGIC[: len(magic)] or not magic:
        raise CheckpointError(
            f"{path}: is not a packed file: starts with {magic!r}; give a file that --pack wrote"
        )
    prelude = file.read(_PRELUDE.size)
    if len(prelude) < _PRELUDE.size:
        raise CheckpointError(f"{path}: is cut off in its header; {_COPY}")
    version, stored_size, text_size = _PRELUDE.unpack(prelude)
    if version != VERSION:
        raise CheckpointError(
            f"{path}: header has version {version}, this library reads {VERSION}; use the library's version "
            "that wrote it, or another copy of the file if that was this one"
        )
    end = len(MAGIC) + _PRELUDE.size + stored_size + CHECKSUM
    if end > size:
        raise CheckpointError(
            f"{path}: is cut off in its header, or that is damaged: it would end at byte {end:,} of "
            f"{size:,}; {_COPY}"
        )
    stored = file.read(stored_size)
    if struct.pack("<I", zlib.crc32(prelude + stored)) != file.read(CHECKSUM):
        raise CheckpointError(f"{path}: header is damaged: its checksum is wrong; {_COPY}")
    try:
        header = _parsed(stored, text_size, end)
    except (ValueError, TypeError, RecursionError, zlib.error) as error:
        raise CheckpointError(f"{path}: header is malformed: {error}; {_COPY}") from error
    _check_size(header, size, path)
    return header


def _parsed(stored: bytes, text_size: int, end: int) -> Header:
    if text_size > _LARGEST:
        raise ValueError(f"would have {text_size:,} bytes")
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(stored, text_size + 1)
    if len(text) != text_size or not unpacker.eof or unpacker.unused_data:
        raise ValueError(f"has not the {text_size:,} bytes that it should have")
    document = json.loads(text.decode(), parse_constant=_refuse_constant)
    if not isinstance(document, dict) or set(document) != {"structure", "tensors", "others"}:
        raise ValueError("must have 'structure', 'tensors' and 'others'")
    tensors, others = (_entries(document[key], key) for key in ("tensors", "others"))
    if len({entry.name for entry in tensors}) < len(tensors):
        raise ValueError("has two tensors of one name")
    return Header(document["structure"], tensors, others, end)


def _refuse_constant(text: str) -> None:
    raise ValueError(f"has {text}, which JSON does not have")


def _entries(table: Any, key: str) -> tuple[Entry, ...]:
    if not isinstance(table, list):
        raise ValueError(f"'{key}' must be a list")
    return tuple(_entry(row, f"{key}[{index}]") for index, row in enumerate(table))


def _entry(row: Any, place: str) -> Entry:
    if not isinstance(row, list) or len(row) != 5 or not isinstance(row[0], str):
        raise ValueError(f"'{place}' must be name, type, shape, encoding and length")
    name, dtype, shape, encoding, length = row
    where = f"tensor '{name}'"
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where} has the unknown type {dtype!r}{did_you_mean(str(dtype), DTYPES)}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n <= MOST_ELEMENTS for n in shape):
        raise ValueError(f"{where} has the impossible shape {shape!r}")
    if len(shape) > 64 or prod(shape) > MOST_ELEMENTS:
        raise ValueError(f"{where} has the impossible shape {shape!r}")
    if encoding not in ENCODINGS:
        raise ValueError(f"{where} has the unknown encoding {encoding!r}; a later version may know it")
    if type(length) is not int or length < 0:
        raise ValueError(f"{where} has the impossible length {length!r}")
    entry = Entry(name, dtype, tuple(shape), encoding, length)
    if encoding != "same" and length < least_section(entry.nbytes):
        raise ValueError(
            f"{where} of shape {shape} cannot be in {length:,} bytes, the least for its {entry.nbytes:,} "
            f"bytes is {least_section(entry.nbytes):,}"
        )
    return entry


def _check_size(header: Header, size: int, path: Any) -> None:
    """See to it that the file ends where the header says."""
    if size == header.file_bytes:
        return
    if size > header.file_bytes:
        raise CheckpointError(
            f"{path}: has {size - header.file_bytes:,} bytes after its end, at byte {header.file_bytes:,}; "
            f"{_COPY}"
        )
    place, where = header.end, "its digest"
    for entry in header.entries:
        place += entry.length + CHECKSUM
        if place > size:
            where = f"tensor '{entry.name}'"
            break
    raise CheckpointError(
        f"{path}: is cut off in {where}: has {size:,} of {header.file_bytes:,} bytes; {_COPY}"
    )
