"""The states of the global random number generators, as plain data.

Knows nothing about files.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distiller.errors import CheckpointError

_WORDS = 624  # of 32 bits, in the state of a Mersenne Twister


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
    """Put the generators back to where `capture_rng_state` found them; all of them, or none.

    GPUs that this machine does not have are passed over: bit-equal resumption needs the same machine.

    Raises:
        CheckpointError: the state is not one that `capture_rng_state` made.
    """
    try:
        python = python_generator(state["python"])
        numpy = numpy_generator(state["numpy"])
        cpu = torch_generator(state["torch"])
        for index, cuda_state in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, index)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"random number generators: their saved state cannot be restored ({error}); "
            "start anew from the checkpoint's weights"
        ) from error
    random.setstate(python.getstate())
    np.random.set_state(numpy.get_state())  # noqa: NPY002
    torch.set_rng_state(cpu.get_state())


def python_generator(state: Any) -> random.Random:
    """A generator of Python's in a saved state.

    Raises:
        ValueError: it is none; says what is wanted.
    """
    generator = random.Random()
    try:
        version, _, cached = state
        is_known = type(version) is int and version == generator.VERSION
        if not is_known or not (cached is None or isinstance(cached, float)):
            raise ValueError(version)
        generator.setstate(state)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("a state of Python's generator of random numbers") from error
    return generator


def numpy_generator(state: Any) -> np.random.RandomState:
    """A generator of numpy's in a saved state.

    Raises:
        ValueError: it is none; says what is wanted.
    """
    generator = np.random.RandomState(0)
    try:
        kind, keys, position, has_cached, cached = state
        if not (_are_words(keys) and isinstance(position, int) and 0 <= position <= _WORDS):
            raise ValueError(position)  # numpy itself does not look, and would read foreign memory
        generator.set_state((kind, keys.numpy().astype(np.uint32), position, int(has_cached), float(cached)))
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError("a state of numpy's generator of random numbers") from error
    return generator


def torch_generator(state: Any) -> torch.Generator:
    """A generator of PyTorch's, for the CPU, in a saved state.

    Raises:
        ValueError: it is none; says what is wanted.
    """
    generator = torch.Generator()
    try:
        generator.set_state(state)
    except (TypeError, RuntimeError) as error:
        raise ValueError("a state of PyTorch's generator of random numbers") from error
    return generator


def _are_words(keys: Any) -> bool:
    is_list = isinstance(keys, Tensor) and keys.shape == (_WORDS,) and keys.dtype == torch.int64
    return is_list and 0 <= int(keys.min()) <= int(keys.max()) < 2**32
