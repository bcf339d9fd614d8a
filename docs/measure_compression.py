"""Measure compression rates: LeNet-300-100 pruned, shared, factored and packed, by the size of the file.

    python -m docs.measure_compression             # what is missing
    python -m docs.measure_compression --seed 2    # of that seed only
    python -m docs.measure_compression --table     # nothing; only write the page anew

Three seeds, everything trained on Fashion-MNIST by the commands in the schedules' headers. The cards are kept
in docs/results/compression; docs/compression_rates.md is made of them. The exit status is 0 only where the
bars hold. Knows nothing about how networks are compressed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch

from compress_classifier import make_parser
from distiller.apputils.classifier_training import ClassifierTraining
from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.atomic_file import write_whole
from docs.dense_networks import require
from docs.schedule_headers import ROOT
from docs.seeded_runs import SEEDS, Study, Training, schedule_flags, shipped_schedule, spread, top1

PAGE = ROOT / "docs" / "compression_rates.md"
_PIPELINES = "pipelines/lenet_300_100_fashion_mnist"
_SHARING = "soft_weight_sharing/lenet_300_100_fashion_mnist"
TITLES = {
    "dense": "dense",
    "prune_share": "pruned, shared, packed",
    "all": "factored, pruned, shared, distilled, packed",
    "mixture": "soft weight sharing, before quantization",
    "just_quantized": "soft weight sharing, quantized, before any further training",
    "quantized": "soft weight sharing, quantized, values trained on, packed",
}
RATE, POINTS, SPARSITY = 40.0, 1.0, 0.95
"""Bars: how many times smaller the pipeline's file is at least, what it may lose; zeros of the mixture's."""
TEACHER_LR = "0.02"
"""Of LeNet-5, from which the pipeline of all steps learns: at 0.05, its schedule's, one seed diverges."""

Cards = Mapping[str, Sequence[Mapping[str, Any]]]


def study() -> Study:
    """The trainings, dense networks first."""
    dense, teacher = (
        schedule_flags(f"baseline_networks/{stem}_fashion_mnist") for stem in ("lenet_300_100", "lenet5")
    )
    teacher = tuple(TEACHER_LR if before == "--lr" else word for before, word in pairwise(("", *teacher)))
    known = {"CHECKPOINT": "{dense}", "TEACHER": "{teacher}"}
    quantized = schedule_flags(_SHARING, **known)
    epochs = quantized.index("--epochs") + 1
    unquantized = (*quantized[:epochs], str(quantized_in()), *quantized[epochs + 1 :])
    return Study(
        "compression",
        [
            Training("dense", dense),
            Training("teacher", teacher),
            Training("prune_share", schedule_flags(f"{_PIPELINES}_prune_share", **known)),
            Training("all", schedule_flags(f"{_PIPELINES}_all", **known)),
            Training("mixture", unquantized),
            Training("quantized", (*quantized, "--pack", "model.dsz")),
        ],
    )


def measure_quantization(seed: int) -> None:
    """Test the network as the first step of quantization leaves it, unless that is known; keep the result."""
    own = study()
    if own.card("just_quantized", seed) is not None:
        return
    own.run("mixture", seed, needs_checkpoint=True)
    flags = [word for word in own.trainings["quantized"].flags if word != "--reset-optimizer"]
    flags[flags.index("{dense}")] = str(own.checkpoint("mixture", seed))
    compressor = ClassifierCompressor(make_parser().parse_args([*flags, "--seed", str(seed)]))
    training = ClassifierTraining(compressor)
    scheduler, epoch = training.scheduler, quantized_in()
    require(training.start == epoch, f"seed {seed}: the mixture was not learned until epoch {epoch}")
    scheduler.on_epoch_begin(epoch)
    scheduler.on_minibatch_begin(epoch, 0, 1)
    with scheduler.masked():
        result = compressor.test()
        zeros, count = map(sum, zip(*map(_zeros, compressor.model.parameters()), strict=True))
    card = {"measured": {**asdict(result), "total_sparsity": zeros / count}}
    write_whole(own.results("just_quantized", seed), json.dumps(card, indent=2) + "\n")


