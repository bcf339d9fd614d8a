"""The states of the global random number generators, as plain data.

Knows nothing about files.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from distiller.errors import CheckpointError


def capture_rng_state() -> dict[str, Any]:
    """The states of PyTorch's, numpy's and Python's global random number generators, as plain data."""
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators back to where `capture_rng_state` found them.

    GPUs that this machine does not have are passed over: bit-equal resumption needs the same machine.

    Raises:
        CheckpointError: the state is not one that `capture_rng_state` made.
    """
    try:
        kind, keys, *rest = state["numpy"]
        random.setstate(state["python"])
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
        torch.set_rng_state(state["torch"])
        for index, cuda_state in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, index)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"random number generators: their saved state cannot be restored ({error}); "
            "start anew from the checkpoint's weights"
        ) from error
