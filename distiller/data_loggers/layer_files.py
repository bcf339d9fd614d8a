"""Files of a model's layers: their names, and how they are written.

Knows nothing about what is in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from distiller.atomic_file import replacing
from distiller.errors import StatsError

_LONGEST = 120  # characters that a file name keeps of a layer's


def layer_file_name(index: int, layer: str, *parts: str) -> str:
    """`007-layer1.0.conv1-output`: a name that every file system takes, without suffix.

    Args:
        index: of the layer, from 0; tells layers apart whose names are alike in a file name.
        layer: the layer's name; characters other than letters, digits, `.`, `_` and `-` become `_`, and of
            a long name the end is kept.
        parts: what of the layer it is.
    """
    return "-".join([f"{index:03d}", re.sub(r"[^A-Za-z0-9._-]", "_", layer)[-_LONGEST:], *parts])


def write_tensors(path: Path, content: Any) -> None:
    """Write tensors, alone or in nested dicts, for `torch.load(path, weights_only=True)`, whole or not.

    Raises:
        StatsError: the file cannot be written.
    """
    with reporting_failed_writes(path), replacing(path) as file:
        torch.save(content, file)


@contextmanager
def reporting_failed_writes(path: Path) -> Iterator[None]:
    """Within the block what the operating system refuses becomes a StatsError that names `path`."""
    try:
        yield
    except OSError as error:
        raise StatsError(f"{path}: cannot be written, {error.strerror or error}") from error
