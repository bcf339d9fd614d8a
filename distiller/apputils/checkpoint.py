"""Checkpoints: what a run needs to go on bit for bit, as plain data in one file.

A file appears whole or not at all: it is written under another name in the same folder,
synced, and renamed. It is read back without running anything in it, whoever wrote it.
Knows nothing about training.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distiller.apputils.checkpoint_format import (
    Checkpoint,
    Stateful,
    document_of,
    fields_of,
)
from distiller.apputils.checkpoint_schema import key_path, unlike
from distiller.apputils.legacy_checkpoint import legacy_fields, load_plain
from distiller.apputils.optimizer_state import restore_optimizer
from distiller.apputils.packed_checkpoint import is_packed, read_packed_checkpoint
from distiller.apputils.rng_state import capture_rng_state, restore_rng_state
from distiller.apputils.structure import (
    is_other_arch,
    models_named,
    recipes_of,
    restore_structure,
    unchanged_on_error,
)
from distiller.atomic_file import replacing
from distiller.errors import CheckpointError, DistillerError, require
from distiller.factorization.replacement import factorizations_of
from distiller.masks import MaskStore
from distiller.models import create_model
from distiller.names import canonical_state_dict, unwrap
from distiller.policy import LRPolicy
from distiller.quantization import Quantizer, rebuild_quantized
from distiller.scheduler import CompressionScheduler

__all__ = [
    "Checkpoint",
    "capture_rng_state",
    "load_checkpoint",
    "load_lean_checkpoint",
    "load_state",
    "read_checkpoint",
    "restore_optimizer",
    "restore_quantizer",
    "restore_rng_state",
    "restore_scheduler",
    "restore_structure",
    "save_checkpoint",
    "write_document",
]

_logger = logging.getLogger(__name__)


def save_checkpoint(
    epoch: int,
    arch: str,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    scheduler: Stateful | None = None,
    extras: Mapping[str, Any] | None = None,
    is_best: bool = False,
    name: str | None = None,
    dir: str | Path = ".",
) -> Path:
    """Write `[name_]checkpoint.pth.tar`, and with `is_best` also `[name_]best.pth.tar`.

    A kill at any moment leaves the old file or the new one, whole; what a killed writer left
    beside a file is removed when that file is next written. The best one is written first:
    no checkpoint speaks of a best epoch whose file is not there.

    Args:
        epoch: the epoch that was finished, from 0.
        arch: the model's name.
        model: its weights, and its attributes `dataset`, `input_shape`, `thinning_recipes`,
            `factorization_recipes` and `quantizer_metadata` where it has them.
        extras: plain data to keep; a `quantizer_metadata` in it takes the place of the model's.
        name: prefix of the file names.
        dir: an existing folder.

    Returns:
        The checkpoint's path.

    Raises:
        CheckpointError: the folder is missing or cannot be written, or something is not plain
            data; nothing is left behind and the files that were there are unchanged.
    """
    prefix = f"{name}_" if name else ""
    target, best = (Path(dir) / f"{prefix}{kind}.pth.tar" for kind in ("checkpoint", "best"))
    if not target.parent.is_dir():
        raise CheckpointError(
            f"{target}: cannot be written: '{target.parent}' is not a folder; create it first"
        )
    document = document_of(epoch, arch, model, optimizer, scheduler, extras)
    for path in (best, target) if is_best else (target,):
        write_document(document, path)
    return target


def write_document(document: Mapping[str, Any], path: Path) -> None:
    """Write what `document_of` made, whole or not at all.

    Raises:
        CheckpointError: the file cannot be written; nothing is left behind.
    """
    try:
        with replacing(path) as file:
            torch.save(dict(document), file)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: cannot be written: {_reason(error)}; make room, or choose another folder"
        ) from error


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of ours, a packed file, a Distiller `.pth.tar`, or a file of weights only.

    Raises:
        CheckpointError: the file is missing, empty, cut off, damaged, not a checkpoint, of a
            newer version, asks for something that could run code (which is not run), or holds
            something of another type than it must be.
    """
    require(path, (str, os.PathLike), "checkpoint: file", "a path")
    path = Path(path)
    if is_packed(path):
        return read_packed_checkpoint(path)
    document = load_plain(path)
    if isinstance(document, dict) and (
        isinstance(document.get("format"), str) or "format_version" in document
    ):
        return Checkpoint(path=path, **fields_of(document, path))
    return Checkpoint(path=path, **legacy_fields(document, path))


def load_state(model: nn.Module, checkpoint: Checkpoint, strict: bool = True) -> None:
    """Copy a checkpoint's weights into a model, by canonical names.

    A model that is not as thin, or factored, as the checkpoint's was is made so first. A model that the
    weights do not fit stays as it is, in structure too.
    `num_batches_tracked` may be missing, as in files from before PyTorch 0.4.1.

    Args:
        strict: also refuse weights that the model has no place for; otherwise they are logged.

    Raises:
        CheckpointError: the checkpoint is of another model; says which, and what differs.
    """
    require(model, nn.Module, "checkpoint: model", "a torch.nn.Module")
    with unchanged_on_error(model):
        fitting = _fitting_state(model, checkpoint, strict)
    model.load_state_dict(fitting)


