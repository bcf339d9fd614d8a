"""A sensitivity sweep as a plain loop does it, and the networks that benchmarks of sweeps have.

Images are in memory, and evaluated in inference mode by all threads, in batches of the size that
`compress_classifier.py` has by default. Knows nothing about how the engine runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.side_by_side import medians
from distiller.apputils.datasets import decode_dataset
from distiller.evaluation_mode import evaluating
from distiller.models import create_model
from distiller.replay import Variant, applied
from distiller.sensitivity.block_engine import Place
from distiller.sensitivity.decisions import Tally, right_answers
from distiller.sensitivity.units import Unit

DENSE = -1
"""The place of the level that changes nothing."""
BATCH = 256
_OTHER_BATCHES = (32, 64, 128)
_ROUNDS = 7


@dataclass(frozen=True)
class Workload:
    """A network and its images.

    Attributes:
        name: what figures call it.
        model: in evaluation mode.
        images: (n, C, H, W).
        labels: (n,).
        block: images of a block.
    """

    name: str
    model: nn.Module
    images: Tensor
    labels: Tensor
    block: int


def resnet20(count: int, block: int) -> Workload:
    """ResNet-20, trained if there is a checkpoint, on Fashion-MNIST."""
    model = create_model(False, "fashion-mnist", "resnet20_cifar", parallel=False).eval()
    logs = Path(__file__).resolve().parents[1] / "logs" / "results" / "resnet20_cifar_fashion_mnist" / "dense"
    found = sorted(logs.glob("*/dense_checkpoint.pth.tar"))
    if found:
        model.load_state_dict(torch.load(found[-1], weights_only=True)["state_dict"])
    print(f"resnet20: {'trained' if found else 'random weights: there is no checkpoint of it'}")
    decoded = decode_dataset("fashion-mnist", None, test_only=True)
    facts = decoded.facts
    pixels = decoded.test.images.float().div(255)  # type: ignore[union-attr]
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (facts.mean, facts.std))
    images = (pixels - mean) / std
    return Workload("resnet20", model, images[:count], decoded.test.labels[:count], block)  # type: ignore[union-attr]


def random_weights(name: str, dataset: str, arch: str, size: int, count: int) -> Workload:
    """A network with random weights on random images, whose labels are what it answers."""
    torch.manual_seed(0)
    model = create_model(False, dataset, arch, parallel=False)
    images = torch.randn(count, 3, size, size)
    with torch.no_grad():
        model(images[:64])  # batch norms that have seen something
        labels = torch.cat([model.eval()(part) for part in images.split(64)]).argmax(1)
    return Workload(name, model, images, labels, 64)


@dataclass(frozen=True)
class Evaluated:
    """One point.

    Attributes:
        tally: its counts.
        is_right: which images it gets right, (n,).
    """

    tally: Tally
    is_right: Tensor


def plain_loop(
    work: Workload, units: Sequence[Unit], images: Tensor, labels: Tensor
) -> tuple[dict[Place, Evaluated], float]:
    """A full evaluation for every point, as plain loops do: level 0 of every weight too, at place -1.

    Returns:
        What each point comes to, and the seconds of the evaluations: a loop over all images prunes only once
        for each point, however many turns they are looked at in.
    """
    found, seconds = {}, 0.0
    with evaluating(work.model), torch.inference_mode():
        for place, unit in enumerate(units):
            for level, value in ((DENSE, None), *enumerate(unit.levels)):
                with applied(work.model, Variant() if value is None else unit.make(value)):
                    begin = time.perf_counter()
                    found[place, level] = _evaluated(work.model, images, labels, BATCH)
                    seconds += time.perf_counter() - begin
    return found, seconds


def _evaluated(model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> Evaluated:
    tally, is_right = Tally(0, 0, 0, 0.0), []
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        logits = model(x)
        tally += Tally.of(logits, y)
        is_right.append(right_answers(logits, y))
    return Evaluated(tally, torch.cat(is_right))


def fastest_batch(work: Workload) -> tuple[int, float]:
    """The batch size at which this loop would be the fastest, and how many times as fast as at its own."""

    def evaluate(batch: int) -> None:
        _evaluated(work.model, work.images[:BATCH], work.labels[:BATCH], batch)

    sides = {str(batch): partial(evaluate, batch) for batch in (*_OTHER_BATCHES, BATCH)}
    with evaluating(work.model), torch.inference_mode():
        seconds = medians(sides, _ROUNDS)
    best = min(seconds, key=seconds.__getitem__)
    return int(best), seconds[str(BATCH)] / seconds[best]
