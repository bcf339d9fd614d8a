"""Sensitivity sweeps: the plain loop and the engine, side by side, on the same trained network and images.

The plain loop evaluates the whole network for every weight and level (22 weights x 20 levels on ResNet-20),
images in memory, in inference mode, on all threads, at the batch size that is the fastest for it, and with
glibc's memory settings of the engine's processes, of which there is one for each thread. They take turns, a
few blocks each; that every count agrees is checked.

    python benchmarks/sensitivity.py            # ResNet-20 on 1,000 images, VGG-16 and ResNet-18 on fewer
    python benchmarks/sensitivity.py --full     # ResNet-20 on all 10,000, and statistical mode: over an hour
    python benchmarks/sensitivity.py --quick    # ResNet-20, fewer weights and images, without --sense-fast

ResNet-20 is the one of `make results-schedules`, on the test images of Fashion-MNIST; where there is none,
and of the other networks, weights are random. Ratios are medians over the turns. Tracing the network,
choosing how it is run and starting the processes are left out of these, and counted in "whole run". What
`--sense-fast` gives is beside, without a bar, on the 1,000 images.

Intervals of the statistical mode are those of one random order of the images. How often they cover is
counted over many orders, by the plain loop's decisions, of the points that did not take all images: in one
order alone all points would miss together.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from benchmarks.side_by_side import finish
from distiller.apputils.datasets import decode_dataset
from distiller.evaluation_mode import evaluating
from distiller.models import create_model
from distiller.replay import applied
from distiller.sensitivity import AxisRequest, TensorBlocks, random_order, sensitivity_sweep
from distiller.sensitivity.axes import AXES, AxisContext
from distiller.sensitivity.block_engine import BlockScores, Place
from distiller.sensitivity.block_pool import BlockPool, BlockTask, keep_freed_memory
from distiller.sensitivity.decisions import Tally, right_answers
from distiller.sensitivity.paired_drop import StopRule
from distiller.sensitivity.tuning import choose_settings, traced_program
from distiller.sensitivity.units import Unit

T = TypeVar("T")
BARS = {"element": 3.0, "filter": 3.5}
STATISTICAL_BAR, COVERAGE_BAR = 10.0, 95.0
ERROR = 0.5
_ORDERS = 200
_PLAIN_BATCHES = (64, 128, 256)
_DENSE = -1
_BLOCKS_AT_ONCE = 2
"""That each process has in one turn: who is ready first takes the next one, as in a sweep."""
_LOSS = 1e-5


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
    work: Workload, units: Sequence[Unit], images: Tensor, labels: Tensor, batch: int
) -> dict[Place, Evaluated]:
    """A full evaluation for every point, as plain loops do: level 0 of every weight too, at place -1."""
    found = {}
    with evaluating(work.model), torch.inference_mode():
        for place, unit in enumerate(units):
            found[place, _DENSE] = _evaluated(work.model, images, labels, batch)
            for level, value in enumerate(unit.levels):
                with applied(work.model, unit.make(value)):
                    found[place, level] = _evaluated(work.model, images, labels, batch)
    return found


def _evaluated(model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> Evaluated:
    tally, is_right = Tally(0, 0, 0, 0.0), []
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        logits = model(x)
        tally += Tally.of(logits, y)
        is_right.append(right_answers(logits, y))
    return Evaluated(tally, torch.cat(is_right))


def fastest_batch(work: Workload) -> int:
    """Of the plain loop."""
    times = {}
    with evaluating(work.model), torch.inference_mode():
        for batch in _PLAIN_BATCHES:
            rounds = []
            for _ in range(4):
                begin = time.perf_counter()
                _evaluated(work.model, work.images[:256], work.labels[:256], batch)
                rounds.append(time.perf_counter() - begin)
            times[batch] = min(rounds)
    return min(times, key=times.__getitem__)


@dataclass(frozen=True)
class Comparison:
    """Of one axis.

    Attributes:
        figures: ratios, by name.
        plain_seconds: of the plain loop, for all images.
        is_right: which images the plain loop gets right, by (weight, level); (n,) each.
        dense_is_right: likewise without any change.
    """

    figures: dict[str, float]
    plain_seconds: float
    is_right: dict[tuple[str, float], Tensor]
    dense_is_right: Tensor


def compare(
    work: Workload,
    axis: str,
    levels: Sequence[float],
    jobs: int,
    *,
    with_fast: bool = True,
    every: int = 1,
) -> Comparison:
    """The plain loop and the engine in turns, of one weight in so many; if wanted with `--sense-fast`."""
    units = AXES[axis].units(work.model, ["*"], levels, AxisContext(dummy_input=work.images[:1]))
    units = [unit for unit in units if unit.levels][every // 2 :: every]
    batch, together = fastest_batch(work), _BLOCKS_AT_ONCE * jobs * work.block
    rounds = list(zip(work.images.split(together), work.labels.split(together), strict=True))
    times: dict[str, list[float]] = {"plain": []}
    right: dict[Place, list[Tensor]] = {}
    flipped = 0
    begin = time.perf_counter()
    with evaluating(work.model):
        first = work.images[: work.block]
        program, reason = traced_program(work.model, first)
        assert program is not None, reason
        settings = {"engine": choose_settings(work.model, program, units, first)}
        preparing = time.perf_counter() - begin
        if with_fast:
            settings["fast"] = choose_settings(work.model, program, units, first, fast=True)
    with ExitStack() as stack:
        begin = time.perf_counter()
        pools = {
            side: stack.enter_context(BlockPool(work.model, units, setting, jobs))
            for side, setting in settings.items()
        }
        for pool in pools.values():
            _run(pool, *rounds[0], work.block, active=set())
        starting = (time.perf_counter() - begin) / len(pools)
        for number, (images, labels) in enumerate(rounds, start=1):
            plain = _timed(times["plain"], plain_loop, work, units, images, labels, batch)
            for side, pool in pools.items():
                found = _timed(times.setdefault(side, []), _run, pool, images, labels, work.block)
                if side == "engine":
                    _check(plain, found, work.name, axis)
                else:
                    flipped += sum(scores.flipped for scores in found)
            for place, evaluated in plain.items():
                right.setdefault(place, []).append(evaluated.is_right)
            seconds = ", ".join(f"{side} {values[-1]:.2f} s" for side, values in times.items())
            print(f"{work.name}, {axis}, turn {number} of {len(rounds)}: {seconds}", flush=True)
        peaks = [_peak_memory(child.pid) for child in multiprocessing.active_children()]
    ratios = {
        side: statistics.median(p / own for p, own in zip(times["plain"], times[side], strict=True))
        for side in pools
    }
    name, exact = f"{work.name}, {axis}", settings["engine"]
    print(
        f"{name}: {len(units)} weights, {len(units[0].levels) + 1} levels, {len(work.images)} images; every "
        f"count agrees. Plain (batch {batch}) / engine (chunk {exact.chunk}"
        f"{', channels last' if exact.channels_last else ''}): {ratios['engine']:.2f}"
    )
    total = sum(times["plain"])
    figures = {
        name: ratios["engine"],
        f"{name}, whole run": total / (preparing + starting + sum(times["engine"])),
    }
    if peaks and all(peaks):  # with one process there is no other
        figures[f"{name}, peak memory, one engine process, MB"] = max(peaks)
    if with_fast:
        print(
            f"{name}: plain / fast ({'bfloat16' if settings['fast'].bfloat16 else 'no bfloat16 here'}): "
            f"{ratios['fast']:.2f}; {flipped} dense decisions flipped"
        )
        figures |= {f"{name}, fast": ratios["fast"], f"{name}, fast, dense decisions flipped": flipped}
    is_right = {
        (units[place].parameter, units[place].levels[level]): torch.cat(parts)
        for (place, level), parts in right.items()
        if level != _DENSE
    }
    return Comparison(figures, total, is_right, torch.cat(right[0, _DENSE]))


def _peak_memory(process: int | None) -> float:
    """Of a process so far, in MB; 0 where the system does not say."""
    status = Path(f"/proc/{process}/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def statistical(
    work: Workload, axis: str, levels: Sequence[float], jobs: int, exact: Comparison
) -> dict[str, float]:
    """Time and coverage of the statistical mode on all images, against the plain loop's."""
    count = len(work.images)
    data = TensorBlocks(work.images, work.labels, work.block, "benchmark", random_order(count))
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        found = sensitivity_sweep(
            work.model,
            [AxisRequest(axis, tuple(levels))],
            data,
            Path(folder) / "sweep",
            error=ERROR,
            jobs=jobs,
        )
        seconds = time.perf_counter() - begin
    points = [point for point in found if point.level != AXES[axis].dense_level]
    looked = statistics.mean(point.n for point in points)  # type: ignore[type-var]
    open_points = [point for point in points if point.n < count]  # type: ignore[operator]
    covered = 0
    for point in open_points:
        top1 = 100 * float(exact.is_right[point.parameter, point.level].sum()) / count
        assert point.top1_low is not None
        assert point.top1_high is not None
        covered += point.top1_low <= top1 <= point.top1_high
    print(
        f"{work.name}, {axis}, statistical at {ERROR}: {looked:.0f} of {count} images on average; of "
        f"{len(points)} points {len(open_points)} took fewer than all, {covered} of their intervals cover"
    )
    return {
        f"{work.name}, {axis}, statistical": exact.plain_seconds / seconds,
        f"{work.name}, {axis}, intervals that cover in {_ORDERS} orders, percent": coverage(
            exact, work.block
        ),
    }