def _fitting_state(
    model: nn.Module, checkpoint: Checkpoint, strict: bool, optimizer: Optimizer | None = None
) -> dict[str, Any]:
    """The state, with the checkpoint's weights in it, of a model that is made as thin as they are."""
    if not is_other_arch(model, checkpoint):
        restore_structure(model, checkpoint, optimizer)
    current = model.state_dict()
    raw_names = dict(zip(canonical_state_dict(model), current, strict=True))
    stored = checkpoint.state_dict
    missing = [name for name in raw_names if name not in stored and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in stored if name not in raw_names]
    unlike = [
        f"{name}' is {_form(stored[name])} in the checkpoint, {_form(current[raw])} in the model"
        for name, raw in raw_names.items()
        if name in stored and _form(stored[name]) != _form(current[raw])
    ]
    if is_other_arch(model, checkpoint) or missing or unlike or (strict and unexpected):
        faults = [f"{len(unlike)} of another form, first '{unlike[0]}"] if unlike else []
        for names, kind in ((missing, "missing"), (unexpected, "unexpected")):
            faults += [f"{len(names)} {kind}, first '{names[0]}'"] if names else []
        reason, remedy = _reason_and_remedy(model, checkpoint, bool(unlike))
        raise CheckpointError(
            f"{checkpoint.path}: {reason}: {'; '.join([models_named(model, checkpoint), *faults, remedy])}"
        )
    if strict:
        _check_masks(model, checkpoint)
    if unexpected:
        _logger.warning("%s: left aside, having no place in the model: %s", checkpoint.path, unexpected)
    current.update({raw: stored[name] for name, raw in raw_names.items() if name in stored})
    return current


def restore_quantizer(model: nn.Module, checkpoint: Checkpoint) -> Quantizer | None:
    """Prepare a floating-point model as the checkpoint's was, thinned alike, so that its weights fit.

    Args:
        model: the model as it was before quantization; changed in place.

    Returns:
        The quantizer; None when the checkpoint is not of a quantized model.

    Raises:
        CheckpointError: the checkpoint is of another model, or its quantizer cannot be rebuilt.
    """
    if checkpoint.quantizer is None:
        return None
    try:
        with unchanged_on_error(model):
            restore_structure(model, checkpoint)
            return rebuild_quantized(model, checkpoint.quantizer)
    except CheckpointError:
        raise
    except DistillerError as error:
        raise CheckpointError(
            f"{checkpoint.path}: is of a quantized model, and this one cannot be quantized alike: {error}"
        ) from error


def restore_scheduler(
    scheduler: CompressionScheduler, checkpoint: Checkpoint, masks_only: bool = False
) -> None:
    """Give a scheduler the masks, and its policies the states, that a checkpoint holds.

    Args:
        scheduler: of the model that the checkpoint's weights are in.
        masks_only: leave the policies' states aside: the schedule is another one, or begins anew.

    Raises:
        CheckpointError: the checkpoint is of another schedule or model, or a state is malformed.
    """
    _check_masks(scheduler.model, checkpoint)
    state = dict(checkpoint.scheduler or {"masks": checkpoint.masks})
    if masks_only:
        state.pop("policies", None)
    fault = _rates_fault(scheduler, state)
    if fault is not None:
        raise CheckpointError(f"{checkpoint.path}: {fault}")
    try:
        scheduler.load_state_dict(state)
    except DistillerError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error
    except Exception as error:  # each policy and pruner has a state of its own
        raise CheckpointError(
            f"{checkpoint.path}: 'scheduler.policies' has a state that does not fit its policy "
            f"({type(error).__name__}: {error}); start anew from the checkpoint's weights"
        ) from error


def load_checkpoint(
    model: nn.Module | None,
    chkpt_file: str | Path,
    optimizer: Optimizer | None = None,
    model_device: str | torch.device | None = None,
    lean_checkpoint: bool = False,
    strict: bool = False,
) -> tuple[nn.Module, CompressionScheduler | None, Optimizer | None, int]:
    """Read a checkpoint into a model, and set up what training goes on with.

    Args:
        model: takes the weights; None creates the checkpoint's own (from its arch and dataset).
        chkpt_file: a checkpoint of ours, Distiller's, or a file of weights only.
        optimizer: takes the saved state; None rebuilds the saved SGD, Adam or AdamW.
        model_device: where the model goes; None leaves it where it is.
        lean_checkpoint: weights only.
        strict: refuse weights that the model has no place for.

    Returns:
        The model, a scheduler that holds the masks and no policies (None without masks), the
        optimizer (None without state), and the epoch to start with (0 when unknown).

    Raises:
        CheckpointError: the checkpoint cannot be read, or is of another model or optimizer.
    """
    checkpoint = read_checkpoint(chkpt_file)
    if model is None:
        model = _created_model(checkpoint)
    require(model, nn.Module, "checkpoint: model", "a torch.nn.Module")
    scheduler = None
    with unchanged_on_error(model, optimizer, values=True):
        model.load_state_dict(_fitting_state(model, checkpoint, strict, optimizer))
        if model_device is not None:
            model.to(model_device)
        if lean_checkpoint:
            return model, None, None, 0
        _check_masks(model, checkpoint)
        optimizer = restore_optimizer(model, checkpoint, optimizer)
    for note in checkpoint.notes:
        _logger.warning("%s: %s", checkpoint.path, note)
    if checkpoint.scheduler is not None or checkpoint.masks:
        scheduler = CompressionScheduler(model)
        restore_scheduler(scheduler, checkpoint, masks_only=True)
    start_epoch = 0 if checkpoint.epoch is None else checkpoint.epoch + 1
    return model, scheduler, optimizer, start_epoch


