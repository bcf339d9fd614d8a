"""Lottery tickets: by two checkpoints as in Distiller, and by a schedule that rewinds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from tests.end_to_end.conftest import TINY
from tests.end_to_end.program import load, refused

ROOT = Path(__file__).resolve().parents[2]
TRAIN = TINY + "--lr 0.05 --seed 3 --etrs 0.3 "
PRUNE = """
pruners:
  p: {class: SparsityLevelParameterPruner, levels: {conv2.weight: 0.6, fc.weight: 0.6}}
policies:
  - {pruner: {instance_name: p}, epochs: [1]}
"""
ROUNDS = """
pruners:
  ticket: {class: SparsityLevelParameterPruner, levels: {conv2.weight: 0.36, fc.weight: 0.36}}
extensions:
  rewind: {class: WeightRewinder}
lr_schedulers:
  again: {class: CosineAnnealingWarmRestarts, T_0: 2}
policies:
  - pruner: {instance_name: ticket, args: {levels: {conv2.weight: 0.2, fc.weight: 0.2}}}
    epochs: [2]
  - pruner: {instance_name: ticket}
    epochs: [4]
  - extension: {instance_name: rewind}
    epochs: [2, 4]
  - lr_scheduler: {instance_name: again}
    starting_epoch: 0
    ending_epoch: 6
    frequency: 1
"""


def test_a_ticket_of_two_checkpoints_is_trained_again_under_its_masks(program):
    program.write("prune.yaml", PRUNE)
    program.run(TRAIN + "--epochs 2 --save-untrained-model --compress prune.yaml -o pruned").succeeded()
    pruned, untrained = (
        program.latest("pruned") / f"{name}checkpoint.pth.tar" for name in ("", "untrained_")
    )
    command = [sys.executable, "-m", "distiller.apputils.lottery", str(untrained), str(pruned)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    ticket = untrained.with_name("untrained_lottery_checkpoint.pth.tar")
    assert (done.returncode, done.stdout) == (0, f"Saved lottery ticket to: {ticket}\n")

    out = (
        program.run(TRAIN + "--epochs 2 --masks-sparsity -o won --reset-optimizer --resume-from", ticket)
        .succeeded()
        .out
    )
    begun, kept, ended = (load(path)["state_dict"] for path in (untrained, ticket, pruned))
    trained = load(program.latest("won") / "checkpoint.pth.tar")["state_dict"]
    for name in ("conv2.weight", "fc.weight"):
        mask = ended[name] != 0
        assert abs((~mask).float().mean() - 0.6) < 0.01
        assert torch.equal(kept[name], begun[name] * mask)
        assert torch.equal(trained[name] != 0, mask)
        assert not torch.equal(trained[name], ended[name])
    assert "Sparsity of the masks after epoch 1:" in out

    told = refused(program, TRAIN + "--epochs 2 --resume-from", ticket)
    assert told == (
        f"UsageError: --resume-from {ticket}: is not trained yet, there is no epoch to go on after; "
        "add --reset-optimizer to begin at epoch 0\n"
    )


def test_a_schedule_that_rewinds_prunes_in_rounds(program):
    program.write("rounds.yaml", ROUNDS)
    plan = program.run(TRAIN + "--epochs 6 --dry-run --compress rounds.yaml").succeeded().out
    rewinds = "    extension rewind: WeightRewinder: begins with the weights that the run started with\n"
    assert plan.count(rewinds) == 2
    done = program.run(TRAIN + "--epochs 6 --compress rounds.yaml -o out").succeeded()
    for epoch in (2, 4):
        told = f"'rewind': epoch {epoch} begins with the weights that the run started with\n"
        assert done.out.count(told) == 1
    checkpoint = load(program.latest("out") / "checkpoint.pth.tar")
    for name in ("conv2.weight", "fc.weight"):
        zeros = (checkpoint["state_dict"][name] == 0).float().mean().item()
        assert abs(zeros - 0.36) < 0.01
    assert load(program.latest("out") / "best.pth.tar")["epoch"] in (4, 5)


def test_a_run_from_a_trained_network_rewinds_to_a_checkpoint(program, trained):
    program.run(TRAIN + "--epochs 1 --save-untrained-model -o dense").succeeded()
    untrained = program.latest("dense") / "untrained_checkpoint.pth.tar"
    program.write(
        "ticket.yaml",
        PRUNE.replace("[1]", "[0]") + f"  - {{extension: {{instance_name: rewind}}, epochs: [0]}}\n"
        f"extensions:\n  rewind: {{class: WeightRewinder, checkpoint: {untrained}}}\n",
    )
    flags = f"--epochs 1 --lr 1e-30 --momentum 0 --wd 0 --compress ticket.yaml --resume-from {trained} --reset-optimizer"
    done = program.run(TINY + flags + " -o out").succeeded()
    assert f"begins with the weights of {untrained}\n" in done.out
    ended, dense, begun = (
        load(path)["state_dict"]
        for path in (program.latest("out") / "checkpoint.pth.tar", trained, untrained)
    )
    mask = ended["conv2.weight"] != 0
    assert abs((~mask).float().mean() - 0.6) < 0.01
    assert (
        dense["conv2.weight"][mask].abs().min() >= dense["conv2.weight"][~mask].abs().max()
    )  # by the trained
    assert torch.equal(ended["conv2.weight"], begun["conv2.weight"] * mask)  # of the untrained

    told = refused(program, TINY + "--epochs 1 --dry-run --compress gone.yaml")
    assert "gone.yaml" in told
    program.write(
        "gone.yaml", (program.folder / "ticket.yaml").read_text().replace(str(untrained), "gone.pth.tar")
    )
    told = refused(program, TINY + "--epochs 1 --dry-run --compress gone.yaml")
    assert "  :8    extensions.rewind" in told
    assert "gone.pth.tar" in told
