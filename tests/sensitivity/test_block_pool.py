from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest
import torch
from torch import nn

from distiller.errors import DistillerError, SensitivityError, UsageError
from distiller.replay import Variant
from distiller.sensitivity.axes import AXES, AxisContext
from distiller.sensitivity.block_engine import EngineSettings
from distiller.sensitivity.block_pool import BlockPool, BlockTask
from distiller.sensitivity.units import Unit
from tests.replay.networks import images, make

ROOT = Path(__file__).resolve().parents[2]
X, Y = images(20), torch.arange(20) % 10
SETTINGS = EngineSettings(4, channels_last=True)


def tasks(active=None):
    return (BlockTask(i, x, y, active) for i, (x, y) in enumerate(zip(X.split(6), Y.split(6), strict=True)))


def run(model, units, given, jobs=1):
    with BlockPool(model, units, SETTINGS, jobs) as pool:
        yield from pool.run(given)


def units_of(model):
    return AXES["element"].units(model, ["*"], (0.3, 0.8), AxisContext())


def test_several_processes_say_what_one_says_of_what_is_wanted(quick_start):
    model = make("Residual").train()
    model.norm1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    alone, wanted_alone = (dict(run(model, units_of(model), tasks(active))) for active in (None, {(1, 0)}))
    assert_modes_came_back(model)
    with BlockPool(model, units_of(model), SETTINGS, jobs=2) as pool:
        together, wanted = (dict(pool.run(tasks(active))) for active in (None, {(1, 0)}))
        patient: dict = {}
        for index, scores in pool.run(one_after_another(patient)):
            patient.update({index: scores})
    assert_modes_came_back(model)
    assert list(patient) == [0, 1, 2, 3]
    assert patient == alone
    assert sorted(alone) == [0, 1, 2, 3]
    assert together == alone
    assert {tuple(block.points) for block in wanted.values()} == {((1, 0),)}
    assert wanted == wanted_alone
    assert multiprocessing.active_children() == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_images_of_any_type_reach_other_processes(quick_start):
    model = make("Residual").eval().bfloat16()
    given = [BlockTask(0, X.bfloat16(), Y, None), BlockTask(1, X[:3].bfloat16().mT, Y[:3], None)]
    alone, together = (dict(run(model, units_of(model), iter(given), jobs)) for jobs in (1, 2))
    assert sorted(together) == [0, 1]
    assert together == alone


def one_after_another(taken):
    """Tasks, each of which has to wait for the result of the one before."""
    for task in tasks():
        while len(taken) < task.index:
            yield None
        yield task


def assert_modes_came_back(model):
    assert model.training
    assert not model.norm1.training


def test_tasks_are_asked_for_when_there_is_room():
    asked = []

    def counted():
        for task in tasks():
            asked.append(task.index)
            yield task

    model = make("Plain")
    done = run(model, units_of(model), counted(), jobs=1)
    next(done)
    assert asked == [0]


def test_a_model_that_is_not_on_the_cpu_takes_one_process():
    model = make("Plain").to("meta")
    with pytest.raises(UsageError) as raised:
        BlockPool(model, [], SETTINGS, jobs=2)
    assert str(raised.value) == (
        "--sense-jobs 2: the model is on meta, where one process takes all there is; give --sense-jobs 1"
    )


class Failing:
    def __call__(self, level):
        raise DistillerError("sensitivity of 'fc.weight': holds NaN")


class Dying:
    """Ends the process, as the kernel does when memory is short."""

    def __call__(self, level):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_is_wrong_with_a_unit_is_told(quick_start, jobs):
    model = make("Plain")
    unit = Unit("element", "fc1.weight", (0.5,), Failing(), ("fc1.weight",))
    with pytest.raises(DistillerError) as raised:
        list(run(model, [unit], tasks(), jobs))
    assert str(raised.value) == "sensitivity of 'fc.weight': holds NaN"