def _zeros(param: torch.Tensor) -> tuple[int, int]:
    return int((param == 0).sum()), param.numel()


def quantized_in() -> int:
    """The epoch in which the schedule of soft weight sharing quantizes."""
    for policy in shipped_schedule(_SHARING).data["policies"]:
        if policy.get("extension", {}).get("instance_name") == "quantize":
            return policy["starting_epoch"]
    raise LookupError(f"schedules/{_SHARING}.yaml has no policy of 'quantize'")


def bars(cards: Cards) -> list[str]:
    """What is missed, in words; what was not measured is missed."""
    missed = []
    if not len(cards["dense"]) == len(cards["prune_share"]) == len(cards["quantized"]) == len(SEEDS):
        return ["not all seeds are measured"]
    for seed, dense, packed in zip(SEEDS, cards["dense"], cards["prune_share"], strict=True):
        rate, lost = packed["packed"]["compression_rate"], top1(dense) - top1(packed)
        if rate < RATE or lost > POINTS:
            missed.append(f"pruned, shared, packed, seed {seed}: {rate:.1f}x, loses {lost:.2f} points")
    for seed, card in zip(SEEDS, cards["quantized"], strict=True):
        sparsity = card["measured"]["total_sparsity"]
        if sparsity < SPARSITY:
            missed.append(f"soft weight sharing, seed {seed}: sparsity {100 * sparsity:.2f} %")
    return missed


def page(cards: Cards) -> str:
    """The page.

    Args:
        cards: of each training, those of all seeds.
    """
    rows = [_row(name, cards[name]) for name in TITLES]
    missed = bars(cards)
    verdict = "All hold." if not missed else "Missed: " + "; ".join(missed) + "."
    return f"""\
# Compression rates, by the file

Written by `python -m docs.measure_compression`. LeNet-300-100 (266,610 parameters, 1,066,440 bytes in
float32) on Fashion-MNIST, three seeds each: top-1 of all 10,000 test images after the last epoch, mean and
its 95 % interval (Student's t), and each seed's correct decisions; sparsity of all parameters, biases too;
the size of the packed file (`--pack`), header and checksums included, against the bytes of float32. The file
holds the network bit for bit: what it loses was lost in training. Commands and settings are those of the
schedules
[pruned and shared](../schedules/{_PIPELINES}_prune_share.yaml),
[all together](../schedules/{_PIPELINES}_all.yaml) and
[soft weight sharing](../schedules/{_SHARING}.yaml), which each start from the same seed's dense network;
the teacher of all together is LeNet-5 of that seed, trained by
[its schedule](../schedules/baseline_networks/lenet5_fashion_mnist.yaml) at a learning rate of {TEACHER_LR}
(at 0.05 it diverges with one of the seeds).

| network | top-1 | seeds | sparsity | packed bytes | compression rate |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Asked for: pruned, shared and packed at least {RATE:.0f}x smaller and within {POINTS:.0f} point of the dense
network, with each seed; soft weight sharing at least {100 * SPARSITY:.0f} % sparse. {verdict}
"""


def _row(name: str, cards: Sequence[Mapping[str, Any]]) -> str:
    if not cards:
        return f"| {TITLES[name]} | not measured | | | | |"
    seeds = ", ".join(f"{card['measured']['top1_correct']:,}" for card in cards)
    sparsity = ", ".join(f"{100 * card['measured']['total_sparsity']:.2f} %" for card in cards)
    packed = [card["packed"] for card in cards if "packed" in card]
    sizes = ", ".join(f"{entry['bytes']:,}" for entry in packed)
    rates = ", ".join(f"{entry['compression_rate']:.1f}x" for entry in packed)
    accuracy = spread([top1(card) for card in cards])
    return f"| {TITLES[name]} | {accuracy} | {seeds} | {sparsity} | {sizes} | {rates} |"


def main() -> None:
    """The command line."""
    cards = study().measured((__doc__ or "").split("\n\n")[0], then=measure_quantization)
    cards["just_quantized"] = study().cards("just_quantized")
    write_whole(PAGE, page(cards))
    missed = bars(cards)
    if missed:
        sys.exit("missed:\n" + "\n".join(missed))


if __name__ == "__main__":
    main()
