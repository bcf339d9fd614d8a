"""A folder that one process at a time writes into.

Knows nothing about what is written.
"""

from __future__ import annotations

import errno
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

from distiller.errors import SensitivityError

__all__ = ["FolderLock"]


_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
"""Of file systems that have none."""


_HELD: set[int] = set()
"""Open folders; processes that are forked meanwhile close theirs, else they would hold the lock, too."""


def _close(handle: int) -> None:
    if handle in _HELD:
        _HELD.remove(handle)
        os.close(handle)


def _close_all() -> None:
    for handle in list(_HELD):
        _close(handle)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_all)


class FolderLock:
    """Held until it is released, or the process has ended, however that came.

    Where the system or the file system has no such locks, nothing is locked.

    Args:
        folder: which is there.

    Raises:
        SensitivityError: another process, or this one, holds it.
        OSError: the folder cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self._close: Callable[[], object] | None = None
        if sys.platform == "win32":
            return
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise SensitivityError(
                f"{folder}: a sweep is running there; wait until it has ended, or give another folder"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
        _HELD.add(handle)
        self._close = weakref.finalize(self, _close, handle)

    def release(self) -> None:
        """Let others have it."""
        if self._close is not None:
            self._close()
