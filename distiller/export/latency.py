"""How long a forward pass takes, measured on this machine.

Knows nothing about data: the input is random.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from distiller.evaluation_mode import evaluating


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
    """`measure_latencies` of one model."""
    return measure_latencies(
        [model],
        input_shape,
        batch_size,
        device=device,
        warmup=warmup,
        min_time=min_time,
        max_repeats=max_repeats,
    )[0]


def measure_latencies(
    models: Sequence[nn.Module],
    input_shape: Sequence[int],
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    warmup: int = 2,
    min_time: float = 0.5,
    max_repeats: int = 1000,
) -> list[Latency]:
    """Time forward passes in evaluation and inference mode, after a warm-up, the models taking turns.

    What else the machine does meanwhile so weighs on all of them alike. The modes of all
    modules are afterwards as before, and the input takes nothing from torch's global random numbers.
    Models of one type get the same input.

    Args:
        models: each takes one tensor; on `device`.
        input_shape: of one image, without the batch: (channels, height, width).
        batch_size: images in a pass.
        device: where the models are.
        warmup: passes of each that are not counted; fewer when `min_time` is over.
        min_time: seconds for each model to go on for, in the warm-up and again in the measurement.
            A round that has begun is finished, and one is always measured.
        max_repeats: passes of each model at most.
    """
    device = torch.device(device)
    with ExitStack() as modes:
        for model in models:
            modes.enter_context(evaluating(model))
        modes.enter_context(torch.inference_mode())
        dtypes = [_dtype(model) for model in models]
        shape = (batch_size, *input_shape)
        images = {dtype: _random_images(shape, dtype, device) for dtype in dtypes}  # one may be large
        jobs = [(model, images[dtype]) for model, dtype in zip(models, dtypes, strict=True)]

        def rounds(most: int) -> list[list[float]]:
            """Seconds by round and model."""
            found: list[list[float]] = []
            end = time.perf_counter() + min_time * len(models)
            while len(found) < most and (not found or time.perf_counter() < end):
                found.append([_seconds(model, x, device) for model, x in jobs])
            return found

        if warmup:
            rounds(warmup)
        by_model = np.array(rounds(max_repeats)).T
    threads = torch.get_num_threads()
    return [
        Latency(median, p10, p90, len(seconds), batch_size, threads, str(device))
        for seconds in by_model
        for p10, median, p90 in [np.percentile(seconds, (10, 50, 90)).tolist()]
    ]


def _seconds(model: nn.Module, images: Tensor, device: torch.device) -> float:
    begin = time.perf_counter()
    model(images)
    _wait_for(device)
    return time.perf_counter() - begin


def _dtype(model: nn.Module) -> torch.dtype:
    """The type of the model's parameters, and so of its input."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _random_images(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normally distributed."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
