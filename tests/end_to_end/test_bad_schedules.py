"""Wrong schedules, and schedules that end badly: nothing starts, or what was good stays."""

from __future__ import annotations

import pytest
import torch

from tests.end_to_end.conftest import TINY
from tests.end_to_end.program import load, refused
from tests.end_to_end.test_training import AGP, OWN_PRUNER, PLUGIN

TRAIN = TINY + "--epochs 1 --etrs 0.1 -o out "
LEVELS = "class: SparsityLevelParameterPruner, levels: {conv2.weight: 0.5}"


def schedule(component: str, policy: str = "starting_epoch: 0, ending_epoch: 2, frequency: 1") -> str:
    return f"pruners:\n  p: {{{component}}}\npolicies:\n  - {{pruner: {{instance_name: p}}, {policy}}}\n"


SCHEDULES = {
    "unknown class": (
        schedule("class: AutomatedGradualPrunner"),
        "  :2    pruners.p.class: unknown class 'AutomatedGradualPrunner'; did you mean 'AutomatedGradualPruner'?",
    ),
    "misspelt weight": (
        schedule("class: SparsityLevelParameterPruner, levels: {conv2.weigth: 0.5}"),
        "  :2    pruners.p.levels.conv2.weigth: no parameter 'conv2.weigth' in the model; "
        "did you mean 'conv2.weight'?",
    ),
    "pattern without a match": (
        schedule("class: SparsityLevelParameterPruner, levels: {'layer.*': 0.5}"),
        "  :2    pruners.p.levels.layer.*: ",
    ),
    "wrong type": (
        schedule("class: SparsityLevelParameterPruner, levels: {conv2.weight: much}"),
        "  :2    pruners.p.levels.conv2.weight: must be a number, got 'much'",
    ),
    "out of range": (
        schedule("class: SparsityLevelParameterPruner, levels: {conv2.weight: 50}"),
        "  :2    pruners.p",
    ),
    "missing key": (
        schedule("class: AutomatedGradualPruner, initial_sparsity: 0.1, weights: [conv2.weight]"),
        "  :2    pruners.p.final_sparsity: missing; AutomatedGradualPruner needs it",
    ),
    "missing class": (
        schedule("levels: {}"),
        "  :2    pruners.p: missing key 'class': the name of what it is",
    ),
    "unknown key": (schedule(LEVELS + ", level: {}"), "  :2    pruners.p.level: "),
    "duplicate key": (
        "pruners:\n  p:\n    class: X\n    class: Y\npolicies: []\n",
        "  :4    pruners.p: duplicate key 'class', first given in line 3; keep one",
    ),
    "overlapping pruners": (
        f"pruners:\n  p: {{{LEVELS}}}\n  q: {{{LEVELS}}}\npolicies:\n"
        "  - {pruner: {instance_name: p}, starting_epoch: 0, ending_epoch: 3, frequency: 1}\n"
        "  - {pruner: {instance_name: q}, epochs: [2]}\n",
        "  :6    policies[1]: 'pruner p' (epochs 0..2) and 'pruner q' (epochs 2..2) both prune 'conv2.weight'; "
        "let one end before the other begins",
    ),
    "epochs given twice": (
        schedule(LEVELS, "epochs: [1], starting_epoch: 0"),
        "  :4    policies[0]: both 'epochs'",
    ),
    "no policies": (
        "pruners: {}\n",
        "  :1    missing section 'policies': nothing says when anything happens",
    ),
    "unknown section": (
        "prunners: {}\npolicies: []\n",
        "  :1    prunners: unknown section; did you mean 'pruners'?",
    ),
    "unknown instance": (
        schedule(LEVELS).replace("instance_name: p", "instance_name: pp"),
        "  :4    policies[0].pruner.instance_name: no pruner 'pp' in 'pruners'",
    ),
    "empty": ("", "  :1    is empty; a schedule has at least a 'policies' list"),
    "binary": (bytes(range(256)), "  :1    is not text (byte 128 is not UTF-8); a YAML file is wanted"),
    "not YAML": ("pruners: [\n", "is not YAML: "),
    "class of a package that was not allowed": (OWN_PRUNER, "allow it with --plugin mine"),
}


