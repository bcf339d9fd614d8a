"""Lottery tickets from two checkpoints: the untrained weights under the masks of the pruned ones.

    python -m distiller.apputils.lottery UNTRAINED PRUNED

writes `<untrained>_lottery_checkpoint.pth.tar` beside the first. What a schedule does in the course of one
training, over several rounds, is `rewind.WeightRewinder`.
Knows nothing about models: checkpoints in, checkpoint out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from distiller.apputils.checkpoint import read_checkpoint, write_document
from distiller.apputils.checkpoint_format import Checkpoint, sealed
from distiller.apputils.rng_state import capture_rng_state
from distiller.apputils.run_seed import SPLIT_EXTRAS
from distiller.errors import CheckpointError, DistillerError
from distiller.masks import PRUNER_SLOT

__all__ = ["lottery_masks", "save_lottery_ticket"]


def lottery_masks(pruned: Checkpoint) -> dict[str, Tensor]:
    """What a pruned network has kept: mask = (w != 0), by parameter name, for tensors with zeros.

    Tensors of fewer than two dimensions, in which zeros are no sign of pruning, are masked where the
    checkpoint has a mask of them.

    Args:
        pruned: of a pruned network.

    Returns:
        Masks of bool, True keeps; {} where nothing is pruned.
    """
    own = set(pruned.masks) | set((pruned.scheduler or {}).get("masks", {}))
    kept = {
        name: value != 0
        for name, value in pruned.state_dict.items()
        if isinstance(value, Tensor) and value.is_floating_point() and (value.dim() >= 2 or name in own)
    }
    return {name: mask for name, mask in kept.items() if not mask.all()}


def save_lottery_ticket(untrained: str | Path, pruned: str | Path, folder: str | Path | None = None) -> Path:
    """Write the checkpoint of a lottery ticket: the untrained weights where the pruned ones are not zero.

    Its masks are in it: training that begins with it (`--resume-from` with `--reset-optimizer`) keeps them.

    Args:
        untrained: checkpoint of the network before training, as of `--save-untrained-model`, or early in it.
        pruned: checkpoint of the same network after training and pruning.
        folder: an existing folder; default that of `untrained`.

    Returns:
        The path of `<untrained>_lottery_checkpoint.pth.tar`, where `<untrained>` is the file's name without
        `_checkpoint.pth.tar`.

    Raises:
        CheckpointError: a file cannot be read or written, the two are of different networks, or the second
            is not pruned.

    Source: Frankle, Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks"
    (arXiv 1803.03635), section 1.
    """
    before, after = read_checkpoint(untrained), read_checkpoint(pruned)
    masks = lottery_masks(after)
    _check_pair(before, after, masks)
    state = {
        name: value * masks[name].to(value.dtype) if name in masks else value
        for name, value in before.state_dict.items()
    }
    extras = {"is_untrained": True, "reference": after.extras.get("reference")}
    extras |= {name: before.extras[name] for name in SPLIT_EXTRAS if name in before.extras}
    factored = [recipe.to_plain() for recipe in before.factorization_recipes]
    document = sealed(
        {
            "epoch": 0,
            "arch": before.arch or after.arch,
            "dataset": before.dataset or after.dataset,
            "input_shape": before.input_shape,
            "state_dict": state,
            "optimizer": None,
            "scheduler": {"masks": {name: {PRUNER_SLOT: mask} for name, mask in masks.items()}},
            "quantizer": None,
            "thinning_recipes": [recipe.to_plain() for recipe in before.thinning_recipes],
            "rng": capture_rng_state(),
            "extras": extras,
            **({"factorization_recipes": factored} if factored else {}),
        }
    )
    name = before.path.name.removesuffix(".pth.tar").removesuffix("checkpoint").removesuffix("_")
    target = Path(folder or before.path.parent) / f"{name or 'untrained'}_lottery_checkpoint.pth.tar"
    write_document(document, target)
    return target


def _check_pair(untrained: Checkpoint, pruned: Checkpoint, masks: dict[str, Tensor]) -> None:
    """See to it that the checkpoints are of one network, of which the second is pruned."""
    where, other = f"{pruned.path}", f"'{untrained.path}'"
    if untrained.quantizer is not None or pruned.quantizer is not None:
        quantized = untrained if untrained.quantizer is not None else pruned
        raise CheckpointError(f"{quantized.path}: is of a quantized model; give one in floating point")
    if untrained.arch and pruned.arch and untrained.arch != pruned.arch:
        raise CheckpointError(
            f"{where}: is of '{pruned.arch}', {other} of '{untrained.arch}'; give two of one network"
        )
    for name, value in pruned.state_dict.items():
        form, other_form = _form(value), _form(untrained.state_dict.get(name))
        if form != other_form and not name.endswith("num_batches_tracked"):
            raise CheckpointError(
                f"{where}: is of another network than {other}: '{name}' is {form} in it, {other_form} there; "
                "give two of one network"
            )
    if not masks:
        raise CheckpointError(f"{where}: has no pruned weights; give a checkpoint of a pruned network")


def _form(value: object) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "no tensor"


def _main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status."""
    match arguments:
        case [untrained, pruned] if not untrained.startswith("-"):
            try:
                path = save_lottery_ticket(untrained, pruned)
            except DistillerError as error:
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
                return 2
            sys.stdout.write(f"Saved lottery ticket to: {path}\n")
            return 0
    sys.stderr.write("usage: python -m distiller.apputils.lottery UNTRAINED PRUNED\n")
    return 2


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1:]))
