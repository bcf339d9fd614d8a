"""Checkpoints: what a run needs to go on bit for bit, as plain data in one file.

A file appears whole or not at all: it is written under another name in the same folder,
synced, and renamed. It is read back without running anything in it, whoever wrote it.
Knows nothing about training, and takes the scheduler's state as it is.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distiller.apputils.checkpoint_format import (
    FORMAT,
    Checkpoint,
    Stateful,
    document_of,
    fields_of,
    optimizer_param_names,
)
from distiller.apputils.legacy_checkpoint import legacy_fields, load_plain
from distiller.apputils.rng_state import capture_rng_state, restore_rng_state
from distiller.atomic_file import replacing
from distiller.errors import CheckpointError
from distiller.models import create_model
from distiller.names import canonical_state_dict, named_parameters, unwrap
from distiller.scheduler import CompressionScheduler

__all__ = [
    "Checkpoint",
    "capture_rng_state",
    "load_checkpoint",
    "load_lean_checkpoint",
    "load_state",
    "read_checkpoint",
    "restore_optimizer",
    "restore_rng_state",
    "save_checkpoint",
]

_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": torch.optim.SGD,
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
}
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
        model: its weights, and its attributes `dataset`, `input_shape`, `thinning_recipes` and
            `quantizer_metadata` where it has them.
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
    try:
        for path in (best, target) if is_best else (target,):
            with replacing(path) as file:
                torch.save(document, file)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{target}: cannot be written: {_reason(error)}; make room, or choose another folder"
        ) from error
    return target


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of ours, a Distiller `.pth.tar`, or a file of weights only.

    Raises:
        CheckpointError: the file is missing, empty, cut off, damaged, not a checkpoint, of a
            newer version, or asks for something that could run code (which is not run).
    """
    path = Path(path)
    document = load_plain(path)
    if isinstance(document, dict) and document.get("format") == FORMAT:
        return Checkpoint(path=path, **fields_of(document, path))
    return Checkpoint(path=path, **legacy_fields(document, path))


def load_state(model: nn.Module, checkpoint: Checkpoint, strict: bool = True) -> None:
    """Copy a checkpoint's weights into a model, by canonical names.

    Everything is checked first: a model that the weights do not fit stays as it is.
    `num_batches_tracked` may be missing, as in files from before PyTorch 0.4.1.

    Args:
        strict: also refuse weights that the model has no place for; otherwise they are logged.

    Raises:
        CheckpointError: the checkpoint is of another model; says which, and what differs.
    """
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
    arch = getattr(unwrap(model), "arch", None)
    is_other_arch = None not in (arch, checkpoint.arch) and arch != checkpoint.arch
    if is_other_arch or missing or unlike or (strict and unexpected):
        faults = [f"{len(unlike)} of another form, first '{unlike[0]}"] if unlike else []
        for names, kind in ((missing, "missing"), (unexpected, "unexpected")):
            faults += [f"{len(names)} {kind}, first '{names[0]}'"] if names else []
        reason, remedy = _reason_and_remedy(checkpoint, is_other_arch, bool(unlike))
        stored_arch = "an unknown model" if checkpoint.arch is None else f"'{checkpoint.arch}'"
        models = f"the checkpoint is of {stored_arch}, the model is '{arch or type(unwrap(model)).__name__}'"
        raise CheckpointError(f"{checkpoint.path}: {reason}: {'; '.join([models, *faults, remedy])}")
    if unexpected:
        _logger.warning("%s: left aside, having no place in the model: %s", checkpoint.path, unexpected)
    current.update({raw: stored[name] for name, raw in raw_names.items() if name in stored})
    model.load_state_dict(current)