def coverage(exact: Comparison, block: int) -> float:
    """Of intervals of points that do not take all images, in percent, over many random orders of these."""
    right = torch.stack(list(exact.is_right.values()))
    lost, won = exact.dense_is_right & ~right, ~exact.dense_is_right & right
    count = right.shape[1]
    rule = StopRule(count, block, ERROR)
    drop = 100 * (lost.sum(1) - won.sum(1)).double() / count
    looks = torch.tensor(rule.looks) - 1
    covered, told = 0, 0
    for seed in range(_ORDERS):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        lost_by, won_by = (kind[:, order].cumsum(1)[:, looks] for kind in (lost, won))
        waiting = torch.ones(len(right), dtype=torch.bool)
        for at, n in enumerate(rule.looks[:-1]):
            judged = rule.judge(n, lost_by[:, at].numpy(), won_by[:, at].numpy())
            low, high, known = (torch.from_numpy(x) for x in (judged.low, judged.high, judged.known))
            known = known & waiting
            told += int(known.sum())
            covered += int((known & (low <= drop) & (drop <= high)).sum())
            waiting &= ~known
    return 100 * covered / told


def _run(
    pool: BlockPool, images: Tensor, labels: Tensor, size: int, active: set[Place] | None = None
) -> list[BlockScores]:
    parts = enumerate(zip(images.split(size), labels.split(size), strict=True))
    return [scores for _, scores in pool.run(BlockTask(i, x, y, active) for i, (x, y) in parts)]


