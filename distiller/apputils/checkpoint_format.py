"""What a checkpoint holds: its fields as read, and the plain data they are written as.

Knows nothing about where files lie; what each part must look like is in `checkpoint_schema.py`.
"""

from __future__ import annotations

import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distiller.apputils.checkpoint_schema import check_document, shown
from distiller.apputils.rng_state import capture_rng_state
from distiller.errors import CheckpointError
from distiller.factorization.recipe import FactorizationRecipe
from distiller.names import canonical_state_dict, named_parameters, unwrap
from distiller.thinning import ThinningRecipe

FORMAT = "distiller checkpoint"
FORMAT_VERSION = 1


class Stateful(Protocol):
    """Something with a state like a CompressionScheduler's: masks, rules, dense copies, policies."""

    def state_dict(self) -> dict[str, Any]:
        """The state as plain data and tensors."""
        ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was read: plain data only, tensors on the CPU, canonical names.

    Attributes:
        path: the file it was read from.
        state_dict: parameters and buffers by canonical name.
        epoch: the last epoch that was finished, from 0; None in a file of weights only.
        arch: the model's name for `create_model`; None when unknown.
        dataset: the data set the model was made for; None when unknown.
        input_shape: shape of one batch, as the model had it; None when unknown.
        optimizer: `class` (name), `state_dict`, and `param_names`, a list of names for each
            parameter group (None for a parameter that is not the model's); None without optimizer.
        scheduler: the scheduler's `state_dict`, masks included; None without scheduler.
        masks: masks of a Distiller checkpoint by parameter name, 1 keep, 0 prune. In our own
            files masks belong to `scheduler`, and this is empty.
        quantizer: `class` (name) of the quantizer that prepared the model, and its arguments.
        thinning_recipes: what was physically removed, in order.
        factorization_recipes: which layers became which factors, in order, each with the number of thinning
            recipes that came before it.
        early_exits: of each exit that was attached by naming its layer: `layer`, and `pool` of its branch.
        rng: the random number generators' states, for `restore_rng_state`; None when unknown.
        extras: what the writer added.
        notes: what the reader should tell the user.
    """

    path: Path
    state_dict: dict[str, Any]
    epoch: int | None = None
    arch: str | None = None
    dataset: str | None = None
    input_shape: tuple[Any, ...] | None = None
    optimizer: dict[str, Any] | None = None
    scheduler: dict[str, Any] | None = None
    masks: dict[str, Tensor] = field(default_factory=dict)
    quantizer: dict[str, Any] | None = None
    thinning_recipes: tuple[ThinningRecipe, ...] = ()
    factorization_recipes: tuple[FactorizationRecipe, ...] = ()
    early_exits: tuple[dict[str, Any], ...] = ()
    rng: dict[str, Any] | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def policies(self) -> tuple[str, ...]:
        """The names of the policies that it was written under, of the schedule and of flags."""
        return tuple(str(policy["name"]) for policy in (self.scheduler or {}).get("policies", ()))


def document_of(
    epoch: int,
    arch: str,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    scheduler: Stateful | None = None,
    extras: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `save_checkpoint` writes: everything as plain data.

    Raises:
        CheckpointError: something is not plain data, or could not be read back as what it must be; names
            the place, such as `extras.scores[2]`.
    """
    if extras is not None and not isinstance(extras, dict):
        raise CheckpointError(f"save_checkpoint: 'extras' must be a dict, got a {type(extras).__name__}")
    bare = unwrap(model)
    kept = dict(extras or {})
    input_shape = getattr(bare, "input_shape", None)
    contents = {
        "epoch": epoch,
        "arch": arch,
        "dataset": getattr(bare, "dataset", None),
        "input_shape": None if input_shape is None else tuple(input_shape),
        "state_dict": canonical_state_dict(model),
        "optimizer": None if optimizer is None else _optimizer_entry(model, optimizer),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "quantizer": kept.pop("quantizer_metadata", getattr(bare, "quantizer_metadata", None)),
        "thinning_recipes": list(getattr(bare, "thinning_recipes", ())),
        "rng": capture_rng_state(),
        "extras": kept,
    }
    exits = [dict(exit) for exit in getattr(bare, "early_exits", ())]
    if exits:  # as below
        contents["early_exits"] = exits
    factored = list(getattr(bare, "factorization_recipes", ()))
    if factored:  # left out where there is none: readers from before factorization take such files
        contents["factorization_recipes"] = factored
    return sealed(contents)


def sealed(contents: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of a checkpoint as they are written: plain data, checked, under the mark of the format.

    Args:
        contents: everything that a file has beside `format` and `format_version`.

    Raises:
        CheckpointError: as `document_of`.
    """
    plain = {key: _plain(value, key) for key, value in contents.items()}
    check_document(plain, "save_checkpoint")
    return {"format": FORMAT, "format_version": FORMAT_VERSION, **plain}


def fields_of(document: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The fields of a `Checkpoint` from what `document_of` made.

    Raises:
        CheckpointError: the file is damaged, of another version, or made by other means.
    """
    content = dict(document)
    kind, version = content.pop("format", None), content.pop("format_version", None)
    if not isinstance(kind, str) or kind != FORMAT:
        raise CheckpointError(f"{path}: 'format' must be '{FORMAT}', got {shown(kind)}")
    if type(version) is not int:
        raise CheckpointError(f"{path}: 'format_version' must be a whole number, got {shown(version)}")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format version {version}, this library reads {FORMAT_VERSION}; "
            "use the library's version that wrote it"
        )
    _check_sums(path)
    return checked_fields(content, path)


def checked_fields(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The fields of a `Checkpoint` from what a file holds beside `format` and `format_version`.

    Raises:
        CheckpointError: something is not what it must be.
    """
    check_document(content, str(path))
    recipes = (
        ThinningRecipe.from_plain(recipe, f"{path}: thinning_recipes[{index}]")
        for index, recipe in enumerate(content["thinning_recipes"])
    )
    thinnings = tuple(recipes)
    factored = tuple(
        FactorizationRecipe.from_plain(recipe, f"{path}: factorization_recipes[{index}]")
        for index, recipe in enumerate(content.get("factorization_recipes", ()))
    )
    _check_order(factored, len(thinnings), path)
    exits = tuple(content.get("early_exits", ()))
    return {
        **content,
        "thinning_recipes": thinnings,
        "factorization_recipes": factored,
        "early_exits": exits,
    }


def _check_order(recipes: tuple[FactorizationRecipe, ...], thinnings: int, path: Path) -> None:
    """Refuse factorizations that come before the one in front of them, or after more than there is."""
    least = 0
    for index, recipe in enumerate(recipes):
        if not least <= recipe.after_thinnings <= thinnings:
            raise CheckpointError(
                f"{path}: factorization_recipes[{index}].after_thinnings: must be {least} to {thinnings}, "
                f"got {recipe.after_thinnings}"
            )
        least = recipe.after_thinnings


def optimizer_param_names(model: nn.Module, optimizer: Optimizer) -> list[list[str | None]]:
    """The canonical names of an optimizer's parameters by group; None for one that is not the model's."""
    names = {id(param): name for name, param in named_parameters(model)}
    return [[names.get(id(param)) for param in group["params"]] for group in optimizer.param_groups]


def _optimizer_entry(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    return {
        "class": type(optimizer).__name__,
        "state_dict": optimizer.state_dict(),
        "param_names": optimizer_param_names(model, optimizer),
    }


def _plain(value: Any, where: str) -> Any:
    """`value` in types that the restricted reader knows; numpy numbers become Python's.

    Raises:
        CheckpointError: it cannot; names the place, such as `extras.scores[2]`.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) in (str, int, float, bool, NoneType):
        return value
    if type(value) in (Tensor, nn.Parameter):
        if value.layout is torch.strided and not value.is_quantized and not value.is_meta:
            return value.detach()
        raise CheckpointError(
            f"save_checkpoint: '{where}' is a tensor that is not stored as plain dense numbers"
        )
    if type(value) in (dict, OrderedDict, defaultdict):
        return {_plain_key(key, where): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if type(value) in (list, tuple, torch.Size):
        items = [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise CheckpointError(
        f"save_checkpoint: '{where}' is a {type(value).__module__}.{type(value).__qualname__}, which is not "
        "plain data; use numbers, strings, tensors, lists, tuples and dicts"
    )


def _plain_key(key: Any, where: str) -> Any:
    plain = _plain(key, f"a key of {where}")
    if isinstance(plain, (list, tuple, dict, Tensor)):
        raise CheckpointError(
            f"save_checkpoint: '{where}' has a {type(key).__name__} for a key; use strings or numbers"
        )
    return plain


def _check_sums(path: Path) -> None:
    """torch does not verify the checksums that it writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # a damaged archive can raise anything
        raise CheckpointError(f"{path}: is damaged: {error}; use another checkpoint") from error
    if broken is not None:
        raise CheckpointError(
            f"{path}: is damaged: the checksum of '{broken}' is wrong; use another checkpoint"
        )
