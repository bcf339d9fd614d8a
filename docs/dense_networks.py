"""What studies of one network after the other share: trained dense networks, and the command line of a table.

The dense networks are those of `make results-schedules`, and are made where they are missing. A table has a
cell for each number that is measured, and what was measured is kept in a JSON file by the cell's name.
Knows nothing about what is studied.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from compress_classifier import make_parser
from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.atomic_file import write_whole
from docs.measure_schedules import latest_checkpoint, measure
from docs.schedule_headers import ROOT, shipped

__all__ = [
    "COMMON",
    "dense_checkpoint",
    "dense_results",
    "loaded",
    "measure_missing",
    "read_results",
    "require",
    "say",
]

COMMON = ("--dataset", "fashion-mnist", "-b", "128", "--seed", "1")
"""Flags of all trainings and tests."""


class Cell(Protocol):
    """A number to measure."""

    @property
    def name(self) -> str:
        """As `--only` and the results know it."""
        ...


_Cell = TypeVar("_Cell", bound=Cell)


def dense_results(arch: str) -> Path:
    """The kept card of a dense network."""
    return ROOT / "docs" / "results" / f"{arch}_fashion_mnist" / "dense.json"


def dense_checkpoint(arch: str) -> Path:
    """The checkpoint of a dense network, which is trained where it is missing."""
    results = dense_results(arch)
    if latest_checkpoint(results) is None:
        baseline = [schedule for schedule in shipped() if schedule.results == results]
        require(not measure(baseline, shipped(), again=True), f"{arch}: the dense training failed")
    checkpoint = latest_checkpoint(results)
    assert checkpoint is not None
    return checkpoint


def loaded(arch: str, *source: str) -> ClassifierCompressor:
    """A network with its data, as the program tests it.

    Args:
        arch: its name.
        source: flags that say where its weights come from, and how it is laid out.
    """
    return ClassifierCompressor(make_parser().parse_args(["--arch", arch, *COMMON, "--evaluate", *source]))


def measure_missing(
    description: str | None, cells: Iterable[_Cell], measured: Callable[[_Cell], Any], results: Path
) -> dict[str, Any]:
    """The command line of a table: measure the cells that are missing, or asked for, one after the other.

    Args:
        description: the docstring of the study, for `--help`.
        cells: all of them.
        measured: what is kept of a cell, as JSON.
        results: the file in which it is.

    Returns:
        What has been measured, by name of a cell.
    """
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parser.add_argument("--only", metavar="TEXT", action="append", help="part of a cell's name; repeatable")
    parser.add_argument("--again", action="store_true", help="measure what has been measured, too")
    parser.add_argument("--table", action="store_true", help="measure nothing: write the page")
    args = parser.parse_args()
    for cell in cells if not args.table else ():
        is_known = cell.name in read_results(results) and not args.again
        if is_known or not any(text in cell.name for text in args.only or [""]):
            continue
        say(f"{cell.name} ...")
        found = measured(cell)
        say(f"{cell.name}: {found}")
        # Another process may have measured other cells meanwhile.
        everything = {**read_results(results), cell.name: found}
        write_whole(results, json.dumps(dict(sorted(everything.items())), indent=1, allow_nan=False) + "\n")
    return read_results(results)


def read_results(path: Path) -> dict[str, Any]:
    """What has been measured, by name of a cell."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def require(holds: bool, otherwise: str) -> None:
    """End the study with a message, unless all is well."""
    if not holds:
        sys.exit(otherwise)


def say(text: str) -> None:
    """A line of progress."""
    sys.stdout.write(f"  {text}\n")
    sys.stdout.flush()
