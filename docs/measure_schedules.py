"""Measure the schedules: run the command in each header, keep its results, write them into the header.

    python -m docs.measure_schedules                  # what has not been measured yet
    python -m docs.measure_schedules --only agp/      # of the schedules whose path has this in it
    python -m docs.measure_schedules --again          # everything anew
    python -m docs.measure_schedules --headers        # nothing; only write headers and index anew

The results of a run with `-n NAME` are docs/results/MODEL_DATASET/NAME.json. CHECKPOINT in a command is that
of the run with `-n dense` of the same model and data, which is run first when it is not there; TEACHER that
of the `--kd-teacher`.
Knows nothing about training: each run is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distiller.apputils.checkpoint import read_checkpoint
from distiller.atomic_file import write_whole
from distiller.names import resolve_all
from distiller.pruning.blocks import block_magnitudes, read_block_shape
from docs.schedule_headers import INDEX, ROOT, SECTIONS, Shipped, index, shipped, with_block

# What a group is called in a header, and the dimension it is a slice of. A pruner's `Rows` are inputs.
_SLICES = {
    "pruners": {
        "3D": ("filters", 0), "Filters": ("filters", 0), "Channels": ("channels", 1), "Rows": ("inputs", 1),
    },
    "regularizers": {
        "3D": ("filters", 0), "Filters": ("filters", 0), "Channels": ("channels", 1), "Rows": ("outputs", 0),
        "Cols": ("inputs", 1),
    },
}  # fmt: skip


def structures(data: Mapping[str, Any], weights: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """How many of the structures that a schedule speaks of are zero, or conform to N:M.

    Args:
        data: the schedule.
        weights: by canonical name.

    Returns:
        For each weight and kind of structure {'weight', 'kind', 'count', 'of'}, in the schedule's order.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for section in SECTIONS.values():
        for component in (data.get(section) or {}).values():
            for name, kind, hits in _flags_of(section, component, weights):
                entry = {"weight": name, "kind": kind, "count": int(hits.sum()), "of": hits.numel()}
                found.setdefault((name, kind), entry)
    return list(found.values())


