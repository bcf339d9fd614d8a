"""A run that is killed at any moment and resumed ends as one that was not, bit for bit."""

from __future__ import annotations

import signal
from functools import cache
from pathlib import Path

import pytest

from tests.end_to_end.conftest import TINY, make_program
from tests.end_to_end.program import differences, load

SCHEDULES = {
    "agp and exponential decay": """
pruners:
  agp: {class: AutomatedGradualPruner, initial_sparsity: 0.1, final_sparsity: 0.8, weights: [conv2.weight, fc.weight]}
lr_schedulers:
  lr: {class: ExponentialLR, gamma: 0.7}
policies:
  - pruner: {instance_name: agp, args: {mini_batch_pruning_frequency: 2}}
    starting_epoch: 0
    ending_epoch: 4
    frequency: 2
  - lr_scheduler: {instance_name: lr}
    starting_epoch: 0
    ending_epoch: 5
    frequency: 1
""",
    "sensitivity and plateau": """
pruners:
  s: {class: SensitivityPruner, sensitivities: {conv1.weight: 0.3, fc.weight: 0.6}}
lr_schedulers:
  lr: {class: ReduceLROnPlateau, mode: min, patience: 0, factor: 0.3}
policies:
  - pruner: {instance_name: s}
    starting_epoch: 1
    ending_epoch: 5
    frequency: 2
  - lr_scheduler: {instance_name: lr}
    starting_epoch: 0
    ending_epoch: 5
    frequency: 1
""",
    "filters, then elements, and one cycle": """
pruners:
  f: {class: L1RankedStructureParameterPruner_AGP, initial_sparsity: 0.1, final_sparsity: 0.5, group_type: Filters,
      weights: [conv2.weight]}
  e: {class: SparsityLevelParameterPruner, levels: {conv2.weight: 0.7}}
lr_schedulers:
  lr: {class: OneCycleLR, max_lr: 0.05, total_steps: 5}
policies:
  - pruner: {instance_name: f, args: {mask_on_forward_only: true, use_double_copies: true, keep_mask: true}}
    starting_epoch: 0
    ending_epoch: 2
    frequency: 1
  - pruner: {instance_name: e, args: {keep_mask: true}}
    epochs: [2]
  - lr_scheduler: {instance_name: lr}
    starting_epoch: 0
    ending_epoch: 5
    frequency: 1
""",
    "lottery tickets": """
pruners:
  p: {class: SparsityLevelParameterPruner, levels: {conv2.weight: 0.3, fc.weight: 0.3}}
extensions:
  to_the_start: {class: WeightRewinder}
  late: {class: WeightRewinder, late: true}
policies:
  - pruner: {instance_name: p}
    epochs: [1]
  - pruner: {instance_name: p, args: {levels: {conv2.weight: 0.5, fc.weight: 0.5}}}
    epochs: [4]
  - extension: {instance_name: to_the_start}
    epochs: [1]
  - extension: {instance_name: late}
    epochs: [2, 4]
""",
    "layers factored": """
pruners:
  before: {class: SparsityLevelParameterPruner, levels: {conv2.weight: 0.5, fc.weight: 0.3}}
  after: {class: SparsityLevelParameterPruner, levels: {conv2.first.weight: 0.4, fc.sparse.weight: 0.97}}
extensions:
  low_rank: {class: LowRankFactorization, layers: {conv2: {energy: 0.8, whitened: true}, fc: {rank: 3, sparse: 0.1}}}
lr_schedulers:
  lr: {class: ExponentialLR, gamma: 0.7}
policies:
  - pruner: {instance_name: after}
    epochs: [3, 4]
  - pruner: {instance_name: before}
    epochs: [0]
  - extension: {instance_name: low_rank}
    epochs: [1, 2]
  - lr_scheduler: {instance_name: lr}
    starting_epoch: 0
    ending_epoch: 5
    frequency: 1
""",
    "filters physically removed": """
pruners:
  f: {class: ActivationAPoZRankedFilterPruner_AGP, initial_sparsity: 0.2, final_sparsity: 0.5, group_type: Filters,
      weights: [conv1.weight, conv2.weight]}
extensions:
  thin: {class: FilterRemover}
  to_the_start: {class: WeightRewinder}
lr_schedulers:
  lr: {class: ExponentialLR, gamma: 0.7}
policies:
  - pruner: {instance_name: f}
    starting_epoch: 0
    ending_epoch: 4
    frequency: 1
  - extension: {instance_name: thin}
    epochs: [1, 3]
  - extension: {instance_name: to_the_start}
    epochs: [2]
  - lr_scheduler: {instance_name: lr}
    starting_epoch: 0
    ending_epoch: 5
    frequency: 1
""",
    "soft weight sharing, then one value for each component": """
extensions:
  mixture: {class: SoftWeightSharing, components: 4, initial_std: 0.1, tau: 1.0e-4, scaling: true, every: 2, history: 50}
  quantize: {class: QuantizeToMixture, recentre: true}
policies:
  - extension: {instance_name: mixture}
    starting_epoch: 0
    ending_epoch: 3
    frequency: 1
  - extension: {instance_name: quantize}
    starting_epoch: 3
    ending_epoch: 5
    frequency: 1
""",
}
OPTIMIZERS = {"sgd": "--lr 0.05", "adam": "--optimizer adam --lr 0.003"}
EPOCHS = 5
STEPS = 7  # mini-batches of an epoch


