"""The state of learned rounding in a file, with what it is of: model, settings, shapes of the data.

Knows nothing about how rounding is learned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distiller.atomic_file import replacing
from distiller.errors import QuantizationError
from distiller.quantization.refinement.capture import Batches, each_batch
from distiller.quantization.search.copies import digest_of
from distiller.quantization.search.search_log import told_difference

_ENTRY = {"weight": Tensor, "scale": Tensor, "zero_point": Tensor,
          "loss_before": float, "loss_after": float, "changed": float}  # fmt: skip
_REMEDY = "give another folder, or remove this file to begin anew"


def rounding_identity(
    float_model: nn.Module, quantized_model: nn.Module, batches: Batches, **settings: Any
) -> dict[str, Any]:
    """What gives the state of learned rounding its meaning, as plain data.

    Args:
        float_model: as of `adaround`.
        quantized_model: alike, before it is rounded anew: its scales are of all that was
            done before.
        batches: alike; of them the shapes count.
        settings: others, by name; what JSON can hold.
    """
    plain = {
        **settings,
        "model": digest_of(float_model),
        "quantized_model": digest_of(quantized_model),
        "shapes": [
            [list(x.shape) for x in arguments if isinstance(x, Tensor)] for arguments in each_batch(batches)
        ],
    }
    return json.loads(json.dumps(plain))


def read_rounding(path: Path) -> dict[str, Any]:
    """The content of a file that `save_rounding` wrote: the identity beside the state of `adaround`.

    Raises:
        QuantizationError: it cannot be read, is damaged, or has something else in it.
    """
    try:
        with path.open("rb") as file:
            found = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise QuantizationError(f"{path}: cannot be read, {error.strerror or error}") from error
    except Exception as error:  # a damaged file can make torch.load raise anything
        raise QuantizationError(f"{path}: is damaged, or no state of AdaRound; {_REMEDY}") from error
    if not _is_state(found):
        raise QuantizationError(f"{path}: is no state of AdaRound; {_REMEDY}")
    return found


def resumed_rounding(path: Path | None, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state to go on with; None where there is no file yet.

    Args:
        path: of the file; None: none is kept.
        identity: `rounding_identity` of what is to be rounded now.

    Raises:
        QuantizationError: as `read_rounding`; or it is of another model, other settings or other data: names
            the first thing that differs.
    """
    if path is None or not path.exists():
        return None
    found = read_rounding(path)
    difference = told_difference(found["identity"], identity)
    if difference is not None:
        raise QuantizationError(f"{path}: is of another AdaRound, {difference}; {_REMEDY}")
    return found


def save_rounding(path: Path, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Write a state of `adaround`, whole or not at all.

    Raises:
        QuantizationError: the file cannot be written.
    """
    try:
        with replacing(path) as file:
            torch.save({"identity": dict(identity), **state}, file)
    except OSError as error:
        raise QuantizationError(f"{path}: cannot be written, {error.strerror or error}") from error


def _is_state(found: Any) -> bool:
    if not isinstance(found, dict) or found.keys() != {"identity", "settings", "layers"}:
        return False
    if not all(isinstance(part, dict) for part in found.values()):
        return False
    return all(
        isinstance(entry, dict)
        and entry.keys() == _ENTRY.keys()
        and all(isinstance(entry[key], kind) for key, kind in _ENTRY.items())
        for entry in found["layers"].values()
    )
