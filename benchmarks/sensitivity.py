"""Sensitivity sweeps: the plain loop and the engine, side by side, on the same trained network and images.

The plain loop evaluates the whole network for every weight and level (22 weights x 20 levels on ResNet-20),
images in memory, in inference mode, on all threads, in batches of 256 as the command line has by default; the
engine has one process for each thread. They take turns of 256 images; that every count agrees is checked.
What pruning takes the plain loop is not counted. Its batch size is not tuned; with batches of the fastest
size it is faster: how much is measured too, and the ratio that follows is beside, without a bar.

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
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.plain_sweep import (
    BATCH,
    DENSE,
    Evaluated,
    Workload,
    fastest_batch,
    plain_loop,
    random_weights,
    resnet20,
)
from benchmarks.side_by_side import finish
from distiller.evaluation_mode import evaluating
from distiller.sensitivity import AxisRequest, TensorBlocks, random_order, sensitivity_sweep
from distiller.sensitivity.axes import AXES, AxisContext
from distiller.sensitivity.block_engine import BlockScores, EngineSettings, Place
from distiller.sensitivity.block_pool import BlockPool, BlockTask
from distiller.sensitivity.decisions import Tally
from distiller.sensitivity.paired_drop import StopRule
from distiller.sensitivity.tuning import choose_settings, traced_program
from distiller.sensitivity.units import Unit

T = TypeVar("T")
BARS = {"element": 3.0, "filter": 3.5}
STATISTICAL_BAR, COVERAGE_BAR = 10.0, 95.0
ERROR = 0.5
_ORDERS = 200
_LOSS = 1e-5


class Comparison:
    """Of one axis.

    Attributes:
        name: of network and axis.
        units: of the axis.
        times: seconds of each turn, by side.
        right: which images the plain loop gets right, by place; (n,) for each turn.
        flipped: decisions of the dense network that `--sense-fast` makes otherwise.
    """

    def __init__(self, name: str, units: Sequence[Unit]) -> None:
        self.name = name
        self.units = units
        self.times: dict[str, list[float]] = {}
        self.right: dict[Place, list[Tensor]] = {}
        self.flipped = 0

    def timed(self, side: str, run: Callable[..., T], *arguments: Any) -> T:
        """What `run` gives, in one turn of that side."""
        begin = time.perf_counter()
        result = run(*arguments)
        self.took(side, time.perf_counter() - begin)
        return result

    def took(self, side: str, seconds: float) -> None:
        """So much, in one turn."""
        self.times.setdefault(side, []).append(seconds)

    @property
    def plain_seconds(self) -> float:
        """Of the plain loop, for all images."""
        return sum(self.times["plain"])

    @property
    def dense_is_right(self) -> Tensor:
        """Which images the network gets right as it is, (n,)."""
        return torch.cat(self.right[0, DENSE])

    def is_right(self) -> dict[tuple[str, float], Tensor]:
        """Which images each other point gets right, by (weight, level); (n,)."""
        return {
            (self.units[place].parameter, self.units[place].levels[level]): torch.cat(parts)
            for (place, level), parts in self.right.items()
            if level != DENSE
        }

    def figures(
        self, settings: Mapping[str, EngineSettings], preparing: float, fastest: tuple[int, float]
    ) -> dict[str, float]:
        """Ratios by name, which are printed.

        Args:
            settings: of the engine, by side.
            preparing: what making ready has taken, in seconds.
            fastest: the best batch size of the plain loop, and how many times as fast it is.
        """
        ratios = {
            side: statistics.median(
                p / own for p, own in zip(self.times["plain"], self.times[side], strict=True)
            )
            for side in settings
        }
        exact = settings["engine"]
        chunk = f"chunk {exact.chunk}{', channels last' if exact.channels_last else ''}"
        size = f"{len(self.units)} weights, {len(self.units[0].levels) + 1} levels"
        print(
            f"{self.name}: {size}, {len(self.dense_is_right)} images; every count agrees. "
            f"Plain / engine ({chunk}): {ratios['engine']:.2f}"
        )
        batch, gain = fastest
        tuned = ratios["engine"] / gain
        print(f"{self.name}: if the plain loop's batches were the fastest ones ({batch}): {tuned:.2f}")
        figures = {
            self.name: ratios["engine"],
            f"{self.name}, plain in its fastest batches": tuned,
            f"{self.name}, whole run": self.plain_seconds / (preparing + sum(self.times["engine"])),
        }
        if "fast" in settings:
            flipped = f"{self.flipped} dense decisions flipped"
            kind = "bfloat16" if settings["fast"].bfloat16 else "no bfloat16 here"
            print(f"{self.name}: plain / fast ({kind}): {ratios['fast']:.2f}; {flipped}")
            figures |= {
                f"{self.name}, fast": ratios["fast"],
                f"{self.name}, fast, dense decisions flipped": self.flipped,
            }
        return figures


def compare(
    work: Workload, levels: Sequence[float], jobs: int, *, with_fast: bool = True, every: int = 1
) -> tuple[dict[str, Comparison], dict[str, float]]:
    """Plain loop and engine in turns, for one weight in so many; if wanted with `--sense-fast`.

    Both axes have the same processes, and one after the other is run.

    Returns:
        By axis, and all figures.
    """
    context = AxisContext(dummy_input=work.images[:1])
    by_axis = {
        axis: [unit for unit in AXES[axis].units(work.model, ["*"], levels, context) if unit.levels]
        for axis in BARS
    }
    found = {
        axis: Comparison(f"{work.name}, {axis}", own[every // 2 :: every]) for axis, own in by_axis.items()
    }
    units = [unit for comparison in found.values() for unit in comparison.units]
    fastest = fastest_batch(work)
    print(f"{work.name}: the plain loop has batches of {BATCH}, {jobs} processes blocks of {work.block}")
    rounds = list(zip(work.images.split(BATCH), work.labels.split(BATCH), strict=True))
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
            _run(pool, *rounds[0], work.block, {(place, 0) for place in range(len(units))})
        preparing += (time.perf_counter() - begin) / len(pools)
        for turn, (images, labels) in enumerate(rounds, start=1):
            before = 0
            for axis, own in found.items():
                plain, seconds = plain_loop(work, own.units, images, labels)
                own.took("plain", seconds)
                wanted = {(before + at, level): (at, level) for at, level in plain if level != DENSE}
                for side, pool in pools.items():
                    parts = own.timed(side, _run, pool, images, labels, work.block, set(wanted))
                    if side == "engine":
                        _check(plain, parts, wanted, own.name)
                    else:
                        own.flipped += sum(scores.flipped for scores in parts)
                for place, evaluated in plain.items():
                    own.right.setdefault(place, []).append(evaluated.is_right)
                before += len(own.units)
                times = ", ".join(f"{side} {values[-1]:.2f} s" for side, values in own.times.items())
                print(f"{work.name}, {axis}, turn {turn} of {len(rounds)}: {times}", flush=True)
        peaks = [_peak_memory(child.pid) for child in multiprocessing.active_children()]
    figures: dict[str, float] = {}
    for own in found.values():
        figures |= own.figures(settings, preparing, fastest)
    if peaks and all(peaks):  # with one process there is no other
        figures[f"{work.name}, peak memory, one engine process, MB"] = max(peaks)
    return found, figures


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
    covered, is_right = 0, exact.is_right()
    for point in open_points:
        top1 = 100 * float(is_right[point.parameter, point.level].sum()) / count
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
    right = torch.stack(list(exact.is_right().values()))
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


def _run(pool: BlockPool, images: Tensor, labels: Tensor, size: int, active: set[Place]) -> list[BlockScores]:
    parts = enumerate(zip(images.split(size), labels.split(size), strict=True))
    return [scores for _, scores in pool.run(BlockTask(i, x, y, active) for i, (x, y) in parts)]


def _check(
    plain: Mapping[Place, Evaluated],
    found: Sequence[BlockScores],
    places: Mapping[Place, Place],
    name: str,
) -> None:
    """Leave where the engine's counts are others; `places` has the plain loop's place by the engine's."""
    nothing = Tally(0, 0, 0, 0.0)
    own = {at: sum((scores.points[place] for scores in found), nothing) for place, at in places.items()}
    own |= {at: sum((scores.dense for scores in found), nothing) for at in plain if at[1] == DENSE}
    for at, evaluated in plain.items():
        expected, given = evaluated.tally, own[at]
        same = (given.n, given.top1, given.top5) == (expected.n, expected.top1, expected.top5)
        if not same or not abs(given.loss - expected.loss) / expected.n <= _LOSS:
            sys.exit(f"{name}, {at}: the engine says {given}, the plain loop {expected}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer weights and images: ends within a minute")
    parser.add_argument(
        "--full", action="store_true", help="ResNet-20 on all images, and the statistical mode"
    )
    args = parser.parse_args()
    jobs = torch.get_num_threads()
    levels = [round(0.05 * i, 2) for i in range(20)]
    work = resnet20(count=256 if args.quick else 10_000 if args.full else 1_000, block=64)
    figures: dict[str, float] = {}
    bars = {f"resnet20, {axis}": ("at least", bar) for axis, bar in BARS.items()}
    found, own = compare(
        work, levels, jobs, with_fast=not (args.quick or args.full), every=5 if args.quick else 1
    )
    figures |= own
    for axis, comparison in found.items() if args.full else ():
        figures |= statistical(work, axis, levels, jobs, comparison)
        bars[f"resnet20, {axis}, statistical"] = ("at least", STATISTICAL_BAR)
        name = f"resnet20, {axis}, intervals that cover in {_ORDERS} orders, percent"
        bars[name] = ("at least", COVERAGE_BAR)
    if not (args.quick or args.full):
        for other in (
            random_weights("vgg16, 32x32", "cifar10", "vgg16_bn_cifar", 32, 256),
            random_weights("resnet18, 64x64", "imagenet", "resnet18", 64, 256),
        ):
            figures |= compare(other, levels, jobs)[1]
    figures["peak memory, this process, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    finish(figures, bars)


if __name__ == "__main__":
    main()
