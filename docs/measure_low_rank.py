"""Measure low-rank factorization: two networks, forms and budgets, on all test images.

    python -m docs.measure_low_rank                      # what is missing
    python -m docs.measure_low_rank --only spatial/0.5   # cells with this in network/form/budget
    python -m docs.measure_low_rank --again              # everything anew
    python -m docs.measure_low_rank --table              # nothing; only write the page anew

Each cell factors the trained network to a fraction of its MACs, tests it, trains it on and tests it again;
then, all cells one after the other, networks of its ranks take turns with the whole one. The dense networks
are those of `make results-schedules`, and are made where they are missing. What was measured is kept in
docs/results/low_rank.json and, what wants a machine with nothing else to do, low_rank_times.json (to time
anew, delete that file); docs/low_rank.md is made of them.
Knows nothing about how layers are factored.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import nn

from distiller.apputils.training_loop import evaluate
from distiller.atomic_file import write_whole
from distiller.dataset_facts import DATASET_FACTS
from distiller.export.latency import measure_latencies
from distiller.factorization import factorize
from distiller.models import create_model, input_shape_for
from docs.dense_networks import COMMON, dense_checkpoint, loaded, measure_missing, read_results
from docs.schedule_headers import ROOT

RESULTS = ROOT / "docs" / "results" / "low_rank.json"
TIMES = ROOT / "docs" / "results" / "low_rank_times.json"
PAGE = ROOT / "docs" / "low_rank.md"
EPOCHS = 6
ROUNDS, SECONDS, BATCHES = 9, 0.2, {"single": 1, "batch": 128}
"""Of timing: how often each, for how long (warm-up and measurement each), and the images of a pass."""


@dataclass(frozen=True, slots=True)
class Network:
    """A network of the table.

    Attributes:
        title: what the page calls it.
        forms: of its convolutions, or of its linear layers where it has no others.
        flags: beside those that all trainings have.
    """

    title: str
    forms: tuple[str, ...]
    flags: tuple[str, ...] = ()


CHANNELS_LAST = ("--channels-last",)
NETWORKS = {
    "lenet_300_100": Network("LeNet-300-100", ("svd",)),
    "vgg13_bn_025_cifar": Network(
        "VGG-13, a quarter of the width", ("spatial", "channel", "tucker2"), CHANNELS_LAST
    ),
}
BUDGETS = (0.75, 0.5, 0.35, 0.25)
BAR = 0.5
"""The budget at which the bar is held: within a point of the whole network, and faster."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One network factored in one form to one fraction of its MACs."""

    arch: str
    form: str
    macs: float

    @property
    def name(self) -> str:
        """As `--only` and the results know it."""
        return f"{self.arch}/{self.form}/{self.macs}"


def cells() -> Iterator[Cell]:
    """All of them."""
    for arch, network in NETWORKS.items():
        for form in network.forms:
            yield from (Cell(arch, form, macs) for macs in BUDGETS)


def settings(cell: Cell) -> dict[str, Any]:
    """Of `LowRankFactorization`."""
    layers = {"*": {}} if cell.form == "svd" else {"*": {"form": cell.form}}
    return {"layers": layers, "macs": cell.macs}


def schedule(cell: Cell) -> dict[str, Any]:
    """What the network is trained on under."""
    return {
        "version": 1,
        "extensions": {"low_rank": {"class": "LowRankFactorization", **settings(cell)}},
        "lr_schedulers": {"cosine": {"class": "CosineAnnealingLR", "T_max": EPOCHS, "eta_min": 0.0002}},
        "policies": [
            {"extension": {"instance_name": "low_rank"}, "epochs": [0]},
            {
                "lr_scheduler": {"instance_name": "cosine"},
                "starting_epoch": 0,
                "ending_epoch": EPOCHS,
                "frequency": 1,
            },
        ],
    }


def measured(cell: Cell) -> dict[str, Any]:
    """Factor, test, train on and test one network."""
    checkpoint, flags = str(dense_checkpoint(cell.arch)), NETWORKS[cell.arch].flags
    compressor = loaded(cell.arch, "--exp-load-weights-from", checkpoint, *flags)
    model = copy.deepcopy(compressor.model)
    report = factorize(model, **settings(cell))
    before = evaluate(model, compressor.data.test)
    folder = ROOT / "logs" / "results" / "low_rank" / cell.name.replace("/", "_")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "schedule.yaml"
    write_whole(path, yaml.safe_dump(schedule(cell), sort_keys=False))
    training = [
        "--arch", cell.arch, *COMMON, *flags, "-n", "low_rank", "--compress", str(path),
        "--resume-from", checkpoint, "--reset-optimizer", "--epochs", str(EPOCHS), "--lr", "0.02",
        "--wd", "1e-4", "-o", str(folder), "-p", "200",
    ]  # fmt: skip
    command = [sys.executable, "compress_classifier.py", *training]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    card = json.loads((folder / "latest_log_dir" / "results.json").read_text(encoding="utf-8"))
    ours, dense = card["measured"], card["reference"]
    return {
        "ranks": {layer.name: list(layer.rank) for layer in report.layers if layer.rank is not None},
        "break_even": {
            layer.name: list(layer.break_even) for layer in report.layers if layer.break_even is not None
        },
        "parameters": [dense["parameters"], ours["parameters"]],
        "macs": [dense["macs"], ours["macs"]],
        "n": ours["n"],
        "dense_correct": dense["top1_correct"],
        "before_correct": before.top1_correct,
        "after_correct": ours["top1_correct"],
    }


