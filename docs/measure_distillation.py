"""Measure distillation: a small VGG from labels, from a teacher, without labels, and by way of an assistant.

    python -m docs.measure_distillation             # what is missing
    python -m docs.measure_distillation --seed 2    # of that seed only
    python -m docs.measure_distillation --table     # nothing; only write the page anew

Three seeds, everything trained on Fashion-MNIST by commands like any user's. The cards are kept in
docs/results/distillation; docs/distillation_results.md is made of them. Knows nothing about distillation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from distiller.atomic_file import write_whole
from docs.schedule_headers import ROOT
from docs.seeded_runs import SEEDS, Study, Training, schedule_flags, spread, top1

PAGE = ROOT / "docs" / "distillation_results.md"
TEACHER, ASSISTANT, STUDENT = "vgg13_bn_025_cifar", "vgg11_bn_025_cifar", "minivgg_025_cifar"
SETTINGS = ("--kd-temperature", "4", "--kd-distill-wt", "0.9", "--kd-student-wt", "0.1")
TITLES = {
    "teacher": "teacher: VGG-13, a quarter of the width",
    "assistant": "assistant: VGG-11, a quarter of the width, distilled from the teacher",
    "alone": "student alone: MiniVGG, a quarter of the width, from labels",
    "distilled": "student distilled from the teacher",
    "unlabelled": "student distilled from the teacher, without labels",
    "chained": "student distilled from the assistant",
}


def study() -> Study:
    """The trainings, teacher first."""
    teacher, alone = (
        schedule_flags(f"baseline_networks/{stem}_fashion_mnist") for stem in ("vgg13_bn_025", "minivgg_025")
    )
    assistant = tuple(ASSISTANT if word == TEACHER else word for word in teacher)
    from_teacher = ("--kd-teacher", TEACHER, "--kd-resume", "{teacher}")
    from_assistant = ("--kd-teacher", ASSISTANT, "--kd-resume", "{assistant}")
    unlabelled = (*SETTINGS[:2], "--kd-no-labels")
    return Study(
        "distillation",
        [
            Training("teacher", teacher),
            Training("assistant", (*assistant, *from_teacher, *SETTINGS)),
            Training("alone", alone),
            Training("distilled", (*alone, *from_teacher, *SETTINGS)),
            Training("unlabelled", (*alone, *from_teacher, *unlabelled)),
            Training("chained", (*alone, *from_assistant, *SETTINGS)),
        ],
    )


def page(cards: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The page.

    Args:
        cards: of each training, those of all seeds.
    """
    rows = [_row(name, cards[name], cards["alone"]) for name in TITLES]
    settings = " ".join(SETTINGS)
    return f"""\
# What distillation brings

Written by `python -m docs.measure_distillation`. Top-1 of all 10,000 test images of Fashion-MNIST (32x32
pixels) after the last of 15 epochs, mean of the seeds and its 95 % interval (Student's t), and each seed's
correct decisions. All networks are trained alike: SGD, cosine learning rate from 0.05, weight decay 5e-4,
batches of 128, images flipped at random. Distillation: `{settings}`;
without labels `{" ".join(SETTINGS[:2])} --kd-no-labels`. A seed's student learns from the same seed's
teacher. Nothing was chosen by these test images.

| network | parameters | top-1 | seeds | against the student alone, by seed |
|---|--:|---|---|---|
{chr(10).join(rows)}
"""


def _row(name: str, cards: Sequence[Mapping[str, Any]], alone: Sequence[Mapping[str, Any]]) -> str:
    if not cards:
        return f"| {TITLES[name]} | | not measured | | |"
    parameters = f"{cards[0]['measured']['parameters']:,}"
    seeds = ", ".join(f"{card['measured']['top1_correct']:,}" for card in cards)
    gained = ""
    if name in ("distilled", "unlabelled", "chained") and len(cards) == len(alone) == len(SEEDS):
        points = [top1(card) - top1(other) for card, other in zip(cards, alone, strict=True)]
        gained = f"{', '.join(f'{point:+.2f}' for point in points)}; mean {mean(points):+.2f} points"
    return (
        f"| {TITLES[name]} | {parameters} | {spread([top1(card) for card in cards])} | {seeds} | {gained} |"
    )


def main() -> None:
    """The command line."""
    write_whole(PAGE, page(study().measured((__doc__ or "").split("\n\n")[0])))


if __name__ == "__main__":
    main()