@pytest.mark.parametrize("fault", SCHEDULES)
def test_a_wrong_schedule_does_not_start_to_train(program, fault):
    content, message = SCHEDULES[fault]
    program.write("mine/__init__.py", "raise SystemExit('this must not run')\n")
    program.write("mine/pruners.py", PLUGIN)
    program.write("s.yaml", content)
    err = refused(program, TRAIN + "--compress s.yaml")
    assert err.startswith("ScheduleError: s.yaml has 1 error\n  :")
    assert message in err


def test_all_faults_of_a_schedule_are_told_at_once(program):
    program.write(
        "s.yaml", AGP.replace("conv2.weight", "conv2.weigth").replace("ExponentialLR", "ExponentialRL")
    )
    assert refused(program, TRAIN + "--compress s.yaml") == (
        "ScheduleError: s.yaml has 2 errors\n"
        "  :7    pruners.agp.weights[0]: no parameter 'conv2.weigth' in the model; did you mean 'conv2.weight'?\n"
        "  :9    lr_schedulers.decay.class: unknown class 'ExponentialRL'; did you mean 'ExponentialLR'?\n"
    )


@pytest.mark.parametrize(
    "name, reason", [("nowhere.yaml", "No such file or directory"), (".", "Is a directory")]
)
def test_a_schedule_that_cannot_be_read(program, name, reason):
    err = refused(program, TRAIN + f"--compress {name}")
    assert err == f"ScheduleError: {name} has 1 error\n  :1    cannot be read: {reason}\n"


def test_a_wrong_schedule_fails_in_a_dry_run_too(program):
    program.write("s.yaml", SCHEDULES["misspelt weight"][0])
    assert "did you mean 'conv2.weight'?" in refused(program, TINY + "--dry-run --compress s.yaml")


EXPLODING = """
lr_schedulers:
  lr: {class: MultiStepMultiGammaLR, milestones: [1], gammas: [1.0e+30]}
policies:
  - {lr_scheduler: {instance_name: lr}, starting_epoch: 0, ending_epoch: 5, frequency: 1}
"""


@pytest.mark.parametrize("print_freq", [1, 1000])
def test_training_stops_at_a_loss_that_is_not_finite_and_the_last_good_checkpoint_stays(program, print_freq):
    program.write("s.yaml", EXPLODING)
    done = program.run(TINY + f"--epochs 4 --lr 0.02 --etrs 0.1 -p {print_freq} -o out --compress s.yaml")
    assert done.status == 2
    assert done.err.startswith("DivergenceError: epoch 1, mini-batch ")
    assert done.err.endswith(
        ": the training loss is nan; training stops here and the last checkpoint stays as it is. Try a lower --lr\n"
    )
    log = (program.folder / "out/latest_log_file").read_text()
    assert f"stopped by {done.err.strip()}" in log
    folder = program.latest("out")
    assert program.names(folder) == {
        "LOG",
        "EVENTS",
        "configs",
        "checkpoint.pth.tar",
        "best.pth.tar",
        "epochs.csv",
    }
    assert load(folder / "checkpoint.pth.tar")["epoch"] == 0
    program.run(TINY + f"-e --resume-from {folder / 'checkpoint.pth.tar'}").succeeded()


def test_an_epoch_of_one_step_that_spoils_the_weights_writes_no_checkpoint(program):
    program.write("s.yaml", EXPLODING)
    done = program.run(TINY + "--epochs 4 --lr 0.02 --etrs 0.01 -o out --compress s.yaml")
    assert done.status == 2
    assert done.err.startswith("DivergenceError: epoch 1: the validation loss is ")
    state = load(program.latest("out") / "checkpoint.pth.tar")["state_dict"]
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


def test_a_training_that_diverges_at_once_leaves_the_checkpoint_that_it_began_with(program, trained):
    before = trained.read_bytes()
    done = program.run(TINY + f"--epochs 3 --lr 1e30 -p 1 -o out --resume-from {trained} --reset-optimizer")
    assert done.status == 2
    assert "the training loss is nan" in done.err
    assert trained.read_bytes() == before
    assert "checkpoint.pth.tar" not in program.names(program.latest("out"))
