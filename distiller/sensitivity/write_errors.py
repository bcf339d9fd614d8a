"""What the operating system refuses to a sweep's files, in words that name the file.

Knows nothing about what is in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distiller.errors import SensitivityError


@contextmanager
def reporting_failed_writes(path: Path) -> Iterator[None]:
    """An OSError within becomes a SensitivityError that names `path`."""
    try:
        yield
    except OSError as error:
        raise SensitivityError(f"{path}: cannot be written, {error.strerror or error}") from error
