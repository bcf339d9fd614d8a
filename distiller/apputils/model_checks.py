"""What a classifier's model must be, seen before anything is done with it.

Knows nothing about flags, data or training.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from distiller.errors import CheckpointError, UsageError, users_code
from distiller.names import canonical_state_dict, named_parameters

_STATISTICS = ("running_mean", "running_var")


def check_arch(arch: str) -> None:
    """Refuse what is no name, and no path of a function."""
    module, colon, function = arch.partition(":")
    if colon and not all([*module.split("."), *function.split(":")]):
        raise UsageError(f"arch: a function is given as package.module:function, got '{arch}'")


def check_finite(model: nn.Module, path: Path) -> None:
    """Refuse weights that cannot compute anything; a buffer of the user's own may be infinite."""
    params = dict(named_parameters(model))
    for name, value in canonical_state_dict(model).items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        counts = {"NaN": int(value.isnan().sum())}
        if name in params or name.rpartition(".")[2] in _STATISTICS:
            counts["inf"] = int(value.isinf().sum())
        found = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
        if found:
            raise CheckpointError(
                f"{path}: {name} holds {found}; give a checkpoint from before the training diverged"
            )


def check_user_model(model: nn.Module, arch: str, shape: tuple[int, ...], num_classes: int) -> None:
    """See to it that a model of the user's own answers an image with a number for each class."""
    was_training = model.training
    with users_code(f"arch: '{arch}', given images of shape {shape}"), torch.no_grad():
        answer = model.eval()(torch.zeros(shape))
    model.train(was_training)
    is_fit = isinstance(answer, torch.Tensor) and answer.dim() == 2 and answer.shape[1] >= num_classes
    if not is_fit:
        got = tuple(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
        raise UsageError(
            f"arch: '{arch}' must answer images of shape {shape} with logits of shape (1, {num_classes}), "
            f"got {got}; build it with the parameters num_classes and in_channels"
        )