def command(optimizer: str, out: str) -> str:
    return (
        f"--arch nets:Tiny --dataset digits -b 40 --etrs 0.2 --epochs {EPOCHS} --validation-split 0.2 "
        f"--num-best-scores 2 --compress schedule.yaml {OPTIMIZERS[optimizer]} -o {out} "
    )


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """`whole(schedule, optimizer)`: the last checkpoint of a run that was not interrupted."""

    @cache
    def run(schedule: str, optimizer: str) -> Path:
        program = make_program(server, tmp_path_factory.mktemp("whole"))
        program.write("schedule.yaml", SCHEDULES[schedule])
        program.run(command(optimizer, "out") + "--seed 11").succeeded()
        return program.latest("out") / "checkpoint.pth.tar"

    return run


def assert_same_run(resumed: Path, whole: Path) -> None:
    ours, theirs = load(resumed), load(whole)
    for checkpoint in (ours, theirs):  # the reference is measured, with latencies
        checkpoint["extras"].pop("reference")
    assert {"state_dict", "optimizer", "scheduler", "rng"} <= ours.keys()
    assert differences(ours, theirs) == []


KILLS = {
    "in the middle of an epoch": ("torch.optim:Optimizer.zero_grad", 2 * STEPS + 4),
    "before a checkpoint reaches the disk": ("os:fsync", 6),
    "before a checkpoint gets its name": ("pathlib:Path.replace", 9),
    "after validation": ("distiller.apputils.scores:ScoreTracker.step", 4),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("moment", KILLS)
def test_a_killed_training_is_resumed_bit_for_bit(program, whole, moment, optimizer):
    schedule = "agp and exponential decay"
    program.write("schedule.yaml", SCHEDULES[schedule])
    killed = program.run(command(optimizer, "out") + "--seed 11", kill=KILLS[moment])
    assert killed.status == -signal.SIGKILL
    left = program.latest("out") / "checkpoint.pth.tar"
    assert 0 <= load(left)["epoch"] < EPOCHS - 1
    program.run(command(optimizer, "resumed") + f"--resume-from {left}").succeeded()
    assert_same_run(program.latest("resumed") / left.name, whole(schedule, optimizer))
    assert not any(name.endswith(".part") for name in program.names(left.parent))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_training_killed_in_every_epoch_is_resumed_bit_for_bit(program, whole, schedule):
    program.write("schedule.yaml", SCHEDULES[schedule])
    flags = "--seed 11"
    for epoch in range(1, EPOCHS):
        out = f"killed{epoch}"
        killed = program.run(command("sgd", out) + flags, kill=("torch.optim:Optimizer.zero_grad", STEPS + 3))
        assert killed.status == -signal.SIGKILL
        left = program.latest(out) / "checkpoint.pth.tar"
        assert load(left)["epoch"] == epoch - 1
        flags = f"--resume-from {left}"
    program.run(command("sgd", "resumed") + flags).succeeded()
    assert_same_run(program.latest("resumed") / "checkpoint.pth.tar", whole(schedule, "sgd"))


def test_a_training_with_early_exits_killed_twice_is_resumed_bit_for_bit(program):
    """Their branches are thinned with the network; the checkpoint says where they are."""
    program.write("schedule.yaml", SCHEDULES["filters physically removed"])
    weights, layers = "--earlyexit-lossweights 0.2 0.3 ", "--earlyexit-layers relu1 relu2 "
    program.run(command("sgd", "whole") + weights + layers + "--seed 11").succeeded()
    flags = layers + "--seed 11"
    for epoch in (2, 4):
        killed = program.run(
            command("sgd", f"killed{epoch}") + weights + flags,
            kill=("torch.optim:Optimizer.zero_grad", 2 * STEPS + 3),
        )
        assert killed.status == -signal.SIGKILL
        left = program.latest(f"killed{epoch}") / "checkpoint.pth.tar"
        assert load(left)["epoch"] == epoch - 1
        assert [exit["layer"] for exit in load(left)["early_exits"]] == ["relu1", "relu2"]
        flags = f"--resume-from {left}"
    program.run(command("sgd", "resumed") + weights + flags).succeeded()
    assert_same_run(*(program.latest(out) / "checkpoint.pth.tar" for out in ("resumed", "whole")))


def test_a_kill_from_outside_at_no_chosen_moment(program, whole):
    schedule = "agp and exponential decay"
    program.write("schedule.yaml", SCHEDULES[schedule])
    running = program.start(command("sgd", "out") + "--seed 11")
    running.wait_for("Epoch: [2]")
    running.signal(signal.SIGKILL)
    assert running.wait().status == -signal.SIGKILL
    left = program.latest("out") / "checkpoint.pth.tar"
    program.run(command("sgd", "resumed") + f"--resume-from {left}").succeeded()
    assert_same_run(program.latest("resumed") / left.name, whole(schedule, "sgd"))


DATA_THAT_DRAWS = """
import random

import numpy
import torch


class Noisy(torch.utils.data.Dataset):
    def __init__(self, count):
        self.targets = [index % 3 for index in range(count)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        noise = random.random() + float(numpy.random.rand())
        return torch.rand(1, 8, 8) + noise + self.targets[index], self.targets[index]


def noisy(folder):
    torch.rand(1), random.random()
    return Noisy(60), Noisy(10)
"""


def test_a_data_set_of_the_users_own_that_draws_random_numbers_disturbs_no_resume(program):
    program.write("mine.py", DATA_THAT_DRAWS)
    train = "--arch nets:Tiny --dataset mine:noisy -b 8 --epochs 4 --lr 0.05 "
    program.run(train + "-j 0 --seed 5 -o whole").succeeded()
    killed = program.run(
        train + "-j 2 --seed 5 -o out", kill=("torch.optim:Optimizer.zero_grad", 2 * STEPS + 3)
    )
    assert killed.status == -signal.SIGKILL
    left = program.latest("out") / "checkpoint.pth.tar"
    program.run(train + f"-j 1 -o resumed --resume-from {left}").succeeded()
    assert_same_run(program.latest("resumed") / left.name, program.latest("whole") / left.name)


def test_a_kill_while_the_first_checkpoint_is_written_leaves_none(program):
    program.write("schedule.yaml", "policies: []\n")
    killed = program.run(command("sgd", "out"), kill=("os:fsync", 3))
    assert killed.status == -signal.SIGKILL
    names = program.names(program.latest("out"))
    assert "checkpoint.pth.tar" not in names
    assert any(name.endswith(".part") for name in names)


SWEEP = TINY + "--sense element --sense-range 0 0.9 0.3 --etes 0.3 --exp-load-weights-from "


@pytest.fixture(scope="module")
def whole_sweep(server, trained, tmp_path_factory) -> bytes:
    """The CSV of a sweep that was not interrupted: 3 parameters at 4 levels."""
    program = make_program(server, tmp_path_factory.mktemp("sweep"))
    program.run(SWEEP + f"{trained} -o out").succeeded()
    return (program.latest("out") / "sensitivity.csv").read_bytes()


@pytest.mark.parametrize(
    "kill, blocks_again",
    [
        (("distiller.sensitivity.folder:SweepFolder.append", 1), 4),
        (("distiller.sensitivity.folder:SweepFolder.append", 3), 2),
        (("distiller.sensitivity.block_engine:BlockEngine.run", 2), 3),
        (("distiller.sensitivity.folder:SweepFolder.complete", 1), 0),
        (("pathlib:Path.unlink", 1), None),
        (("distiller.apputils.sensitivity_job:plot_points", 1), 0),
    ],
)
def test_a_killed_sweep_is_resumed_to_the_same_bytes(program, trained, whole_sweep, kill, blocks_again):
    assert program.run(SWEEP + f"{trained} -o out", kill=kill).status == -signal.SIGKILL
    left = program.latest("out")
    done = program.run(SWEEP + f"{trained} --sense-resume {left}").succeeded()
    assert blocks_again in (None, done.out.count("blocks of images"))
    assert (left / "sensitivity.csv").read_bytes() == whole_sweep
    assert program.names(left) == {
        "LOG", "sensitivity.csv", "sensitivity.json", "sensitivity.png", "sensitivity.svg",
    }  # fmt: skip


def test_a_line_that_a_killed_sweep_left_unfinished_is_measured_again(program, trained, whole_sweep):
    kill = ("distiller.sensitivity.folder:SweepFolder.append", 3)
    program.run(SWEEP + f"{trained} -o out", kill=kill)
    file = program.latest("out") / "sensitivity.blocks"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) - 7])
    done = program.run(SWEEP + f"{trained} --sense-resume {file.parent}").succeeded()
    assert done.out.count("blocks of images") == 3
    assert (file.parent / "sensitivity.csv").read_bytes() == whole_sweep
