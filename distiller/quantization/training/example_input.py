"""An input to run a model with, where only shapes matter.

Knows nothing about quantization.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from distiller.dummy_input import shaped
from distiller.graph import input_shape_of
from distiller.names import unwrap

__all__ = ["example_input"]


def example_input(model: nn.Module, purpose: str) -> Any:
    """Zeros of the model's `input_shape`, where its parameters are; no random number is drawn.

    Raises:
        DistillerError: the model has no `input_shape`; names the purpose.
    """
    like = next((p for p in unwrap(model).parameters() if p.is_floating_point()), torch.empty(0))
    zeros = partial(torch.zeros, device=like.device, dtype=like.dtype)
    return shaped(input_shape_of(model, purpose), zeros)
