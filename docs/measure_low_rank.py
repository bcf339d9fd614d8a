"""Measure low-rank factorization: two networks, forms and budgets, on all test images.

    python -m docs.measure_low_rank                      # what is missing
    python -m docs.measure_low_rank --only spatial/0.5   # cells with this in network/form/budget
    python -m docs.measure_low_rank --again              # everything anew
    python -m docs.measure_low_rank --table              # nothing; only write the page anew

Each cell factors the trained network to a fraction of its MACs, tests it, trains it on, tests it again, and
times it in turns with the whole one. The dense networks are those of `make results-schedules`, and are made
where they are missing. What was measured is kept in docs/results/low_rank.json; docs/low_rank.md is made of
it.
Knows nothing about how layers are factored.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from distiller.apputils.training_loop import evaluate
from distiller.atomic_file import write_whole
from distiller.factorization import factorize
from docs.dense_networks import COMMON, dense_checkpoint, loaded, measure_missing
from docs.schedule_headers import ROOT

RESULTS = ROOT / "docs" / "results" / "low_rank.json"
PAGE = ROOT / "docs" / "low_rank.md"
EPOCHS = 6


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


NETWORKS = {
    "lenet_300_100": Network("LeNet-300-100", ("svd",)),
    "vgg13_bn_025_cifar": Network(
        "VGG-13, a quarter of the width", ("spatial", "channel", "tucker2"), ("--channels-last",)
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
    """Factor, test, train on, test and time one network."""
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
        "latency": {
            name: [1000 * own[f"latency_{name}"]["median_s"] for own in (dense, ours)]
            for name in ("single", "batch")
        },
        "batch_size": ours["latency_batch"]["batch_size"],
        "threads": ours["latency_batch"]["threads"],
    }


def missed(results: Mapping[str, Any]) -> list[str]:
    """The bars that are not held, a line each: of each network one form has to hold them."""
    lines = []
    for arch, network in NETWORKS.items():
        found = [results.get(Cell(arch, form, BAR).name) for form in network.forms]
        if not any(own is not None and _holds(own) for own in found):
            lines.append(
                f"{network.title}: at {BAR:.0%} of the MACs no form is within a point of the whole network "
                "and faster with a batch"
            )
    return lines


def _holds(own: Mapping[str, Any]) -> bool:
    lost = 100 * (own["dense_correct"] - own["after_correct"]) / own["n"]
    whole, factored = own["latency"]["batch"]
    return lost <= 1 and factored < whole


def page(results: Mapping[str, Any]) -> str:
    """The page of the results."""
    parts = [_INTRODUCTION]
    for arch, network in NETWORKS.items():
        rows = [
            _row(cell, results[cell.name]) for cell in cells() if cell.arch == arch and cell.name in results
        ]
        parts.append(
            "\n".join([f"## {network.title}", "", _HEAD, *(rows or ["| not measured yet |" + " |" * 9])])
        )
    listed = "\n".join(f"- {line}" for line in missed(results))
    parts.append(
        "## Bar\n\nAt half of the MACs within a point after training on, and faster with a batch: "
        + (f"missed\n\n{listed}" if listed else "held by both networks.")
    )
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = f"""# Low rank, measured

Written by `python -m docs.measure_low_rank`. The trained networks of
[schedules/baseline_networks](../schedules/baseline_networks), factored to a fraction of their
multiply-accumulates (MACs) on Fashion-MNIST, tested on the 10,000 test images as they are (*before*) and
after {EPOCHS} epochs of training (*after*), one run and one seed each. Ranks follow from the budget by the
energy of the weights. Latencies are medians, whole and factored network measured in turns in one process. How
it is done is in [factorization.md](factorization.md)."""
_HEAD = (
    "| form | MACs asked for | parameters | MACs | ranks of break-even ranks | whole | before | after | "
    "ms, one image | ms, batch |\n|---|--:|--:|--:|---|--:|--:|--:|--:|--:|"
)


def _row(cell: Cell, own: Mapping[str, Any]) -> str:
    def shrunk(key: str) -> str:
        was, now = own[key]
        return f"{was:,} -> {now:,} ({now / was:.2f})"

    def percent(key: str) -> str:
        return f"{100 * own[key] / own['n']:.2f} %"

    def times(name: str) -> str:
        was, now = own["latency"][name]
        return f"{was:.3f} -> {now:.3f} ({was / now:.2f}x)"

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
    write_whole(PAGE, page(results))
    lines = missed(results)
    if lines:
        sys.exit("missed:\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
