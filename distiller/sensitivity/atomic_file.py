"""Files that are there whole or not at all.

Knows nothing about what is in them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distiller.sensitivity.curves import SensitivityError


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under another name, sync it, and rename it to `path`.

    Raises:
        SensitivityError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.part")
    with reporting_failed_writes(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def reporting_failed_writes(path: Path) -> Iterator[None]:
    """What the operating system refuses becomes a SensitivityError that names `path`."""
    try:
        yield
    except OSError as error:
        raise SensitivityError(f"{path}: cannot be written, {error.strerror or error}") from error
