"""Seeds, and deterministic kernels. Knows nothing about what is computed."""

from __future__ import annotations

import random

import numpy as np
import torch


def set_deterministic(seed: int = 0, deterministic: bool = True) -> None:
    """Seed Python's, numpy's and torch's generators; with `deterministic` choose deterministic kernels too.

    Operations that have no deterministic kernel warn and go on.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global generator is what user code may draw from
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