def restore_optimizer(
    model: nn.Module, checkpoint: Checkpoint, optimizer: Optimizer | None = None
) -> Optimizer | None:
    """Give an optimizer the state it had, or rebuild the one that was saved.

    Args:
        model: the model whose parameters are optimized, where it is to stay.
        optimizer: of the class and with the parameters of the saved one; None rebuilds it, which
            is possible for SGD, Adam and AdamW.

    Returns:
        The optimizer; as it was given when the checkpoint has no state for one.

    Raises:
        CheckpointError: the saved optimizer is another one, or cannot be rebuilt.
    """
    saved = checkpoint.optimizer
    if saved is None:
        return optimizer
    try:
        kind, groups, state = saved["class"], saved["param_names"], saved["state_dict"]
        if optimizer is None:
            optimizer = _rebuilt_optimizer(model, checkpoint, kind, groups)
        given = type(optimizer).__name__
        if given != kind:
            raise CheckpointError(f"{checkpoint.path}: its optimizer is {kind}, got {given}; use {kind}")
        if optimizer_param_names(model, optimizer) != groups:
            raise CheckpointError(
                f"{checkpoint.path}: its optimizer has other parameters, or in other groups; "
                "build the optimizer as in the run that was saved, or start with a fresh one"
            )
        optimizer.load_state_dict(copy.deepcopy(state))
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: its optimizer's state does not fit ({error}); start with a fresh optimizer"
        ) from error
    return optimizer


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
    load_state(model, checkpoint, strict=strict)
    if model_device is not None:
        model.to(model_device)
    if lean_checkpoint:
        return model, None, None, 0
    for note in checkpoint.notes:
        _logger.warning("%s: %s", checkpoint.path, note)
    optimizer = restore_optimizer(model, checkpoint, optimizer)
    start_epoch = 0 if checkpoint.epoch is None else checkpoint.epoch + 1
    return model, _mask_scheduler(model, checkpoint), optimizer, start_epoch


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


def _reason_and_remedy(checkpoint: Checkpoint, is_other_arch: bool, forms_differ: bool) -> tuple[str, str]:
    """Why a checkpoint does not fit a model, and what to do about it."""
    if is_other_arch:
        return "is of another model", f"create the model as '{checkpoint.arch}'"
    if checkpoint.thinning_recipes and forms_differ:
        count = len(checkpoint.thinning_recipes)
        return (
            f"is physically thinned and carries {count} thinning recipe{'s' if count > 1 else ''}",
            "give a model with the same filters and channels removed, or a checkpoint from before thinning",
        )
    if checkpoint.quantizer is not None:
        return (
            f"is of a model that {checkpoint.quantizer.get('class')} has prepared",
            "prepare the model with the same quantizer first",
        )
    return "is of another model", "give a checkpoint of this model"


def _created_model(checkpoint: Checkpoint) -> nn.Module:
    if checkpoint.arch is None or checkpoint.dataset is None:
        lacking = " and ".join(key for key in ("arch", "dataset") if getattr(checkpoint, key) is None)
        raise CheckpointError(
            f"{checkpoint.path}: its model cannot be created: the file does not say its {lacking}; "
            "create the model and pass it"
        )
    return create_model(False, checkpoint.dataset, checkpoint.arch, parallel=False)


def _mask_scheduler(model: nn.Module, checkpoint: Checkpoint) -> CompressionScheduler | None:
    if checkpoint.scheduler is None and not checkpoint.masks:
        return None
    state = {"masks": checkpoint.masks} if checkpoint.scheduler is None else checkpoint.scheduler
    scheduler = CompressionScheduler(model)
    scheduler.load_state_dict({key: value for key, value in state.items() if key != "policies"})
    return scheduler


def _rebuilt_optimizer(model: nn.Module, checkpoint: Checkpoint, kind: str, groups: list[Any]) -> Optimizer:
    params = dict(named_parameters(model))
    strangers = [name for group in groups for name in group if name not in params]
    if kind not in _OPTIMIZERS or strangers:
        known = ", ".join(_OPTIMIZERS)
        why = "it trains parameters that are not the model's" if strangers else f"it is not one of {known}"
        raise CheckpointError(
            f"{checkpoint.path}: its optimizer {kind} cannot be rebuilt: {why}; create it and pass it"
        )
    # The hyper-parameters come with the state.
    return _OPTIMIZERS[kind]([{"params": [params[name] for name in group]} for group in groups], lr=0.1)


def _reason(error: BaseException) -> str:
    """The operating system's words where they are behind it: torch reports only a position in the file."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0]
