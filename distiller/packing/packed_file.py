"""Packed files: tensors and plain data in as few bytes as they honestly take, read back bit for bit.

Written whole or not at all, tensor by tensor; read alike, after all checksums have been found right.
Nothing in a file is run. The format is described in docs/packed_files.md.
Knows nothing about models or checkpoints.
"""

from __future__ import annotations

import hashlib
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from distiller.atomic_file import replacing
from distiller.errors import CheckpointError, require
from distiller.packing.cursor import Cursor, DamagedSectionError, varint
from distiller.packing.header import (
    CHECKSUM,
    DIGEST,
    MAGIC,
    Entry,
    Header,
    least_section,
    read_header,
    written_header,
)
from distiller.packing.plain_json import from_json, to_json
from distiller.packing.report import PackReport, TensorReport
from distiller.packing.tensors import (
    DTYPES,
    kind_of,
    mapped,
    patterns_of,
    read_map,
    read_tensor,
    tensor_of,
    write_tensor,
)

__all__ = ["PackedFile", "is_packed", "pack_tensors", "packed_tensors", "unpack_tensors"]

_CHUNK = 1 << 20
_COPY = "use another copy of the file"
_FEW_VALUES = ("codebook", "grid")
_MAP_SOURCES = 2


@dataclass(frozen=True, slots=True)
class PackedFile:
    """What a packed file holds.

    Attributes:
        structure: the plain data.
        tensors: by name. Those that are equal in all bits are one tensor.
        report: what the file takes; its `original_bytes` are those of the tensors.
    """

    structure: Any
    tensors: dict[str, Tensor]
    report: PackReport


def pack_tensors(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    structure: Any = None,
    original_bytes: int | None = None,
) -> PackReport:
    """Write tensors and plain data into a packed file.

    What is written is exact: each bit of each element, NaNs and signs of zeros included. Tensors are asked
    for by their names one after the other, so that a mapping that makes them when asked needs memory for one
    or two.

    Args:
        tensors: by name; dense, of any of the types of numbers.
        path: the file; one that is there is replaced when the new one is whole.
        structure: numbers, text, tensors, and lists, tuples and dicts of them.
        original_bytes: what the file's size is compared with; default what the tensors take in memory, those
            that share it once.

    Raises:
        CheckpointError: the file cannot be written, a tensor is not dense, or something is not plain data.
    """
    require(tensors, Mapping, "pack_tensors: tensors", "a mapping of tensors by name")
    require(path, (str, os.PathLike), "pack_tensors: path", "a path")
    path = Path(path)
    others: list[tuple[str, Tensor]] = []
    plain = to_json(structure, "structure", others)
    try:
        with replacing(path) as file, tempfile.TemporaryFile(dir=path.parent) as sections:
            writer = _Writer(sections)
            own = [writer.add(name, tensors[name], lambda other: tensors[other]) for name in tensors]
            hidden = [writer.add(name, tensor, None) for name, tensor in others]
            head = written_header(plain, own, hidden)
            digest = hashlib.blake2b(head, digest_size=DIGEST)
            file.write(head)
            sections.seek(0)
            while chunk := sections.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
            file.write(digest.digest())
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written: {error.strerror or error}; make room, or choose another folder"
        ) from error
    entries = [*own, *hidden]
    return _report(path, entries, len(head), writer.memory if original_bytes is None else original_bytes)


def unpack_tensors(path: str | os.PathLike[str]) -> PackedFile:
    """Read a packed file.

    Raises:
        CheckpointError: it is missing, no packed file, of another version, cut off or damaged; names the
            tensor.
    """
    reader = _Reader(Path(path))
    with reader.opened() as file:
        found: list[Tensor] = []
        for index in range(len(reader.header.entries)):
            found.append(reader.tensor(file, index, found))
    count = len(reader.header.tensors)
    tensors = {entry.name: tensor for entry, tensor in zip(reader.header.tensors, found, strict=False)}
    entries = reader.header.entries
    report = _report(reader.path, entries, reader.header.end, sum(entry.nbytes for entry in entries))
    return PackedFile(reader.structure(found[count:]), tensors, report)


