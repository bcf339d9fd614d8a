"""Trainings with several seeds: each run once, its results card kept, its figures taken together.

A study is a folder under docs/results with a card NAME_seedS.json for each run; the run itself is under
logs/results. What is there is not run again. Knows nothing about what is studied.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t as student_t

from distiller.atomic_file import write_whole
from docs.schedule_headers import ROOT, Shipped

SEEDS = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class Training:
    """A training of a study.

    Attributes:
        name: in file names.
        flags: of `compress_classifier.py`, without seed, name and folders; `{other}` stands for the
            checkpoint of the training `other` with the same seed, or for a file of the study's.
    """

    name: str
    flags: tuple[str, ...]


def flags_of(schedule: Shipped, **checkpoints: str) -> tuple[str, ...]:
    """The flags in a schedule's header, without those that `Training` is told apart by.

    Args:
        schedule: shipped.
        checkpoints: `CHECKPOINT` or another word of the command, and what stands for it.
    """
    words = [checkpoints.get(word, word) for word in schedule.flags]
    for flag in ("--seed", "-n"):
        index = words.index(flag)
        del words[index : index + 2]
    return tuple(words)


def schedule_flags(stem: str, **checkpoints: str) -> tuple[str, ...]:
    """`flags_of` a schedule by its path under `schedules/`, without its ending."""
    return flags_of(shipped_schedule(stem), **checkpoints)


def shipped_schedule(stem: str) -> Shipped:
    """A schedule by its path under `schedules/`, without its ending."""
    path = ROOT / "schedules" / f"{stem}.yaml"
    return Shipped(path, path.read_text(encoding="utf-8"))


class Study:
    """A folder of results.

    Args:
        name: of the folders under docs/results and logs/results.
        trainings: those that later ones start from or learn from come first.
        files: by the word that stands for one, what makes it where it is missing; the same for all seeds.
    """

    def __init__(
        self,
        name: str,
        trainings: Sequence[Training],
        files: Mapping[str, Callable[[], Path]] | None = None,
    ) -> None:
        self.name = name
        self._files = dict(files or {})
        self.trainings = {training.name: training for training in trainings}

    def results(self, training: str, seed: int) -> Path:
        """The kept card of a run."""
        return ROOT / "docs" / "results" / self.name / f"{training}_seed{seed}.json"

    def folder(self, training: str, seed: int) -> Path:
        """Where the run's own files are."""
        return ROOT / "logs" / "results" / self.name / f"{training}_seed{seed}"

    def checkpoint(self, training: str, seed: int) -> Path | None:
        """The checkpoint that a run ended with; None before it has been run here."""
        return next(iter((self.folder(training, seed) / "latest_log_dir").glob("*checkpoint.pth.tar")), None)

    def card(self, training: str, seed: int) -> dict[str, Any] | None:
        """The kept card; None when there is none."""
        path = self.results(training, seed)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def cards(self, training: str) -> list[dict[str, Any]]:
        """Those of all seeds that have one."""
        found = (self.card(training, seed) for seed in SEEDS)
        return [card for card in found if card is not None]

    def measured(
        self,
        description: str,
        first: Callable[[], object] | None = None,
        then: Callable[[int], None] | None = None,
    ) -> dict[str, list[dict[str, Any]]]:
        """The command line of a study: run what is missing; returns the cards of each training.

        Args:
            description: for `--help`.
            first: called before anything is run.
            then: called with each seed behind its trainings.
        """
        parser = argparse.ArgumentParser(description=description)
        parser.add_argument("--seed", type=int, choices=SEEDS, action="append", help="repeatable")
        parser.add_argument("--table", action="store_true", help="measure nothing: write the page")
        args = parser.parse_args()
        if first is not None and not args.table:
            first()
        for seed in () if args.table else args.seed or SEEDS:
            for name in self.trainings:
                self.run(name, seed)
            if then is not None:
                then(seed)
        return {name: self.cards(name) for name in self.trainings}

    def run(self, training: str, seed: int, *, needs_checkpoint: bool = False) -> None:
        """Run a training, unless its card is there (and its checkpoint, where it is needed); keep its card.

        Raises:
            subprocess.CalledProcessError: it failed, or one that it needs did.
        """
        if self.card(training, seed) is not None and not (
            needs_checkpoint and self.checkpoint(training, seed) is None
        ):
            return
        folder = self.folder(training, seed)
        flags = [self._filled(word, seed) for word in self.trainings[training].flags]
        own = ["-n", training, "--seed", str(seed), "-o", str(folder), "-p", "200"]
        command = [sys.executable, "compress_classifier.py", *flags, *own]
        sys.stdout.write(f"{shlex.join(command)}\n")
        sys.stdout.flush()
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        card = json.loads((folder / "latest_log_dir" / "results.json").read_text(encoding="utf-8"))
        path = self.results(training, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(card, indent=2, allow_nan=False) + "\n")

    def _filled(self, word: str, seed: int) -> str:
        """The word with the file that it stands for, which is made where it is missing."""
        if not (word.startswith("{") and word.endswith("}")):
            return word
        if word[1:-1] in self._files:
            return str(self._files[word[1:-1]]())
        self.run(word[1:-1], seed, needs_checkpoint=True)
        return str(self.checkpoint(word[1:-1], seed))


@dataclass(frozen=True, slots=True)
class Spread:
    """Figures of several seeds, in percent.

    Attributes:
        mean: of them.
        half_width: of the 95 % interval of the mean; None of a single figure.
    """

    mean: float
    half_width: float | None

    def __str__(self) -> str:
        """As a table has it."""
        if self.half_width is None:
            return f"{self.mean:.2f} %"
        return f"{self.mean:.2f} +- {self.half_width:.2f} %"


def spread(figures: Sequence[float]) -> Spread:
    """Mean and 95 % interval (Student's t) of the figures of several seeds.

    Args:
        figures: at least one.
    """
    if len(figures) < 2:
        return Spread(figures[0], None)
    quantile = float(student_t.ppf(0.975, len(figures) - 1))
    return Spread(mean(figures), quantile * stdev(figures) / math.sqrt(len(figures)))


def top1(card: Mapping[str, Any]) -> float:
    """Of a card, in percent."""
    measured = card["measured"]
    return 100 * measured["top1_correct"] / measured["n"]