def load_lean_checkpoint(
    model: nn.Module | None, f: str | Path, model_device: str | torch.device | None = None
) -> nn.Module:
    """`load_checkpoint` of the weights alone; returns the model."""
    return load_checkpoint(model, f, model_device=model_device, lean_checkpoint=True)[0]


def _form(value: Any) -> str:
    """Shape and kind of numbers: `(10, 64) float`. Precision may differ, the kind may not."""
    if not isinstance(value, Tensor):
        return "no tensor"
    kind = "float" if value.is_floating_point() else "complex" if value.is_complex() else "integer"
    return f"{tuple(value.shape)} {kind}"


def _reason_and_remedy(model: nn.Module, checkpoint: Checkpoint, forms_differ: bool) -> tuple[str, str]:
    """Why a checkpoint does not fit a model, and what to do about it."""
    if is_other_arch(model, checkpoint):
        return "is of another model", f"create the model as '{checkpoint.arch}'"
    if len(recipes_of(model)) > len(checkpoint.thinning_recipes) and forms_differ:
        return "is of the model before it was thinned", "create the model anew, or give a later checkpoint"
    if len(factorizations_of(model)) > len(checkpoint.factorization_recipes):
        return "is of the model before it was factored", "create the model anew, or give a later checkpoint"
    if checkpoint.quantizer is not None and _awaits_quantization(model, checkpoint.state_dict):
        return (
            f"is of a model that {checkpoint.quantizer['class']} has prepared",
            "prepare the model with the same quantizer first",
        )
    if forms_differ and checkpoint.arch == getattr(unwrap(model), "arch", None):
        return (
            "has tensors of other sizes than the model",
            "one of them was thinned or made with other settings; give a checkpoint of this model",
        )
    return "is of another model", "give a checkpoint of this model"


def _awaits_quantization(model: nn.Module, quantized_state: Mapping[str, Any]) -> bool:
    """Whether a quantized model's layers have the weights of the model's, which is not quantized yet."""
    if hasattr(unwrap(model), "quantizer_metadata"):
        return False
    current = canonical_state_dict(model)
    names = {name.replace("wrapped_module.", ""): value for name, value in quantized_state.items()}
    weights = {name: value for name, value in names.items() if name.rpartition(".")[2] == "weight"}
    return all(name in current and _form(value) == _form(current[name]) for name, value in weights.items())


def _check_masks(model: nn.Module, checkpoint: Checkpoint) -> None:
    """See to it that masks, their rules and the dense copies behind them are of this model's parameters."""
    prefix, state = "scheduler.", checkpoint.scheduler
    if state is None:
        prefix, state = "compression_sched.", {"masks": checkpoint.masks}
    try:
        MaskStore(model).check_state(state)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {prefix}{error}") from error


def _created_model(checkpoint: Checkpoint) -> nn.Module:
    if checkpoint.arch is None or checkpoint.dataset is None:
        lacking = " and ".join(key for key in ("arch", "dataset") if getattr(checkpoint, key) is None)
        raise CheckpointError(
            f"{checkpoint.path}: its model cannot be created: the file does not say its {lacking}; "
            "create the model and pass it"
        )
    try:
        return create_model(False, checkpoint.dataset, checkpoint.arch, parallel=False)
    except DistillerError as error:
        raise CheckpointError(f"{checkpoint.path}: its model cannot be created: {error}") from error


def _rates_fault(scheduler: CompressionScheduler, state: Mapping[str, Any]) -> str | None:
    """What is wrong with the saved states of learning rates: torch takes anything for one."""
    for index, (entry, saved) in enumerate(zip(scheduler.policies, state.get("policies", []), strict=False)):
        if entry.name != saved["name"] or not isinstance(entry.policy, LRPolicy):
            continue
        place = ("scheduler", "policies", index, "state")
        fresh, rates = entry.policy.state_dict(), entry.policy.lr_scheduler
        taken = [key for key in saved["state"] if key not in fresh and hasattr(rates, key)]
        if taken:  # a method, say, which the state would cover
            return f"'{key_path(*place, taken[0])}' is unknown"
        fault = unlike(saved["state"], fresh, *place)
        if fault is not None:
            return fault
    return None


def _reason(error: BaseException) -> str:
    """The operating system's words where they are behind it: torch reports only a position in the file."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0]