def packed_tensors(path: str | os.PathLike[str]) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors of a packed file one after the other, with memory for one or two of them.

    Raises:
        CheckpointError: as `unpack_tensors`; before the first one where a checksum is wrong.
    """
    reader = _Reader(Path(path))
    with reader.opened() as file:
        for index, entry in enumerate(reader.header.tensors):
            yield entry.name, reader.tensor(file, index, None)


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file that begins as packed ones do."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


class _Writer:
    """Writes sections one after the other.

    Attributes:
        memory: bytes of the tensors so far, those that share memory once.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.memory = 0
        self._count = 0
        self._seen: dict[tuple[Any, ...], tuple[int, str]] = {}
        self._places: set[tuple[Any, ...]] = set()
        self._few: list[tuple[int, str, int]] = []

    def add(self, name: str, tensor: Any, get: Any) -> Entry:
        """Write the section of a tensor.

        Args:
            name: of the tensor.
            tensor: itself.
            get: gives a tensor that was added before, by name; None: there is no asking for them.
        """
        _check_tensor(name, tensor)
        shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        kind, patterns = kind_of(tensor.dtype), patterns_of(tensor)
        self._count_memory(tensor)
        key = (dtype, shape, hashlib.blake2b(patterns.tobytes(), digest_size=32).digest())
        first = self._seen.get(key) if patterns.size else None
        if first is not None:
            return self._section(name, dtype, shape, "same", varint(first[0]))
        encoding, data = write_tensor(patterns, kind, shape)
        if get is not None:
            self._seen[key] = (self._count, name)
            for index, other, size in reversed(self._few):
                source = patterns_of(get(other)) if size == patterns.size else patterns[:0]
                table = mapped(source, patterns, kind) if source.size else None
                if table is not None and len(table) + len(varint(index)) < len(data):
                    return self._section(name, dtype, shape, "map", varint(index) + table)
            if encoding.endswith(_FEW_VALUES):
                self._few = [*self._few, (self._count, name, patterns.size)][-_MAP_SOURCES:]
        return self._section(name, dtype, shape, encoding, data)

    def _section(self, name: str, dtype: str, shape: tuple[int, ...], encoding: str, data: bytes) -> Entry:
        entry = Entry(name, dtype, shape, encoding, len(data))
        if encoding != "same":
            data += bytes(max(0, least_section(entry.nbytes) - len(data)))
        self.file.write(data)
        self.file.write(struct.pack("<I", zlib.crc32(data)))
        self._count += 1
        return Entry(name, dtype, shape, encoding, len(data))

    def _count_memory(self, tensor: Tensor) -> None:
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and place not in self._places:
            self._places.add(place)
            self.memory += tensor.numel() * tensor.element_size()


