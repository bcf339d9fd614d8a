"""Measure what a sensitivity sweep is good for: ResNet-20 on Fashion-MNIST, every axis, and a schedule of it.

    python -m docs.measure_sensitivity             # what is missing
    python -m docs.measure_sensitivity --seed 2    # of that seed only
    python -m docs.measure_sensitivity --table     # nothing; only write the page anew

The dense network is that of `make results-schedules`, and is made where it is missing. It is swept on the
validation images along every axis; the element curves choose a level for each layer, for 80 % of all weights;
that schedule and one of 80 % everywhere, equal else, train the dense network on, three seeds each. The sweep,
both schedules and the cards are kept in docs/results/sensitivity; docs/sensitivity_study.md is made of them.
Knows nothing about how networks are swept or pruned.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distiller.atomic_file import write_whole
from distiller.names import named_parameters
from distiller.sensitivity import AXES, points_from_csv
from distiller.sensitivity.curves import SensitivityPoint
from distiller.sensitivity.schedule_text import Chosen, recommended_schedule, schedule_text
from docs.dense_networks import dense_checkpoint, loaded
from docs.schedule_headers import ROOT
from docs.seeded_runs import SEEDS, Study, Training, spread, top1

PAGE = ROOT / "docs" / "sensitivity_study.md"
RESULTS = ROOT / "docs" / "results" / "sensitivity"
IMAGES = ROOT / "docs" / "images" / "sensitivity"
_ARCH = "resnet20_cifar"
_LOGS = ROOT / "logs" / "results" / "sensitivity"
_NETWORK = ("--arch", _ARCH, "--dataset", "fashion-mnist", "-b", "128")
SPARSITY, EPOCHS = 0.8, 6
_TRAINING = ("--reset-optimizer", "--channels-last", "--epochs", str(EPOCHS), "--lr", "0.02", "--wd", "1e-4")
SIDES = {"recommended": "levels by the sweep", "uniform": f"{100 * SPARSITY:.0f} % in every layer"}
HARMLESS = 1.0
"""Points of top-1: the table says how far each layer can go within."""

Cards = Mapping[str, Sequence[Mapping[str, Any]]]


def study() -> Study:
    """The trainings, both from the dense network."""
    flags = {
        side: (
            *_NETWORK,
            "--compress",
            str(RESULTS / f"{side}.yaml"),
            "--resume-from",
            "{dense}",
            *_TRAINING,
        )
        for side in SIDES
    }
    return Study(
        "sensitivity",
        [Training(side, given) for side, given in flags.items()],
        {"dense": lambda: dense_checkpoint(_ARCH)},
    )


def sweep() -> Path:
    """The kept CSV file of the sweep, which is made where it is missing."""
    kept = RESULTS / "sensitivity.csv"
    if not kept.exists():
        folder = _LOGS / "sweep"
        _run(
            *_NETWORK, "--seed", "1", "--sense", ",".join(AXES), "--sense-valid", "-o", str(folder),
            "--exp-load-weights-from", str(dense_checkpoint(_ARCH)),
        )  # fmt: skip
        for directory in (RESULTS, IMAGES):
            directory.mkdir(parents=True, exist_ok=True)
        for picture in (folder / "latest_log_dir").glob("sensitivity*.png"):
            shutil.copy(picture, IMAGES)
        shutil.copy(folder / "latest_log_dir" / "sensitivity.json", RESULTS)
        shutil.copy(folder / "latest_log_dir" / "sensitivity.csv", kept)
    return kept


def schedules() -> None:
    """Keep both schedules, where they are missing."""
    if not (RESULTS / "recommended.yaml").exists():
        folder = _LOGS / "recommendation"
        _run(
            *_NETWORK, "--seed", "1", "--recommend", str(sweep().parent), "--recommend-axis", "element",
            "--target-sparsity", str(SPARSITY), "--recommend-epochs", str(EPOCHS), "--verify",
            "-o", str(folder), "--exp-load-weights-from", str(dense_checkpoint(_ARCH)),
        )  # fmt: skip
        shutil.copy(folder / "latest_log_dir" / "schedule.yaml", RESULTS / "recommended.yaml")
    if not (RESULTS / "uniform.yaml").exists():
        model = loaded(_ARCH, "--exp-load-weights-from", str(dense_checkpoint(_ARCH))).model
        weights = [name for name, value in named_parameters(model) if value.dim() > 1]
        chosen = [Chosen((name,), SPARSITY) for name in weights]
        text = schedule_text(recommended_schedule("element", chosen, EPOCHS), [SIDES["uniform"]])
        write_whole(RESULTS / "uniform.yaml", text)


def prepare() -> None:
    """All that the trainings need besides the dense network."""
    sweep()
    schedules()


def page(points: Sequence[SensitivityPoint], cards: Cards, one_shot: str) -> str:
    """The page.

    Args:
        points: of the sweep.
        cards: of both sides, those of all seeds.
        one_shot: what the recommended levels do before any training, in words.
    """
    pictures = "\n\n".join(
        f"![Top-1 of ResNet-20 along {axis}](images/sensitivity/sensitivity_{axis.replace(':', '-')}.png)"
        for axis in AXES
    )
    names = list(dict.fromkeys(point.parameter for point in points))
    rows = "\n".join(
        f"| `{name}` | {' | '.join(_farthest(points, axis, name) for axis in AXES)} |" for name in names
    )
    share = f"{100 * SPARSITY:.0f} %"
    return f"""\
