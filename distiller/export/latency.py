"""How long a forward pass takes, measured on this machine.

Knows nothing about data: the input is random.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Latency:
    """Wall time of a forward pass.

    Attributes:
        median_s: seconds per batch.
        p10_s: tenth percentile.
        p90_s: ninetieth percentile.
        repeats: passes measured.
        batch_size: images in a pass.
        threads: that torch uses within an operation.
        device: as torch writes it, such as `cpu` or `cuda:0`.
    """

    median_s: float
    p10_s: float
    p90_s: float
    repeats: int
    batch_size: int
    threads: int
    device: str


def measure_latency(
    model: nn.Module,
    input_shape: Sequence[int],
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    warmup: int = 2,
    min_time: float = 0.5,
    max_repeats: int = 1000,
) -> Latency:
    """Time forward passes in evaluation and inference mode, after a warm-up.

    The modes of all modules are afterwards as before, and the input takes nothing from
    torch's global random numbers.

    Args:
        model: takes one tensor; on `device`.
        input_shape: of one image, without the batch: (channels, height, width).
        batch_size: images in a pass.
        device: where the model is.
        warmup: passes that are not counted; fewer when `min_time` is over.
        min_time: seconds to go on for, in the warm-up and again in the measurement. A pass that
            has begun is finished, and one is always measured.
        max_repeats: passes at most.
    """
    device = torch.device(device)
    images = _random_images((batch_size, *input_shape), model, device)
    seconds: list[float] = []
    with _evaluation_mode(model), torch.inference_mode():
        warm = time.perf_counter() + min_time
        for _ in range(warmup):
            model(images)
            _wait_for(device)
            if time.perf_counter() >= warm:
                break
        end = time.perf_counter() + min_time
        while True:
            begin = time.perf_counter()
            model(images)
            _wait_for(device)
            now = time.perf_counter()
            seconds.append(now - begin)
            if now >= end or len(seconds) >= max_repeats:
                break
    p10, median, p90 = np.percentile(seconds, (10, 50, 90)).tolist()
    return Latency(median, p10, p90, len(seconds), batch_size, torch.get_num_threads(), str(device))


def _random_images(shape: Sequence[int], model: nn.Module, device: torch.device) -> Tensor:
    """Normally distributed, in the type of the model's parameters."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(device, next(dtypes, torch.float32))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode back in the end (some may be frozen)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
