"""Where a run computes. Knows nothing about models."""

from __future__ import annotations

import os

import torch

from distiller.errors import UsageError


def choose_device(
    device: str | None = None, cpu: bool = False, gpus: str | None = None
) -> tuple[torch.device, list[int] | None]:
    """The device, and the GPUs for DataParallel (None: one device).

    Args:
        device: as torch names it; None: the GPUs where there are any, else the CPU.
        cpu: the CPU, whatever else is there.
        gpus: comma-separated GPU numbers; None: all.

    Raises:
        UsageError: there is no such device here.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cpu:
        return torch.device("cpu"), None
    if gpus is not None:
        ids = _gpu_ids(gpus, available)
        return torch.device("cuda", ids[0]), ids
    if device is None:
        return (torch.device("cuda", 0), list(range(available))) if available else (torch.device("cpu"), None)
    try:
        chosen = torch.device(device)
        torch.ones(1, device=chosen).tolist()  # the device `meta` has shapes, but no numbers
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0]  # its first sentence: PyTorch's may be pages
        raise UsageError(f"--device {device}: cannot be used here: {reason}; try --device cpu") from error
    return chosen, None


def _gpu_ids(gpus: str, available: int) -> list[int]:
    try:
        ids = [int(part) for part in gpus.split(",")]
    except ValueError:
        raise UsageError(f"--gpus: must be comma-separated numbers, got '{gpus}'") from None
    missing = [gpu for gpu in ids if not 0 <= gpu < available]
    if missing:
        raise UsageError(f"--gpus: no GPU {missing[0]}; this machine has {available}. Try --cpu")
    return ids


def usable_processors() -> int:
    """How many processors this process may use; with more workers PyTorch warns, and nothing is won."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this operating system
        return os.cpu_count() or 1
