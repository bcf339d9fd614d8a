"""What a classifier's model must be, seen before anything is done with it.

Knows nothing about flags, data or training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from distiller.errors import CheckpointError, UsageError, users_code
from distiller.evaluation_mode import buffers_kept
from distiller.names import canonical_state_dict, named_parameters
from distiller.observation import unobserved

_STATISTICS = ("running_mean", "running_var")
_TORCHS_WORDS = "Expected more than 1 value per channel when training"


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


def check_single_image(model: nn.Module, image: torch.Tensor) -> None:
    """Refuse a model that cannot be trained on a mini-batch of one image; nothing of it changes.

    Args:
        model: on the device of the image.
        image: (1, C, H, W).

    Raises:
        UsageError: one of its batch norms would see a single value of each channel.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.train()
        devices = [image.device] if image.device.type == "cuda" else []
        with (
            unobserved(model),
            buffers_kept(model),
            torch.no_grad(),
            torch.random.fork_rng(devices=devices),
            single_image_explained(),
        ):
            model(image)
    finally:
        for module, is_training in modes.items():
            module.training = is_training


@contextmanager
def single_image_explained() -> Iterator[None]:
    """Within the block, torch's refusal of a batch norm over a single value says what can be done.

    Raises:
        UsageError: there was one.
    """
    try:
        yield
    except ValueError as error:
        if _TORCHS_WORDS not in str(error):
            raise
        raise UsageError(
            "training: a mini-batch of one image is left over at the end of an epoch (or is asked for), of "
            "which a batch norm over maps of 1x1 sees a single value for each channel, that has no variance; "
            "give another --batch-size, or --effective-train-size"
        ) from error
