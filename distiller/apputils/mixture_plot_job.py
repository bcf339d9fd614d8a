"""The program's job `--plot-mixture`: pictures of a training with soft weight sharing, from its checkpoint.

    mixture_joint.png       weights at the end against those at the beginning
    mixture_histogram.png   of the weights at the end, with the components
    mixture_layers.png      the same for each parameter
    mixture_evolution.png   means, standard deviations and shares, accuracy and sparsity, by epoch
    mixture.gif             the joint plot of every epoch

Where parameters have mixtures of their own, `_<parameter>` is in the names of all but that of the layers;
where the schedule has several instances of SoftWeightSharing, their names are. The last frame and pictures of
weights are of the weights in the checkpoint, which may be quantized.
Knows nothing about models or training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from distiller.apputils.checkpoint import read_checkpoint
from distiller.apputils.checkpoint_format import Checkpoint
from distiller.errors import CheckpointError, UsageError
from distiller.weight_sharing.history import EpochOfSharing, epochs_in
from distiller.weight_sharing.plots import (
    evolution_figure,
    histogram_figure,
    joint_figure,
    layers_figure,
    save_animation,
    save_figure,
)

__all__ = ["plot_mixture", "sharing_histories"]

_SUFFIX = "checkpoint.pth.tar"


def plot_mixture(run_folder: str | Path) -> list[Path]:
    """Draw what the last checkpoint of a run folder knows of its mixtures, into that folder.

    Args:
        run_folder: of a training under a schedule with `SoftWeightSharing`.

    Returns:
        The pictures.

    Raises:
        UsageError: it is no folder, there is no checkpoint in it, none of such a training, or no epoch was
            finished.
        CheckpointError: it cannot be read.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "there is no such folder"
        raise UsageError(
            f"--plot-mixture {folder}: {what}; give the run folder of a training with SoftWeightSharing, "
            f"with the *{_SUFFIX} in it that the training ended with"
        )
    checkpoint = read_checkpoint(_latest(folder))
    histories = sharing_histories(checkpoint)
    if not histories:
        raise UsageError(
            f"--plot-mixture {folder}: {checkpoint.path.name} is not of a training with SoftWeightSharing; "
            "give the run folder of one"
        )
    written: list[Path] = []
    for name, state in histories.items():
        prefix = "mixture" if len(histories) == 1 else f"mixture_{name}"
        written += _draw(folder, prefix, checkpoint, state)
    return written


def sharing_histories(checkpoint: Checkpoint) -> dict[str, Mapping[str, Any]]:
    """The histories of the checkpoint's policies of soft weight sharing, by policy."""
    found: dict[str, Mapping[str, Any]] = {}
    for policy in (checkpoint.scheduler or {}).get("policies", []):
        state = policy.get("state", {})
        if isinstance(state, Mapping) and {"mixtures", "history"} <= state.keys():
            found[str(policy["name"]).rpartition(" ")[2]] = state["history"]
    return found


def _latest(folder: Path) -> Path:
    """The checkpoint that a training in this folder ended with."""
    found = [
        path
        for path in folder.glob(f"*{_SUFFIX}")
        if path.is_file() and not path.name.endswith(f"untrained_{_SUFFIX}")
    ]
    if not found:
        raise UsageError(
            f"--plot-mixture {folder}: there is no *{_SUFFIX} in it; give the run folder of a training"
        )
    return max(found, key=lambda path: (path.stat().st_mtime, path.name))


def _draw(folder: Path, prefix: str, checkpoint: Checkpoint, state: Mapping[str, Any]) -> list[Path]:
    try:
        before, epochs = dict(state["before"]), epochs_in(state)
        end = _end(checkpoint, state["places"], epochs)
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: the history of its mixtures is damaged, {type(error).__name__}: {error}; "
            "give the run folder of another training"
        ) from error
    if not epochs:
        raise UsageError(
            f"--plot-mixture {folder}: no epoch of SoftWeightSharing is finished yet; train on first"
        )
    frames = epochs if end is None else [*epochs, end]
    groups = list(epochs[-1].mixtures)
    written = []
    for group in groups:
        name = f"_{group}" if len(groups) > 1 else ""
        pictures = {
            "joint": joint_figure(before, frames[-1], group),
            "histogram": histogram_figure(frames[-1], group),
            "evolution": evolution_figure(epochs, group),
        }
        written += [
            save_figure(figure, folder / f"{prefix}_{kind}{name}.png") for kind, figure in pictures.items()
        ]
        written.append(save_animation(folder / f"{prefix}{name}.gif", before, frames, group))
    return [*written, save_figure(layers_figure(frames[-1]), folder / f"{prefix}_layers.png")]


def _end(
    checkpoint: Checkpoint, places: Mapping[str, Tensor], epochs: list[EpochOfSharing]
) -> EpochOfSharing | None:
    """The weights in the checkpoint, if training went on after the last epoch of the mixture."""
    if not epochs or checkpoint.epoch is None or checkpoint.epoch <= epochs[-1].epoch:
        return None
    weights = {name: checkpoint.state_dict[name].flatten()[where].float() for name, where in places.items()}
    return replace(epochs[-1], epoch=checkpoint.epoch, figures={}, weights=weights)
