"""Every training quantizer in the program: with pruning, killed and resumed bit for bit, reloaded for evaluation."""

from __future__ import annotations

import json
import signal

import pytest
import torch

from distiller.registry import QUANTIZERS
from tests.end_to_end.conftest import make_program
from tests.end_to_end.program import differences, load, refused

SETTINGS = {
    "QuantAwareTrainRangeLinearQuantizer": "bits_activations: 8, bits_weights: 4, mode: ASYMMETRIC_UNSIGNED",
    "with batch norms folded": "bits_activations: 8, bits_weights: 4, simulate_bn_folding: true, freeze_bn_delay: 10",
    "NCFQuantAwareTrainQuantizer": "bits_activations: 8, bits_weights: 8, mode: ASYMMETRIC_SIGNED",
    "LSQQuantizer": "bits_activations: 4, bits_weights: 4",
    "DorefaQuantizer": "bits_activations: 8, bits_weights: 4",
    "PACTQuantizer": "bits_activations: 4, bits_weights: 4, act_clip_decay: 0.001",
    "WRPNQuantizer": "bits_activations: 8, bits_weights: 4",
    "BinaryQuantizer": "bits_weights: 1",
    "TernaryQuantizer": "bits_weights: 2",
    "CodebookQuantizer": "bits_weights: 3",
    "codebooks looked for again": "bits_weights: 3, reassign_every: 3, train_centroids: false",
}
CLASS_OF = {
    "with batch norms folded": "QuantAwareTrainRangeLinearQuantizer",
    "codebooks looked for again": "CodebookQuantizer",
}
STEPS = 7  # mini-batches of an epoch
COMMAND = "--arch nets:Tiny --dataset digits -b 40 --etrs 0.2 --epochs 3 --lr 0.02 --compress schedule.yaml "


def schedule(name: str) -> str:
    return f"""
quantizers:
  q: {{class: {CLASS_OF.get(name, name)}, {SETTINGS[name]}}}
pruners:
  p: {{class: SparsityLevelParameterPruner, levels: {{conv2.weight: 0.5}}}}
lr_schedulers:
  lr: {{class: ExponentialLR, gamma: 0.8}}
policies:
  - pruner: {{instance_name: p, args: {{keep_mask: true}}}}
    epochs: [0]
  - quantizer: {{instance_name: q}}
    starting_epoch: 0
    ending_epoch: 3
    frequency: 1
  - lr_scheduler: {{instance_name: lr}}
    starting_epoch: 0
    ending_epoch: 3
    frequency: 1
"""


def of_training(name: str) -> bool:
    return name != "PostTrainLinearQuantizer"


def test_every_training_quantizer_is_in_this_file():
    assert {name for name in QUANTIZERS if of_training(name)} == {
        CLASS_OF.get(name, name) for name in SETTINGS
    }


@pytest.fixture(scope="module", params=SETTINGS)
def runs(request, server, tmp_path_factory):
    """(program, folder of the whole run, folder of the run that was killed in each epoch and resumed)."""
    program = make_program(server, tmp_path_factory.mktemp("qat"))
    program.write("schedule.yaml", schedule(request.param))
    program.run(COMMAND + "--seed 11 -o whole").succeeded()
    flags = "--seed 11"
    for epoch in (1, 2):
        killed = program.run(
            COMMAND + f"-o killed{epoch} {flags}", kill=("torch.optim:Optimizer.zero_grad", STEPS + 3)
        )
        assert killed.status == -signal.SIGKILL
        flags = f"--resume-from {program.latest(f'killed{epoch}') / 'checkpoint.pth.tar'}"
    program.run(COMMAND + f"-o resumed {flags}").succeeded()
    return program, program.latest("whole"), program.latest("resumed")


def test_a_killed_training_is_resumed_bit_for_bit(runs):
    _, whole, resumed = runs
    ours, theirs = (load(folder / "checkpoint.pth.tar") for folder in (resumed, whole))
    for checkpoint in (ours, theirs):
        checkpoint["extras"].pop("reference")
    assert differences(ours, theirs) == []


def test_masks_survive_quantization(runs):
    _, whole, _ = runs
    checkpoint = load(whole / "checkpoint.pth.tar")
    [mask] = checkpoint["scheduler"]["masks"]["conv2.weight"].values()
    name = next(n for n in checkpoint["state_dict"] if n in ("conv2.weight", "conv2.param_module.weight"))
    weight = checkpoint["state_dict"][name]
    assert float((~mask).float().mean()) == 0.5
    assert torch.equal(weight[~mask], torch.zeros(int((~mask).sum())))


def test_a_checkpoint_is_evaluated_as_training_ended(runs):
    program, whole, _ = runs
    line = "--arch nets:Tiny --dataset digits --evaluate -o again --resume-from "
    program.run(line, whole / "checkpoint.pth.tar").succeeded()
    ours, theirs = (
        json.loads((folder / "results.json").read_text())["measured"]
        for folder in (program.latest("again"), whole)
    )
    assert ours["top1_correct"] == theirs["top1_correct"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


def test_another_quantizer_is_refused_on_resume(runs):
    program, whole, _ = runs
    ours = (program.folder / "schedule.yaml").read_text()
    program.write("other.yaml", schedule("LSQQuantizer" if "DorefaQuantizer" in ours else "DorefaQuantizer"))
    line = COMMAND.replace("schedule.yaml", "other.yaml") + "-o no --resume-from "
    message = refused(program, line, whole / "checkpoint.pth.tar")
    assert "prepared" in message or "written with" in message
