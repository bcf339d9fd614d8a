"""The file formats of the MNIST family (idx) and of CIFAR (pickles): bytes to arrays.

Finds the folder that holds a data set's files and decodes them; nothing in a file is executed.
Knows nothing about data sets' names, torch or loaders.
"""

from __future__ import annotations

import gzip
import math
import pickle
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distiller.errors import DatasetError

_UNSIGNED_BYTE = 0x08
_CIFAR_IMAGE = (3, 32, 32)


def find_folder(places: Sequence[Path], files: Sequence[str]) -> Path | None:
    """The first of `places` that holds all `files`, each as it is or with `.gz` added."""
    for place in places:
        if not missing_files(place, files):
            return place
    return None


def missing_files(folder: Path, files: Sequence[str]) -> list[str]:
    """Those of `files` that `folder` holds neither as they are nor with `.gz` added."""
    return [name for name in files if _existing(folder, name) is None]


def describe_places(places: Sequence[Path], files: Sequence[str]) -> str:
    """One line for each place: that there is no such folder, or which files it lacks."""
    lines = []
    for place in places:
        missing = missing_files(place, files)
        lacks = f"lacks {', '.join(missing)}" if place.is_dir() else "no such folder"
        lines.append(f"  {place}: {lacks}")
    return "\n".join(lines)


def read_idx(folder: Path, name: str, dimensions: int) -> np.ndarray:
    """The unsigned bytes of an idx file, which may be compressed with gzip.

    The format: two zero bytes, the type (8: unsigned byte), the number of dimensions, the
    dimensions as big-endian 32-bit numbers, the values.

    Args:
        folder: where the file is.
        name: its name without `.gz`.
        dimensions: how many it must have: 3 for images, 1 for labels.

    Returns:
        A uint8 array of the shape that the header states.

    Raises:
        DatasetError: the file is missing, damaged, truncated or of another format, or holds nothing.
    """
    path = _existing(folder, name)
    if path is None:
        raise DatasetError(f"{folder / name}: no such file, nor with .gz added")
    content = _read_bytes(path)
    header = 4 + 4 * dimensions
    magic = bytes((0, 0, _UNSIGNED_BYTE, dimensions))
    if content[:4] != magic:
        raise DatasetError(
            f"{path}: not an idx file of unsigned bytes in {dimensions} dimension(s), "
            f"which starts with {magic.hex()}; got {content[:4].hex() or 'an empty file'}"
        )
    if len(content) < header:
        raise DatasetError(f"{path}: truncated within its header of {header} bytes, got {len(content)} bytes")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    promised = math.prod(shape)
    if len(content) - header != promised:
        raise DatasetError(
            f"{path}: its header promises {promised} bytes of data, got {len(content) - header}; "
            "delete it and get it again"
        )
    if promised == 0:
        raise DatasetError(f"{path}: holds no data, its header says {' x '.join(map(str, shape))}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_cifar_batch(path: Path, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    """The images and labels of one file of the CIFAR data sets' Python version.

    Args:
        path: the file, a pickled dictionary with `data` and `label_key`.
        label_key: `labels` (CIFAR-10) or `fine_labels` (CIFAR-100).

    Returns:
        uint8 images of shape (count, 3, 32, 32) and int64 labels of shape (count,).

    Raises:
        DatasetError: the file is damaged, holds anything but plain data, or has not these entries.
    """
    content = _unpickle_plain_data(path)
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: holds a {type(content).__name__} where a dictionary is wanted")
    entries = {_text(key): value for key, value in content.items()}
    absent = [key for key in ("data", label_key) if key not in entries]
    if absent:
        raise DatasetError(f"{path}: has no entry '{absent[0]}', got {sorted(map(str, entries))}")
    data, labels = entries["data"], entries[label_key]
    if not isinstance(data, _PickledArray):
        raise DatasetError(f"{path}: 'data' must be a numpy array, got {type(data).__name__}")
    if not (isinstance(labels, list) and all(type(label) is int for label in labels)):
        raise DatasetError(f"{path}: '{label_key}' must be a list of whole numbers")
    try:
        return data.images(), np.array(labels, np.int64)
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error


def _existing(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def _read_bytes(path: Path) -> bytes:
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path}: cannot be read: {error}") from error


def _unpickle_plain_data(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            # latin1: the files were written by Python 2, whose strings hold the arrays' bytes.
            return _PlainDataUnpickler(file, encoding="latin1").load()
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error}") from error
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle may raise anything at all
        raise DatasetError(f"{path}: not a readable pickle ({type(error).__name__}: {error})") from error


def _text(key: Any) -> Any:
    return key.decode("latin1") if isinstance(key, bytes) else key


class _PlainDataUnpickler(pickle.Unpickler):
    """Reads built-in types, and numpy arrays as their parts: no code but that below runs."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        # Python 2 and numpy 1 wrote `numpy.core`, numpy 2 writes `numpy._core`.
        name = f"{module_name.replace('numpy._core', 'numpy.core')}.{global_name}"
        if name not in _PLAIN_DATA:
            raise DatasetError(f"holds '{module_name}.{global_name}', which is no plain data; it was not run")
        return _PLAIN_DATA[name]


class _PickledType:
    """An array's type as a pickle has it: `numpy.dtype(code, ...)`, then a state."""

    def __init__(self, code: Any = "", *_: Any) -> None:
        self.code = _text(code)

    def __setstate__(self, state: Any) -> None:
        """Byte order and fields, which single unsigned bytes have not."""


class _PickledArray:
    """An array as a pickle has it: an empty one, then (version, shape, type, Fortran order, bytes)."""

    def __init__(self, *_: Any) -> None:
        self.parts: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.parts = state[1:]

    def images(self) -> np.ndarray:
        """The array as uint8 images (count, 3, 32, 32)."""
        row = math.prod(_CIFAR_IMAGE)
        match self.parts:
            case ((int(count), int(width)), _PickledType(code="u1"), fortran, content) if width == row:
                content = content.encode("latin1") if isinstance(content, str) else bytes(content)
                if len(content) != count * row:
                    raise DatasetError(
                        f"'data' promises {count} rows of {row} bytes, got {len(content)} bytes"
                    )
                table = np.frombuffer(content, np.uint8).reshape((count, row), order="F" if fortran else "C")
                return table.reshape(-1, *_CIFAR_IMAGE)
            case (shape, _PickledType(code=code), *_):
                raise DatasetError(f"'data' must be uint8 (u1) of shape (count, {row}), got {code} {shape}")
            case _:
                raise DatasetError("'data' is not a whole numpy array")


def _array_from_buffer(content: Any, dtype: _PickledType, shape: Any, order: Any) -> _PickledArray:
    array = _PickledArray()
    array.parts = (shape, dtype, order == "F", content)
    return array


def _latin1_bytes(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise DatasetError(f"holds bytes encoded as {encoding!r}, which is no plain data")
    return text.encode("latin1")


_PLAIN_DATA = {
    "numpy.ndarray": _PickledArray,
    "numpy.dtype": _PickledType,
    "numpy.core.multiarray._reconstruct": _PickledArray,
    "numpy.core.numeric._frombuffer": _array_from_buffer,
    "_codecs.encode": _latin1_bytes,
}