def _timed(times: list[float], run: Callable[..., T], *arguments: Any) -> T:
    begin = time.perf_counter()
    result = run(*arguments)
    times.append(time.perf_counter() - begin)
    return result


def _check(plain: dict[Place, Evaluated], found: Sequence[BlockScores], name: str, axis: str) -> None:
    for place, evaluated in plain.items():
        expected = evaluated.tally
        is_dense = place[1] == _DENSE
        parts = (scores.dense if is_dense else scores.points[place] for scores in found)
        own = sum(parts, Tally(0, 0, 0, 0.0))
        same = (own.n, own.top1, own.top5) == (expected.n, expected.top1, expected.top5)
        if not same or not abs(own.loss - expected.loss) / expected.n <= _LOSS:
            sys.exit(f"{name}, {axis}, {place}: the engine says {own}, the plain loop {expected}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer weights and images: ends within a minute")
    parser.add_argument(
        "--full", action="store_true", help="ResNet-20 on all images, and the statistical mode"
    )
    args = parser.parse_args()
    jobs = torch.get_num_threads()
    keep_freed_memory()  # as the engine's processes do
    levels = [round(0.05 * i, 2) for i in range(20)]
    work = resnet20(
        count=64 if args.quick else 10_000 if args.full else 1_000, block=16 if args.quick else 50
    )
    figures: dict[str, float] = {}
    bars = {f"resnet20, {axis}": ("at least", bar) for axis, bar in BARS.items()}
    for axis in BARS:
        with_fast = not (args.quick or args.full)
        found = compare(work, axis, levels, jobs, with_fast=with_fast, every=2 if args.quick else 1)
        figures |= found.figures
        if args.full:
            figures |= statistical(work, axis, levels, jobs, found)
            bars[f"resnet20, {axis}, statistical"] = ("at least", STATISTICAL_BAR)
            name = f"resnet20, {axis}, intervals that cover in {_ORDERS} orders, percent"
            bars[name] = ("at least", COVERAGE_BAR)
    if not (args.quick or args.full):
        others = [
            random_weights("vgg16, 32x32", "cifar10", "vgg16_bn_cifar", 32, 256),
            random_weights("resnet18, 64x64", "imagenet", "resnet18", 64, 256),
        ]
        for other, axis in itertools.product(others, BARS):
            figures |= compare(replace(other, block=64), axis, levels, jobs).figures
    figures["peak memory, this process, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    finish(figures, bars)


if __name__ == "__main__":
    main()
