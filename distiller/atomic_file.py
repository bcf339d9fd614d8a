"""Files that are there whole or not at all.

Knows nothing about what is in them; what the operating system refuses stays an OSError.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write into; it becomes `path` when the block ends without an error.

    The bytes go to `<name>.<host>.<process id>.part` in the same folder, are synced to disk, and
    the file is renamed; what was at `path` before stays whole until that moment. Parts that
    killed processes left behind are removed first. Where `path` is a link, the file that it leads to is
    replaced.

    Raises:
        OSError: the folder is missing or cannot be written, or there is something other than a file (a
            folder, a device, a pipe) at `path`, which stays as it is.
    """
    path = Path(os.path.realpath(path))
    _refuse_what_is_no_file(path)
    remove_stale_parts(path.parent, path.name)
    part = path.with_name(f"{path.name}.{_host()}.{os.getpid()}.part")
    file = part.open("wb")
    try:
        with file:
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


def remove_stale_parts(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes of this machine left of files that they were writing.

    The parts of processes that run, or that ran on other machines, are left alone, and so are
    those that may not be removed.

    Args:
        folder: where the files are.
        name: of the only file to look for; None: of any.
    """
    pattern = f"{'*' if name is None else glob.escape(name)}.{glob.escape(_host())}.*.part"
    for part in folder.glob(pattern):
        process_id = part.name.split(".")[-2]
        if process_id.isdecimal() and not _is_running(int(process_id)):
            with contextlib.suppress(OSError):
                part.unlink()


def _refuse_what_is_no_file(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not an ordinary file", str(path))


def _host() -> str:
    return platform.node().partition(".")[0]


def _is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is another user's, or no process
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
