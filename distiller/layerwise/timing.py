"""Latencies of several networks in turns, as median and quartiles.

A stall of the machine now and then, which a ninetieth percentile shows, leaves the quartiles alone.
Knows nothing about layers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from distiller.export.latency import measure_latencies

__all__ = ["Timing", "time_in_turns"]


_FEWEST_REPEATS = 7  # quartiles of fewer say little


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall time of a forward pass.

    Attributes:
        median_s: seconds per mini-batch.
        q1_s: first quartile.
        q3_s: third quartile.
        repeats: passes measured.
        batch_size: images in a pass.
        threads: that torch used within an operation.
        device: as torch writes it.
    """

    median_s: float
    q1_s: float
    q3_s: float
    repeats: int
    batch_size: int
    threads: int
    device: str


def time_in_turns(
    models: Sequence[nn.Module],
    input_shape: Sequence[int],
    batch_size: int,
    device: torch.device | str = "cpu",
    *,
    min_time: float = 0.5,
    max_repeats: int = 51,
) -> list[Timing]:
    """Time forward passes after a warm-up of two, the models taking turns, on random images.

    Args:
        models: each takes one tensor; on `device`.
        input_shape: of one image: (channels, height, width).
        batch_size: images in a pass.
        device: where the models are.
        min_time: seconds for each model to go on for. A round that has begun is finished; seven are always
            measured, if `max_repeats` allows.
        max_repeats: passes of each model at most.
    """
    measure_latencies(models, input_shape, batch_size, device=device, warmup=1, max_repeats=1)
    passes: list[list[float]] = [[] for _ in models]
    latency, rounds = None, 0
    end = time.perf_counter() + min_time * len(models)
    while rounds < min(_FEWEST_REPEATS, max_repeats) or (rounds < max_repeats and time.perf_counter() < end):
        # Who comes first finds the caches filled with the input: that falls on each in turn.
        order = [(rounds + index) % len(models) for index in range(len(models))]
        found = measure_latencies(
            [models[at] for at in order], input_shape, batch_size, device=device, warmup=0, max_repeats=1
        )
        for at, latency in zip(order, found, strict=True):
            passes[at].append(latency.median_s)
        rounds += 1
    assert latency is not None
    about = (rounds, latency.batch_size, latency.threads, latency.device)
    quartiles = [np.percentile(seconds, (25, 50, 75)).tolist() for seconds in passes]
    return [Timing(median, q1, q3, *about) for q1, median, q3 in quartiles]
