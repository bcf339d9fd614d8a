"""Files that are there whole or not at all.

Knows nothing about what is in them; what the operating system refuses stays an OSError.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write into; it becomes `path` when the block ends without an error.

    The bytes go to `<name>.<process id>.part` in the same folder, are synced to disk, and
    the file is renamed; what was at `path` before stays whole until that moment. Parts that
    killed processes left behind are removed first.

    Raises:
        OSError: the folder is missing or cannot be written.
    """
    path = Path(path)
    for stale in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        if not _is_running(stale.name.split(".")[-2]):
            stale.unlink(missing_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_whole(path: str | Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path`, whole or not at all.

    Raises:
        OSError: the folder is missing or cannot be written.
    """
    with replacing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def _is_running(process_id: str) -> bool:
    if not process_id.isdecimal():
        return True  # not one of ours: leave it alone
    try:
        os.kill(int(process_id), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
