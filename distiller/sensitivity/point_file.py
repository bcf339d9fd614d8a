"""A file of points: one line each, on disk when it is written, taken up again after a kill.

Beside it a JSON file says what was asked for. Knows nothing about what a point is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distiller.atomic_file import write_whole
from distiller.errors import SensitivityError
from distiller.sensitivity.write_errors import reporting_failed_writes

__all__ = ["REMEDY", "PointFile", "decoded", "read_settings", "whole_lines", "write_new_settings"]

REMEDY = "give another folder, or empty this one to start afresh"


class PointFile:
    """Lines at the end of a file.

    Args:
        path: of the file; made when it is missing.
        kept: bytes of it that stay, as `whole_lines` finds them.
        header: the first line of a new file.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, kept: int, header: str) -> None:
        self._path = path
        self._file = path.open("r+b" if kept else "wb")
        try:
            self._file.seek(kept)
            self._file.truncate()
            if not kept:
                self._write(header)
        except OSError:
            self._file.close()
            raise

    def append(self, line: str) -> None:
        """Put one line on disk; it is safe when this returns.

        Raises:
            SensitivityError: it cannot be written.
        """
        with reporting_failed_writes(self._path):
            self._write(line)

    def close(self) -> None:
        """Close the file; what was appended is there already."""
        with reporting_failed_writes(self._path):  # what a full disk did not take is tried once more here
            self._file.close()

    def _write(self, line: str) -> None:
        self._file.write(line.encode())
        self._file.flush()
        os.fsync(self._file.fileno())


def whole_lines(path: Path) -> bytes:
    """What a file has up to its last whole line; nothing where there is none."""
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1]


def decoded(data: bytes, path: Path) -> str:
    """The text of a file of points.

    Raises:
        SensitivityError: it is none.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise SensitivityError(f"{path}: not a CSV file, got binary data; {REMEDY}") from error


def write_new_settings(path: Path, others: Iterable[Path], settings: dict[str, Any]) -> None:
    """Write what is asked for, beside results that are not there yet.

    Args:
        path: of the settings.
        others: files that a sweep leaves beside them.
        settings: what is asked for.

    Raises:
        SensitivityError: there are results of something else.
    """
    for other in others:
        if other.exists():
            raise SensitivityError(
                f"{other}: is there without the {path.name} of a sweep that could be resumed; "
                "give another folder, or move it away"
            )
    write_whole(path, json.dumps(settings, indent=2) + "\n")


def read_settings(path: Path) -> dict[str, Any]:
    """What was asked for.

    Raises:
        SensitivityError: the file does not say it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, or no text, or nested without end
        raise SensitivityError(f"{path}: not the settings of a sweep, {error}; {REMEDY}") from error
    if not isinstance(found, dict):
        raise SensitivityError(f"{path}: not the settings of a sweep, got a {type(found).__name__}; {REMEDY}")
    return found