def _flags_of(
    section: str, component: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> Iterator[tuple[str, str, Tensor]]:
    """(weight, kind, one boolean for each structure) of one component."""
    slices = _SLICES["pruners" if section == "pruners" else "regularizers"]
    regimes = component.get("reg_regims", {})
    listed = component.get("weights") or list(regimes)
    for pattern in [listed] if isinstance(listed, str) else listed:
        for name in resolve_all([pattern], list(weights)):
            weight = weights[name]
            setting = regimes.get(pattern)
            group = setting[1] if isinstance(setting, list) else component.get("group_type")
            if component["class"] == "NMPruner":
                n, m = component.get("n", 2), component.get("m", 4)
                yield name, f"groups with at most {n} of {m}", _conforming(weight, n, m)
            elif group == "Blocks":
                shape = read_block_shape(component["kwargs"])
                yield name, "zero blocks", block_magnitudes(weight, shape).flatten() == 0
            elif group in slices:
                label, dim = slices[group]
                yield name, f"zero {label}", (weight.transpose(0, dim).flatten(1) == 0).all(dim=1)
            elif weight.dim() == 1:
                yield name, "zero scales", weight == 0


def _conforming(weight: Tensor, n: int, m: int) -> Tensor:
    """Whether of each m neighbouring input channels at most n are not zero; whole groups only."""
    inputs = weight.transpose(0, 1).flatten(1)  # (in, everything else)
    groups = inputs[: len(inputs) // m * m].view(-1, m, inputs.size(1))
    return (torch.count_nonzero(groups, dim=1) <= n).flatten()


def logs_of(results: Path) -> Path:
    """The folder of the runs that the results are of."""
    return ROOT / "logs" / "results" / results.parent.name / results.stem


def latest_checkpoint(results: Path) -> Path | None:
    """The checkpoint of the last run, or None."""
    return next(iter((logs_of(results) / "latest_log_dir").glob("*checkpoint.pth.tar")), None)


def run(schedule: Shipped) -> None:
    """Run the command of a header.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    assert schedule.results is not None
    found = {word: str(latest_checkpoint(dense)) for word, dense in _needed(schedule).items()}
    flags = [found.get(flag, flag) for flag in schedule.flags]
    folder = logs_of(schedule.results)
    command = [sys.executable, "compress_classifier.py", *flags, "-o", str(folder), "-p", "200"]
    sys.stdout.write(f"{shlex.join(command)}\n")
    sys.stdout.flush()
    subprocess.run(command, cwd=ROOT, check=True)


def keep(schedule: Shipped) -> None:
    """Copy the results of the last run, with the structures of its checkpoint, and write the header."""
    assert schedule.results is not None
    card = json.loads(
        (logs_of(schedule.results) / "latest_log_dir" / "results.json").read_text(encoding="utf-8")
    )
    checkpoint = latest_checkpoint(schedule.results)
    assert checkpoint is not None
    card["structures"] = structures(schedule.data, read_checkpoint(checkpoint).state_dict)
    schedule.results.parent.mkdir(parents=True, exist_ok=True)
    write_whole(schedule.results, json.dumps(card, indent=2, allow_nan=False) + "\n")
    write_whole(schedule.path, with_block(schedule))


def measure(chosen: Sequence[Shipped], everything: Sequence[Shipped], *, again: bool) -> list[str]:
    """Run and keep what has no results yet; with `again`, all that is chosen. Returns what failed."""
    todo: dict[Path, Shipped] = {}
    by_results = {schedule.results: schedule for schedule in everything}
    for schedule in chosen:
        if (
            schedule.is_ours_to_run
            and schedule.results is not None
            and (again or not schedule.results.exists())
        ):
            for dense in _needed(schedule).values():
                if latest_checkpoint(dense) is None:
                    todo[dense] = by_results[dense]
            todo[schedule.results] = schedule
    failed: list[str] = []
    for schedule in todo.values():
        if any(latest_checkpoint(dense) is None for dense in _needed(schedule).values()):
            continue  # its baseline has failed
        try:
            run(schedule)
            keep(schedule)
        except subprocess.CalledProcessError as error:
            failed.append(f"{schedule.path.relative_to(ROOT)}: {error}")
    return failed


def _needed(schedule: Shipped) -> dict[str, Path]:
    """By each word of the command that a checkpoint stands for, the results of the dense network it is of."""
    assert schedule.results is not None
    flags, needed = schedule.flags, {}
    if "CHECKPOINT" in flags:
        needed["CHECKPOINT"] = schedule.results.with_stem("dense")
    if "TEACHER" in flags:
        arch, dataset = (flags[flags.index(flag) + 1] for flag in ("--kd-teacher", "--dataset"))
        needed["TEACHER"] = schedule.results.parents[1] / f"{arch}_{dataset.replace('-', '_')}" / "dense.json"
    return needed


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--only", metavar="TEXT", action="append", help="part of a schedule's path; repeatable"
    )
    parser.add_argument("--again", action="store_true", help="measure what has results, too")
    parser.add_argument("--headers", action="store_true", help="run nothing: write headers from kept results")
    args = parser.parse_args()
    everything = shipped()
    wanted = args.only or [""]
    chosen = list(
        dict.fromkeys(s for text in wanted for s in everything if text in str(s.path.relative_to(ROOT)))
    )
    if args.headers:
        for schedule in chosen:
            if schedule.results is not None and schedule.results.exists():
                write_whole(schedule.path, with_block(schedule))
        write_whole(INDEX, index())
        return
    failed = measure(chosen, everything, again=args.again)
    write_whole(INDEX, index())
    if failed:
        sys.exit("failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