def timed(cell: Cell) -> dict[str, Any]:
    """Medians of a whole and a factored network in turns, in milliseconds, of each of several rounds."""
    whole, factored, shape = pair(cell, read_results(RESULTS)[cell.name]["ranks"])
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    for name, batch in BATCHES.items():
        rounds = [measure_latencies((whole, factored), shape, batch, min_time=SECONDS) for _ in range(ROUNDS)]
        found[name] = [[1000 * own.median_s for own in both] for both in rounds]
    return found


def pair(cell: Cell, ranks: Mapping[str, Any]) -> tuple[nn.Module, nn.Module, tuple[int, ...]]:
    """A network, the same factored to ranks, both with random weights, and the shape of an image."""
    facts = DATASET_FACTS["fashion-mnist"]
    shape = input_shape_for(cell.arch, facts.channels, facts.size)
    whole = create_model(False, "fashion-mnist", cell.arch, parallel=False, input_shape=(1, *shape))
    if NETWORKS[cell.arch].flags == CHANNELS_LAST:
        whole = whole.to(memory_format=torch.channels_last)
    factored = copy.deepcopy(whole)
    layers = {
        name: {"form": cell.form, "rank": rank if len(rank) > 1 else rank[0]} for name, rank in ranks.items()
    }
    factorize(factored, layers)
    return whole, factored, tuple(shape)


def missed(results: Mapping[str, Any], times: Mapping[str, Any]) -> list[str]:
    """The bars that are not held, a line each: of each network one form has to hold them."""
    lines = []
    for arch, network in NETWORKS.items():
        names = [Cell(arch, form, BAR).name for form in network.forms]
        if not any(
            name in results and name in times and _holds(results[name], times[name]) for name in names
        ):
            lines.append(
                f"{network.title}: at {BAR:.0%} of the MACs no form is within a point of the whole network "
                f"and faster with a batch in each of {ROUNDS} rounds"
            )
    return lines


def _holds(own: Mapping[str, Any], times: Mapping[str, Any]) -> bool:
    lost = 100 * (own["dense_correct"] - own["after_correct"]) / own["n"]
    return lost <= 1 and all(factored < whole for whole, factored in times["batch"])


def page(results: Mapping[str, Any], times: Mapping[str, Any]) -> str:
    """The page of the results."""
    parts = [_INTRODUCTION]
    for arch, network in NETWORKS.items():
        rows = [
            _row(cell, results[cell.name], times.get(cell.name))
            for cell in cells()
            if cell.arch == arch and cell.name in results
        ]
        parts.append(
            "\n".join([f"## {network.title}", "", _HEAD, *(rows or ["| not measured yet |" + " |" * 9])])
        )
    listed = "\n".join(f"- {line}" for line in missed(results, times))
    parts.append(
        "## Bar\n\nAt half of the MACs one form at least is within a point after training on, and faster "
        f"with a batch in each of {ROUNDS} rounds: "
        + (f"missed\n\n{listed}" if listed else "held by both networks.")
    )
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = f"""# Low rank, measured

Written by `python -m docs.measure_low_rank`. The trained networks of
[schedules/baseline_networks](../schedules/baseline_networks), factored to a fraction of their
multiply-accumulates (MACs) on Fashion-MNIST, tested on the 10,000 test images as they are (*before*) and
after {EPOCHS} epochs of training (*after*), one run and one seed each. Ranks follow from the budget by the
energy of the weights. Latencies: whole and factored network in turns in one process, {ROUNDS} rounds of one
image and of {BATCHES["batch"]} images a pass, on two threads; the medians of the rounds' medians,
the median of the rounds' ratios, and from the least to the largest of these. Ranks stand beside the one at
which a factored layer costs as much as a whole one; layers that are not named stay whole. How it is done is
in [factorization.md](factorization.md)."""
_HEAD = (
    "| form | MACs asked for | parameters | MACs | ranks, of those that break even | whole | before | after "
    "| ms, one image | ms, batch |\n|---|--:|--:|--:|---|--:|--:|--:|--:|--:|"
)


def _row(cell: Cell, own: Mapping[str, Any], measured_times: Mapping[str, Any] | None) -> str:
    def shrunk(key: str) -> str:
        was, now = own[key]
        return f"{was:,} -> {now:,} ({now / was:.2f})"

    def percent(key: str) -> str:
        return f"{100 * own[key] / own['n']:.2f} %"

    def times(name: str) -> str:
        if measured_times is None:
            return "not timed"
        rounds = measured_times[name]
        was, now = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratios = [whole / factored for whole, factored in rounds]
        middle = statistics.median(ratios)
        return f"{was:.3f} -> {now:.3f} ({middle:.2f}x; {min(ratios):.2f}-{max(ratios):.2f})"

    ranks = "; ".join(
        f"{name} {_text(rank)} of {_text(own['break_even'][name])}" for name, rank in own["ranks"].items()
    )
    cells_ = [
        cell.form, f"{100 * cell.macs:.0f} %", shrunk("parameters"), shrunk("macs"), ranks,
        percent("dense_correct"), percent("before_correct"), percent("after_correct"), times("single"),
        times("batch"),
    ]  # fmt: skip
    return f"| {' | '.join(cells_)} |"


def _text(rank: list[int]) -> str:
    return "+".join(map(str, rank))


def main() -> None:
    """The command line."""
    results = measure_missing(__doc__, cells(), measured, RESULTS)
    times = measure_missing(__doc__, [cell for cell in cells() if cell.name in results], timed, TIMES)
    write_whole(PAGE, page(results, times))
    lines = missed(results, times)
    if lines:
        sys.exit("missed:\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