class _Reader:
    """A packed file whose checksums are right.

    Attributes:
        path: of the file.
        header: of the file.
    """

    header: Header

    def __init__(self, path: Path) -> None:
        self.path = path

    def opened(self) -> BinaryIO:
        """The file, its header read and its checksums looked at."""
        require(self.path, Path, "unpack: path", "a path")
        if self.path.is_dir():
            raise CheckpointError(f"{self.path}: is a folder; name the packed file in it")
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        try:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise CheckpointError(f"{self.path}: is empty; {_COPY}")
            self.header = read_header(file, size, self.path)
            self._check_sums(file)
        except BaseException:
            file.close()
            raise
        self._places = [self.header.end]
        for entry in self.header.entries:
            self._places.append(self._places[-1] + entry.length + CHECKSUM)
        return file

    def tensor(self, file: BinaryIO, index: int, found: list[Tensor] | None) -> Tensor:
        """The tensor of a section.

        Args:
            file: opened.
            index: of the section.
            found: the tensors of all sections before it; None: those that are needed are read again.
        """
        entry = self.header.entries[index]
        try:
            cursor = Cursor(self._data(file, index))
            if entry.encoding in ("same", "map"):
                source = self._source(file, cursor, index, found)
                if entry.encoding == "same":
                    cursor.finish()
                    return source
                patterns = read_map(patterns_of(source), cursor, kind_of(DTYPES[entry.dtype]))
            else:
                patterns = self._patterns(entry, cursor)
            cursor.finish()
            return tensor_of(patterns, DTYPES[entry.dtype], entry.shape)
        except DamagedSectionError as error:
            raise CheckpointError(
                f"{self.path}: tensor '{entry.name}' is malformed: {error}; {_COPY}"
            ) from error
        except MemoryError as error:
            raise CheckpointError(
                f"{self.path}: tensor '{entry.name}' of {entry.nbytes:,} bytes does not fit into memory"
            ) from error

    def structure(self, others: list[Tensor]) -> Any:
        """The plain data, with its tensors."""
        try:
            return from_json(self.header.structure, lambda index: others[index])
        except (ValueError, IndexError, TypeError) as error:
            raise CheckpointError(
                f"{self.path}: header is malformed: 'structure': {error}; {_COPY}"
            ) from error

    def _patterns(self, entry: Entry, cursor: Cursor) -> np.ndarray:
        dtype = DTYPES[entry.dtype]
        kind = kind_of(dtype)
        patterns = read_tensor(entry.encoding, cursor, kind, entry.shape, entry.nbytes // kind.size)
        if dtype == torch.bool and patterns.size and int(patterns.max()) > 1:
            raise DamagedSectionError(f"has the truth value {int(patterns.max())}")
        return patterns

    def _source(self, file: BinaryIO, cursor: Cursor, index: int, found: list[Tensor] | None) -> Tensor:
        """The tensor before it that a section refers to."""
        number, entries = cursor.varint(max(1, index)), self.header.entries
        entry, other = entries[index], entries[min(number, len(entries) - 1)]
        is_alike = (other.dtype, other.shape) == (entry.dtype, entry.shape)
        counts = [e.nbytes // kind_of(DTYPES[e.dtype]).size for e in (entry, other)]
        fits = is_alike if entry.encoding == "same" else counts[0] == counts[1]
        if number >= index or other.encoding == "same" or not fits:
            raise DamagedSectionError(f"refers to tensor {number}, which it cannot")
        if entry.encoding == "map" and other.encoding == "map":
            raise DamagedSectionError(f"refers to tensor {number}, which it cannot")
        return found[number] if found is not None else self.tensor(file, number, None)

    def _data(self, file: BinaryIO, index: int) -> bytes:
        file.seek(self._places[index])
        return file.read(self.header.entries[index].length)

    def _check_sums(self, file: BinaryIO) -> None:
        """Look at the checksum of every section, and the digest of all."""
        file.seek(0)
        digest = hashlib.blake2b(file.read(self.header.end), digest_size=DIGEST)
        for entry in self.header.entries:
            total, left = 0, entry.length
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise CheckpointError(f"{self.path}: is cut off in tensor '{entry.name}'; {_COPY}")
                total, left = zlib.crc32(chunk, total), left - len(chunk)
                digest.update(chunk)
            stored = file.read(CHECKSUM)
            if stored != struct.pack("<I", total):
                raise CheckpointError(
                    f"{self.path}: tensor '{entry.name}' is damaged: its checksum is wrong; {_COPY}"
                )
            digest.update(stored)
        if file.read(DIGEST) != digest.digest():
            raise CheckpointError(
                f"{self.path}: is damaged: the digest of header and tensors is wrong; {_COPY}"
            )


def _check_tensor(name: Any, tensor: Any) -> None:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise CheckpointError(
            f"pack: '{name}' is a {type(tensor).__name__}, must be a tensor with text for its name"
        )
    is_dense = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta
    if not is_dense or str(tensor.dtype).removeprefix("torch.") not in DTYPES:
        raise CheckpointError(
            f"pack: '{name}' is a tensor of {tensor.dtype} that is not stored as plain dense numbers; "
            "convert it first"
        )


def _report(path: Path, entries: Any, head: int, original_bytes: int) -> PackReport:
    tensors = tuple(
        TensorReport(entry.name, entry.shape, entry.dtype, entry.encoding, entry.length + CHECKSUM)
        for entry in entries
    )
    return PackReport(path, tensors, head + DIGEST, original_bytes)
