"""Early exits of a program's model: those that its checkpoint keeps, and those that the flags ask for.

Knows nothing about files, nor about when an image leaves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distiller.apputils.checkpoint_format import Checkpoint
from distiller.apputils.early_exit_usage import leaves_early
from distiller.apputils.exit_scores import is_quantized_after_training
from distiller.branch_points import exit_names, exits_of
from distiller.early_exit.branches import attach_exits_to, attach_stored_exits, stored_exits
from distiller.early_exit.loss import JointLoss
from distiller.early_exit.rules import ExitRule, check_count
from distiller.errors import CheckpointError, DistillerError, UsageError
from distiller.names import unwrap

if TYPE_CHECKING:
    from distiller.apputils.image_classifier import ClassifierCompressor


def restore_exits(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Attach exits to a model as the checkpoint's had them, if it has none yet.

    Raises:
        CheckpointError: the model has others, has been changed since it was created, or cannot have them.
    """
    theirs = [dict(exit) for exit in checkpoint.early_exits]
    bare: Any = unwrap(model)
    if not theirs or stored_exits(bare) == theirs:
        return
    if exits_of(bare):
        raise CheckpointError(
            f"{checkpoint.path}: has exits behind {', '.join(exit['layer'] for exit in theirs)}, the model "
            f"behind {', '.join(exit_names(bare))}; give a model without"
        )
    if getattr(bare, "thinning_recipes", ()) or getattr(bare, "factorization_recipes", ()):
        raise CheckpointError(
            f"{checkpoint.path}: has exits, and the model has been thinned or factored without; give a model "
            "that is as it was created"
        )
    if getattr(bare, "input_shape", None) is None:
        bare.input_shape = checkpoint.input_shape
    try:
        with torch.random.fork_rng(devices=[]):  # the branches get the checkpoint's weights
            attach_stored_exits(bare, theirs)
    except DistillerError as error:
        raise CheckpointError(
            f"{checkpoint.path}: early_exits: the model cannot have the checkpoint's exits: {error}"
        ) from error


def prepared_exits(compressor: ClassifierCompressor) -> nn.Module:
    """A classifier's model with the exits that its flags ask for, everything said of exits found in order.

    Raises:
        UsageError: the model cannot have these exits, or has no exits or others than the flags speak of.
    """
    args, model = compressor.args, unwrap(compressor.model)
    layers = args.earlyexit_layers
    if layers:
        _attach(compressor, model, layers)
    exits = len(exits_of(model))
    flags = {"lossweights": args.earlyexit_lossweights, "thresholds": args.earlyexit_thresholds,
             "shares": args.earlyexit_shares}  # fmt: skip
    for name, values in (*flags.items(), ("max-drop", args.earlyexit_max_drop)):
        if values is None:
            continue
        if not exits:
            raise UsageError(
                f"--earlyexit-{name}: '{args.arch}' has no early exits; give --earlyexit-layers, or an "
                "architecture that has some, as resnet20_cifar_earlyexit"
            )
        if isinstance(values, list):
            check_count(name, len(values), exits)
    if leaves_early(args) and is_quantized_after_training(model):
        raise UsageError(
            "--earlyexit-thresholds: the checkpoint is of a model that was quantized after training, whose "
            "exits were not calibrated; give one of a training with quantization, or in floating point"
        )
    if args.earlyexit_thresholds is not None:
        rule = ExitRule(args.earlyexit_criterion, tuple(args.earlyexit_thresholds))
        rule.check(exits, compressor.facts.num_classes)
    return compressor.model


def joint_loss(model: nn.Module, weights: list[float] | None) -> JointLoss | None:
    """The criterion of a training: of all outputs; None for a model without exits.

    Raises:
        UsageError: the model has exits, and their losses have no weights.
    """
    names = exit_names(unwrap(model))
    if not names:
        return None
    if weights is None:
        raise UsageError(
            f"the model has early exits ({', '.join(names)}), whose losses need weights: give "
            f"--earlyexit-lossweights {' '.join(['W'] * len(names))}, as "
            f"{' '.join(f'{0.4 / len(names):.2g}' for _ in names)}"
        )
    return JointLoss(weights)


def _attach(compressor: ClassifierCompressor, model: nn.Module, layers: list[str]) -> None:
    checkpoint = compressor.checkpoint
    here = [exit["layer"] for exit in stored_exits(model)]
    if here == layers:
        return
    if exits_of(model):
        raise UsageError(
            f"--earlyexit-layers {' '.join(layers)}: the model has exits already, behind "
            f"{' '.join(here or exit_names(model))}; leave the flag out"
        )
    if checkpoint is not None:
        if compressor.args.evaluate:
            raise UsageError(
                f"--earlyexit-layers: {checkpoint.path} has no exits, and untrained ones say nothing; train "
                "them first, with --earlyexit-lossweights and without --evaluate"
            )
        if compressor.goes_on:
            raise UsageError(
                "--earlyexit-layers: the run that is resumed has no exits; take its weights only, with "
                "--exp-load-weights-from, or add --reset-optimizer"
            )
        if (
            checkpoint.quantizer is not None
            or checkpoint.thinning_recipes
            or checkpoint.factorization_recipes
        ):
            raise UsageError(
                f"--earlyexit-layers: {checkpoint.path} is of a model that was thinned, factored or "
                "quantized; attach exits before that"
            )
    attach_exits_to(model, layers)