def test_a_process_that_is_killed_is_told(quick_start):
    unit = Unit("element", "fc1.weight", (0.5,), Dying(), ("fc1.weight",))
    with pytest.raises(SensitivityError) as raised:
        list(run(make("Plain"), [unit], tasks(), jobs=2))
    assert str(raised.value) == (
        "sensitivity: a process was killed, out of memory perhaps; what was measured is kept: go on with fewer "
        "--sense-jobs"
    )


class ReadingNothing:
    """Fails as a user's code does whose file is gone."""

    def __call__(self, level):
        raise FileNotFoundError(2, "gone", "table.npy")


def test_an_error_of_the_users_code_is_not_taken_for_a_finished_process(capfd):
    unit = Unit("element", "fc1.weight", (0.5,), ReadingNothing(), ("fc1.weight",))
    with pytest.raises(SensitivityError) as raised:
        list(run(make("Plain"), [unit], tasks(), jobs=2))
    assert str(raised.value) == (
        "sensitivity: a process ended with exit status 1, and its own message if it had one; what was measured is "
        "kept: go on when that is mended, or with --sense-jobs 1"
    )
    assert "FileNotFoundError: [Errno 2] gone: 'table.npy'" in capfd.readouterr().err


def test_a_model_that_cannot_be_copied_is_refused():
    class Local(nn.Linear):
        """Cannot be pickled."""

    with pytest.raises(UsageError, match=r"^--sense-jobs: the model cannot be copied into other processes, "):
        list(run(Local(2, 2), [Unit("x", "weight", (1.0,), Variant)], tasks(), jobs=2))


class Unreadable(nn.Linear):
    """Can be written, and not read."""

    def __setstate__(self, state):
        raise ValueError("no")


def test_a_model_that_other_processes_cannot_read_is_refused(quick_start):
    with pytest.raises(UsageError) as raised:
        list(run(Unreadable(2, 2), [Unit("x", "weight", (1.0,), Variant)], tasks(), jobs=2))
    assert str(raised.value) == (
        "--sense-jobs: the model cannot be copied into other processes, ValueError: no; give --sense-jobs 1"
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the masks of signals are read from /proc")
def test_processes_never_get_an_interruption():
    model = make("Plain")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with BlockPool(model, units_of(model), SETTINGS, jobs=2):
        for child in multiprocessing.active_children():
            status = Path(f"/proc/{child.pid}/status").read_text().splitlines()
            blocked = next(int(line.split()[1], 16) for line in status if line.startswith("SigBlk"))
            assert blocked & 1 << signal.SIGINT - 1
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


@pytest.mark.parametrize("to_all", [True, False])
def test_an_interruption_while_processes_start_ends_them_without_a_word_of_theirs(to_all):
    command = [sys.executable, "-m", "tests.sensitivity.interrupted_start"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"starting\n"
    time.sleep(0.5)
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
    _, errors = process.communicate(
        timeout=60
    )  # until nobody holds its end of the pipe, processes of it included
    assert process.returncode == -signal.SIGINT
    assert errors.count(b"Traceback") == 1
    assert errors.endswith(b"KeyboardInterrupt\n")


@pytest.mark.parametrize(
    "before, meanwhile",
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=3", "glibc.malloc.check=3:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_processes_ask_for_huge_pages_unless_told_otherwise(monkeypatch, before, meanwhile):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if before is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", before)
    seen = []
    monkeypatch.setattr(SpawnProcess, "start", lambda self: seen.append(os.environ["GLIBC_TUNABLES"]))
    monkeypatch.setattr(SpawnProcess, "terminate", lambda self: None)
    monkeypatch.setattr(SpawnProcess, "join", lambda self, timeout=None: None)
    monkeypatch.setattr(SpawnProcess, "exitcode", 0)
    model = make("Plain")
    BlockPool(model, units_of(model), SETTINGS, jobs=2).close()
    assert seen == [meanwhile, meanwhile]
    assert os.environ.get("GLIBC_TUNABLES") == before
