"""Distillation: killed and resumed bit for bit, chains, and what is refused."""

from __future__ import annotations

import json
import signal

import pytest

from tests.end_to_end.conftest import TINY
from tests.end_to_end.program import load, refused
from tests.end_to_end.test_kill_and_resume import STEPS, assert_same_run

SCHEDULE = """
quantizers:
  q: {{class: DorefaQuantizer, bits_activations: 8, bits_weights: 4}}
pruners:
  p: {{class: AutomatedGradualPruner, initial_sparsity: 0.1, final_sparsity: 0.6, weights: [conv2.weight]}}
extensions:
  kd: {{class: KnowledgeDistillation, teacher: {{checkpoint: {teacher}}}, temperature: 4{more}}}
policies:
  - {{quantizer: {{instance_name: q}}, starting_epoch: 0, ending_epoch: 4, frequency: 1}}
  - {{pruner: {{instance_name: p}}, starting_epoch: 0, ending_epoch: 3, frequency: 1}}
  - {{extension: {{instance_name: kd}}, starting_epoch: 0, ending_epoch: 4, frequency: 1}}
"""
HINTS = ", hints: [{teacher: conv2, student: conv1}, {teacher: relu2, student: relu2, kind: attention}]"
EPOCHS = 4
TRAIN = (
    f"--arch nets:Tiny --dataset digits -b 40 --etrs 0.2 --epochs {EPOCHS} --validation-split 0.2 --lr 0.05 "
    "--num-best-scores 2 "
)


@pytest.mark.parametrize("more", ["", HINTS], ids=["answers kept", "hints"])
def test_a_distillation_killed_in_every_epoch_is_resumed_bit_for_bit(program, trained, more):
    program.write("s.yaml", SCHEDULE.format(teacher=trained, more=more))
    program.run(TRAIN + "--compress s.yaml --seed 11 -o whole").succeeded()
    flags = "--seed 11"
    for epoch in range(1, EPOCHS):
        killed = program.run(
            TRAIN + f"--compress s.yaml -o killed{epoch} " + flags,
            kill=("torch.optim:Optimizer.zero_grad", (1 + bool(more)) * STEPS + 3),
        )
        assert killed.status == -signal.SIGKILL
        left = program.latest(f"killed{epoch}") / "checkpoint.pth.tar"
        assert load(left)["epoch"] == epoch - 1
        flags = f"--resume-from {left}"
    program.run(TRAIN + "--compress s.yaml -o resumed " + flags).succeeded()
    resumed = program.latest("resumed") / "checkpoint.pth.tar"
    assert_same_run(resumed, program.latest("whole") / "checkpoint.pth.tar")
    (state,) = [p["state"] for p in load(resumed)["scheduler"]["policies"] if p["name"] == "extension kd"]
    assert (state["answers"] is None) == bool(more)


def test_a_distillation_of_the_flags(program, trained):
    teacher = f"--kd-teacher nets:Tiny --kd-resume {trained} "
    done = program.run(TRAIN + teacher + "--kd-temp 4 --kd-no-labels --seed 3 -o out").succeeded()
    assert "Distill Loss" in done.out
    assert f"--- test of teacher 'nets:Tiny' of {trained} ---" in done.out
    card = json.loads((program.latest("out") / "results.json").read_text())
    assert card["teachers"][0]["parameters"] == card["measured"]["parameters"]
    left = program.latest("out") / "checkpoint.pth.tar"
    err = refused(program, TRAIN + f"--epochs 6 --kd-temp 2 {teacher} --kd-no-labels --resume-from {left}")
    assert (
        "'knowledge distillation': the checkpoint was written with temperature 4.0, the schedule has 2.0"
        in err
    )
    assert refused(program, TINY + "--kd-teacher nets:Tiny --kd-resume gone.pth.tar").startswith(
        "CheckpointError: gone.pth.tar: "
    )


def test_a_killed_chain_goes_on(program, trained):
    chain = TRAIN + f"--kd-teacher nets:Tiny --kd-resume {trained} --kd-chain nets:Tiny "
    program.run(chain + "--seed 3 -o whole").succeeded()
    killed = program.run(
        chain + "--seed 3 -o killed", kill=("torch.optim:Optimizer.zero_grad", (EPOCHS + 2) * STEPS + 2)
    )
    assert killed.status == -signal.SIGKILL
    done = program.run(chain + f"--kd-chain-resume {program.latest('killed')} -o resumed").succeeded()
    assert "--- stage 1 of 2: 'nets:Tiny' learns from 'nets:Tiny': finished before ---" in done.out
    for stage in ("1_nets.Tiny", "2_nets.Tiny"):
        ours, theirs = (program.latest(out) / stage / "checkpoint.pth.tar" for out in ("resumed", "whole"))
        assert_same_run(ours, theirs)