# What a sensitivity sweep says of ResNet-20, and what it is good for

Written by `python -m docs.measure_sensitivity`. ResNet-20 trained on Fashion-MNIST, swept on its 6,000
validation images along every axis: one layer (or group of coupled channels) at a time, all else as it
was. The numbers are in [sensitivity.csv](results/sensitivity/sensitivity.csv).

![All axes at a glance](images/sensitivity/sensitivity.png)

{pictures}

How far each can go at a loss of at most {HARMLESS:g} point of top-1 on these images, all levels up to there
included (sparsity, share of the rank, or bits). `-`: not at all. Empty: the axis is not for that weight; a
group stands in the row of its first one.

| | {" | ".join(AXES)} |
|---|{"---|" * len(AXES)}
{rows}

## From the sweep to a schedule

`--recommend --target-sparsity {SPARSITY:g}` chooses a level for each weight by the element curves, so that
{share} of all are zero ([schedule](results/sensitivity/recommended.yaml), with each level and its drop). The
[other side](results/sensitivity/uniform.yaml) prunes {share} of each. Both train the dense network on for
{EPOCHS} epochs, gradually pruned, equal else. Top-1 of all 10,000 test images after the last epoch, which
chose nothing: mean, its 95 % interval (Student's t), and each seed's correct decisions.

All chosen levels at once, before any training: {one_shot}.
What a layer can spare alone it cannot when the others have given theirs: at such a sparsity the sum of
the drops orders the choices, and forecasts nothing.

| | top-1 | seeds | sparsity of the weights |
|---|---|---|---|
{_dense_row(cards)}
{chr(10).join(_row(side, cards[side]) for side in SIDES)}

{verdict(cards)}
"""


def verdict(cards: Cards) -> str:
    """What came of it, in a sentence."""
    if any(len(cards[side]) < len(SEEDS) for side in SIDES):
        return "Not all seeds are measured."
    pairs = zip(*(cards[side] for side in SIDES), strict=True)
    gain = spread([top1(ours) - top1(theirs) for ours, theirs in pairs])
    assert gain.half_width is not None
    told = f"{gain.mean:+.2f} +- {gain.half_width:.2f} points, seed by seed"
    if abs(gain.mean) > gain.half_width:
        better = "a better" if gain.mean > 0 else "a worse"
        return f"Levels by the sweep train to {better} accuracy: {told}."
    better = "better" if gain.mean > 0 else "no better"
    return (
        f"In the mean of {len(SEEDS)} seeds levels by the sweep train to {better} accuracy, {told}: so few "
        "seeds do not tell it from 0."
    )


def one_shot_drop(schedule: str) -> str:
    """What `--verify` wrote into the comment of a recommended schedule, without its margin."""
    text = " ".join(line.removeprefix("#").strip() for line in schedule.splitlines())
    found = re.search(r"In one shot, without training \(--verify\): (.*? were predicted)\.", text)
    assert found is not None, "no result of --verify in the recommended schedule"
    return found[1]


def _farthest(points: Sequence[SensitivityPoint], axis: str, name: str) -> str:
    own = [point for point in points if (point.axis, point.parameter) == (axis, name)]
    if not own:
        return ""
    dense = next(point.score.top1 for point in own if point.level == AXES[axis].dense_level)
    found = "-"
    for point in own:
        if dense - point.score.top1 > HARMLESS:
            break
        if point.level != AXES[axis].dense_level and not point.removed.startswith("0 of "):
            found = f"{point.level:g}"
    return found


def _dense_row(cards: Cards) -> str:
    dense = next((card["reference"] for side in SIDES for card in cards[side]), None)
    if dense is None:
        return "| dense, as it is | not measured | | |"
    share = 100 * dense["top1_correct"] / dense["n"]
    return f"| dense, as it is | {share:.2f} % | {dense['top1_correct']:,} | |"


def _row(side: str, cards: Sequence[Mapping[str, Any]]) -> str:
    if not cards:
        return f"| {SIDES[side]} | not measured | | |"
    seeds = ", ".join(f"{card['measured']['top1_correct']:,}" for card in cards)
    sparsity = ", ".join(f"{100 * card['measured']['weight_sparsity']:.2f} %" for card in cards)
    return f"| {SIDES[side]} | {spread([top1(card) for card in cards])} | {seeds} | {sparsity} |"


def _run(*flags: str) -> None:
    command = [sys.executable, "compress_classifier.py", *flags]
    sys.stdout.write(f"{shlex.join(command)}\n")
    sys.stdout.flush()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """The command line."""
    cards = study().measured((__doc__ or "").split("\n\n")[0], first=prepare)
    one_shot = one_shot_drop((RESULTS / "recommended.yaml").read_text(encoding="utf-8"))
    write_whole(PAGE, page(points_from_csv(RESULTS / "sensitivity.csv"), cards, one_shot))


if __name__ == "__main__":
    main()
