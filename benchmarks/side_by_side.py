"""Time two or more functions alternately in one run, and end with one line of JSON.

Absolute times of a shared machine mean little; ratios of medians measured side by side do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch


def parse(description: str) -> argparse.Namespace:
    """The flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer repeats: ends within a minute")
    return parser.parse_args()


def medians(
    sides: Mapping[str, Callable[[], object]], repeats: int, *, warm: bool = False
) -> dict[str, float]:
    """Median seconds of each side over `repeats` rounds, one call of each in turn, after one not counted.

    Args:
        sides: what to time.
        repeats: at least 1.
        warm: call each side once more before each call that counts, so that what counts does not begin with
            the caches and the memory that the other side left.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(repeats + 1):
        for name, run in sides.items():
            if warm:
                run()
            begin = time.perf_counter()
            run()
            if round_number:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def finish(figures: dict[str, float], bars: dict[str, tuple[str, float]]) -> None:
    """Print the verdicts and, last, everything as JSON; exit 0 only where every bar holds.

    Args:
        figures: measured, by name.
        bars: by name of a figure: ("at most" or "at least", limit).
    """
    held = True
    for name, (direction, limit) in bars.items():
        good = figures[name] <= limit if direction == "at most" else figures[name] >= limit
        held = held and good
        print(f"{'holds' if good else 'FAILS'}: {name} {figures[name]:.3f}, {direction} {limit}")
    result = {
        "figures": figures,
        "bars": {name: f"{direction} {limit}" for name, (direction, limit) in bars.items()},
        "threads": torch.get_num_threads(),
        "holds": held,
    }
    print(json.dumps(result))
    sys.exit(0 if held else 1)
