"""Checkpoints as packed files: what a network computes with and is rebuilt from, nothing of its training.

    import distiller
    report = distiller.pack(model, "model.dsz")
    model = distiller.apputils.load_lean_checkpoint(None, "model.dsz")

Knows nothing about training; the format of the file is `distiller.packing`'s.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distiller.apputils.checkpoint_format import (
    FORMAT,
    FORMAT_VERSION,
    Checkpoint,
    checked_fields,
    document_of,
)
from distiller.apputils.rng_state import capture_rng_state
from distiller.errors import CheckpointError, require
from distiller.names import unwrap
from distiller.packing import PackReport, is_packed, pack_tensors, unpack_tensors

__all__ = [
    "contents_of",
    "is_packed",
    "pack",
    "pack_contents",
    "read_packed_checkpoint",
]

_OF_TRAINING = {"optimizer": None, "scheduler": None}
_NOT_PACKED = {"path", "state_dict", "masks", "notes", "rng", "format", "format_version", *_OF_TRAINING}
_LEFT_OUT_EMPTY = ("factorization_recipes", "early_exits")
"""What checkpoints do not have where there is none of it, so that older readers take them."""
_EXTRAS_OF_TRAINING = ("tracker",)


def pack(
    source: nn.Module | Checkpoint,
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor] | None = None,
    original_bytes: int | None = None,
) -> PackReport:
    """Write a model, or what a checkpoint holds of one, into a packed file.

    Stored are the weights and buffers, bit for bit, and what a checkpoint says of the structure: arch, data
    set, input shape, recipes, quantizer, epoch, extras. Left out is what training alone needs: optimizer,
    masks (their zeros are in the weights), states of policies, random numbers, the tracker of best epochs.

    Args:
        source: a model whose masked weights are zero, or a checkpoint as `read_checkpoint` gives it.
        path: the file; `.dsz` is its usual ending. One that is there is replaced when the new one is whole.
        state: tensors to store in the place of the source's, such as `inference_state(model).tensors`.
        original_bytes: what the compression rate compares with; default what the tensors take in memory.

    Returns:
        What the file takes, tensor by tensor; `print(report.to_text())`.

    Raises:
        CheckpointError: the file cannot be written, or something is not plain data.
    """
    require(source, (nn.Module, Checkpoint), "pack: source", "a torch.nn.Module or a Checkpoint")
    if isinstance(source, Checkpoint):
        contents = contents_of(source)
    else:
        contents = document_of(0, getattr(unwrap(source), "arch", None), source)  # type: ignore[arg-type]
    return pack_contents(contents, path, state, original_bytes)


def pack_contents(
    contents: Mapping[str, Any],
    path: str | os.PathLike[str],
    state: Mapping[str, Tensor] | None = None,
    original_bytes: int | None = None,
) -> PackReport:
    """`pack` of the contents of a checkpoint, as `document_of` makes them."""
    structure = {key: value for key, value in contents.items() if key not in _NOT_PACKED}
    extras = structure.get("extras") or {}
    structure["extras"] = {key: value for key, value in extras.items() if key not in _EXTRAS_OF_TRAINING}
    return pack_tensors(contents["state_dict"] if state is None else state, path, structure, original_bytes)


def read_packed_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """A packed file as a checkpoint without what training needs.

    Raises:
        CheckpointError: it is missing, damaged or no packed file, or it holds no model.
    """
    packed = unpack_tensors(path)
    structure = packed.structure
    if not isinstance(structure, dict) or "extras" not in structure or not _NOT_PACKED.isdisjoint(structure):
        raise CheckpointError(f"{path}: holds tensors that are no checkpoint; read it with unpack_tensors")
    epoch = structure.get("epoch")
    content = {**structure, "epoch": 0 if epoch is None else epoch, "state_dict": packed.tensors}
    found = checked_fields({**content, **_OF_TRAINING, "rng": capture_rng_state()}, Path(path))
    return Checkpoint(path=Path(path), **{**found, "epoch": epoch, "rng": None})


def contents_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint file says that holds this and nothing of training.

    Args:
        checkpoint: as it was read; without an epoch it is of the first one.
    """
    read = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
    kept = {key: _plain(key, value) for key, value in read.items() if key not in _NOT_PACKED}
    for key in _LEFT_OUT_EMPTY:
        if not kept[key]:
            del kept[key]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **kept,
        "epoch": checkpoint.epoch or 0,
        "state_dict": checkpoint.state_dict,
        **_OF_TRAINING,
        "rng": capture_rng_state(),
    }


def _plain(key: str, value: Any) -> Any:
    """Recipes and the like as the list that a checkpoint file has for them; other fields as they are."""
    if not isinstance(value, tuple) or key == "input_shape":
        return value
    return [item.to_plain() if hasattr(item, "to_plain") else item for item in value]
