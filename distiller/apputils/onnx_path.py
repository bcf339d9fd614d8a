"""Where a file of ONNX goes that a flag names.

Knows nothing about models.
"""

from __future__ import annotations

from pathlib import Path

from distiller.errors import UsageError


def path_outside(flag: str, given: str) -> Path | None:
    """The file that a flag names; None for a bare name, which is of a file in the run folder.

    Raises:
        UsageError: it is a folder, or its folder is not there.
    """
    if Path(given).name == given:
        return None
    path = Path(given).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise UsageError(f"{flag} {given}: {what}; give the name of a file in a folder that is there")
    return path
