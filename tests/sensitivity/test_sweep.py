"""A sweep from a model and images to a file."""

from __future__ import annotations

import copy
import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from distiller.apputils.meters import ClassificationMeter
from distiller.errors import SensitivityError, UnknownNameError, UsageError
from distiller.sensitivity import (
    AxisContext,
    AxisRequest,
    TensorBlocks,
    input_ranges,
    perform_sensitivity_analysis,
    points_from_csv,
    random_order,
    sensitivity_sweep,
)
from distiller.sensitivity.axes import AXES
from distiller.sensitivity.block_engine import BlockEngine
from distiller.sensitivity.block_pool import BlockPool
from distiller.sensitivity.curves import curves_by_axis
from tests.replay.networks import images, make

X = images(50)
Y = torch.randint(10, (50,), generator=torch.Generator().manual_seed(3))
KILLED_SWEEP = Path(__file__).with_name("killed_sweep.py")
ROOT = Path(__file__).resolve().parents[2]


def data(order=None):
    return TensorBlocks(X, Y, 16, "fifty", order)


def evaluate(*, model):
    meter = ClassificationMeter()
    with torch.no_grad():
        for x, y in zip(X.split(16), Y.split(16), strict=True):
            logits = model(x)
            meter.update(logits, y, nn.functional.cross_entropy(logits, y))
    result = meter.result()
    return result.top1, result.top5, result.loss


@pytest.fixture
def net():
    return make("Residual")


def context_of(net):
    return AxisContext(dummy_input=X[:1], activation_ranges=input_ranges(net, [X]))


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("distiller")]


def test_all_axes_in_one_run_give_what_the_plain_loop_gives(net, tmp_path):
    context = context_of(net)
    points = sensitivity_sweep(net, [AxisRequest(name) for name in AXES], data(), tmp_path, context=context)

    curves = curves_by_axis(points)
    assert list(curves) == list(AXES)
    for name, axis in AXES.items():
        levels = [axis.dense_level, *axis.default_levels(context)]
        expected = perform_sensitivity_analysis(net, ["*"], levels, evaluate, name, context)
        assert list(curves[name]) == list(expected)
        for parameter, points_of in expected.items():
            assert list(curves[name][parameter]) == list(points_of)
            for level, score in points_of.items():
                found = curves[name][parameter][level]
                assert found[:2] == score[:2], (name, parameter, level)
                assert found.loss == pytest.approx(score.loss, abs=1e-5)
    assert points_from_csv(tmp_path / "sensitivity.csv") == points
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sensitivity.csv", "sensitivity.json"]


def test_groups_say_what_they_remove(net, tmp_path):
    points = sensitivity_sweep(net, [AxisRequest("group", (0.5,))], data(), tmp_path)
    assert all("of 8 channels of" in point.removed for point in points if point.level == 0.5)


def test_a_finished_sweep_is_not_run_again(net, tmp_path, monkeypatch):
    first = sensitivity_sweep(net, [AxisRequest("element", (0.5,))], data(), tmp_path)
    monkeypatch.setattr(BlockEngine, "run", lambda *args: pytest.fail("run again"))
    assert sensitivity_sweep(net, [AxisRequest("element", (0.5,))], data(), tmp_path) == first


@pytest.mark.parametrize("failing", range(1, 5))
def test_a_sweep_that_failed_anywhere_goes_on_with_the_block_it_failed_at(
    net, tmp_path, monkeypatch, failing
):
    request = [AxisRequest("channel", (0.25, 0.5))]
    straight = sensitivity_sweep(net, request, data(), tmp_path / "straight")
    run, calls = BlockEngine.run, []

    def fail_once(self, *args):
        calls.append(1)
        if len(calls) == failing:
            raise RuntimeError("out of memory")
        return run(self, *args)

    monkeypatch.setattr(BlockEngine, "run", fail_once)
    with pytest.raises(RuntimeError):
        sensitivity_sweep(net, request, data(), tmp_path / "failed")
    progress = []
    resumed = sensitivity_sweep(net, request, data(), tmp_path / "failed", on_progress=progress.append)
    assert resumed == straight
    assert len(calls) == 5
    assert [(p.blocks, p.of_blocks, p.new_blocks) for p in progress] == [
        (failing + i, 4, i + 1) for i in range(5 - failing)
    ]
    assert (progress[-1].points, progress[-1].of_points) == (len(straight), len(straight))


def test_with_an_error_intervals_hold_and_fewer_images_are_looked_at(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    many = images(4000, seed=5)
    with torch.no_grad():
        labels = net(many).argmax(1)
    levels = (0.01, 0.1, 0.5, 0.9)
    request = [AxisRequest("element", levels)]
    exact = sensitivity_sweep(net, request, TensorBlocks(many, labels, 100, "many"), tmp_path / "exact")
    order = random_order(4000)
    data = TensorBlocks(many, labels, 100, "many", order)
    found = sensitivity_sweep(net, request, data, tmp_path / "error", error=2.0)
    assert [(p.level, p.n) for p in found if p.n == 4000] == [(0.0, 4000)]
    assert found[0].score == pytest.approx(exact[0].score)
    for point, whole in zip(found[1:], exact[1:], strict=True):
        assert point.top1_low <= whole.score.top1 <= point.top1_high
        assert point.score.loss == pytest.approx(whole.score.loss, rel=0.2)
        assert abs(point.score.top5 - whole.score.top5) < 5
    assert points_from_csv(tmp_path / "error" / "sensitivity.csv") == found


@pytest.mark.parametrize("error", [None, 5.0])
def test_two_processes_write_the_same_file(quick_start, net, tmp_path, error):
    request = [AxisRequest("element", (0.3, 0.7)), AxisRequest("rank", (0.5,))]
    for jobs in (1, 2):
        folder = tmp_path / str(jobs)
        sensitivity_sweep(net, request, data(random_order(50)), folder, error=error, jobs=jobs)
    first, second = ((tmp_path / str(jobs) / "sensitivity.csv").read_bytes() for jobs in (1, 2))
    assert first == second


def test_a_sweep_goes_on_with_the_processes_it_began_with(net, tmp_path, monkeypatch):
    """What a block is run on depends on how many there are."""
    request = [AxisRequest("element", (0.3, 0.7))]
    settings = tmp_path / "sensitivity.json"
    run, calls = BlockEngine.run, []

    def fail_once(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return run(self, *args)

    monkeypatch.setattr(BlockEngine, "run", fail_once)
    with pytest.raises(RuntimeError):
        sensitivity_sweep(net, request, data(), tmp_path, jobs=1)
    plain = json.loads(settings.read_text())
    assert plain["jobs"] == 1
    settings.write_text(json.dumps({**plain, "jobs": 2}))
    asked = []

    def pool(model, units, engine, jobs):
        asked.append(jobs)
        return BlockPool(model, units, engine, 1)

    monkeypatch.setattr("distiller.sensitivity.sweep.BlockPool", pool)
    sensitivity_sweep(net, request, data(), tmp_path, jobs=None)
    assert asked == [2]


def test_where_images_influence_each_other_counts_are_those_of_whole_blocks(tmp_path, caplog):
    net = make("Mixing")
    points = sensitivity_sweep(net, [AxisRequest("element")], data(), tmp_path)
    expected = perform_sensitivity_analysis(
        net, ["*"], AXES["element"].levels(0, 0.95, 0.05), evaluate, "element"
    )
    curves = curves_by_axis(points)["element"]
    assert {(name, level): score for name, curve in curves.items() for level, score in curve.items()} == {
        (name, level): (score[0], score[1], pytest.approx(score[2]))
        for name, curve in expected.items()
        for level, score in curve.items()
    }
    (warning,) = told(caplog)
    assert warning.startswith(
        "all 3 curves: run as a whole for every level, which takes longer: images of a block influence each other"
    )


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(
    "name, why",
    [
        ("Scaling", "Scaling: changes the images that it is given"),
        (
            "Remembering",
            "Remembering: changes its own buffers in evaluation, which are put back each time",
        ),
    ],
)
def test_a_network_that_changes_its_images_or_itself_is_run_anew_for_every_point(
    quick_start, tmp_path, caplog, name, why, jobs
):
    net = make(name)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    images_before = X.clone()
    points = sensitivity_sweep(net, [AxisRequest("element", (0.3, 0.8))], data(), tmp_path, jobs=jobs)

    def by_blocks(*, model):
        results = []
        for x, y in zip(X.split(16), Y.split(16), strict=True):
            fresh = copy.deepcopy(model)
            with torch.no_grad():
                logits = fresh(x.clone())
            results.append((logits, y))
        meter = ClassificationMeter()
        for logits, y in results:
            meter.update(logits, y, nn.functional.cross_entropy(logits, y))
        result = meter.result()
        return result.top1, result.top5, result.loss

    expected = perform_sensitivity_analysis(net, ["*"], (0.0, 0.3, 0.8), by_blocks, "element")
    for point in points:
        score = expected[point.parameter][point.level]
        assert point.score[:2] == score[:2], (point.parameter, point.level)
        assert point.score.loss == pytest.approx(score.loss, abs=1e-5)
    assert len({point.score for point in points}) > 3
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(images_before, X)
    (warning,) = told(caplog)
    assert f"which takes longer: {why}; it is run as a whole instead" in warning


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("name, operation", [("Signs", "sign"), ("FourBits", "round")])
def test_a_network_that_rounds_is_told_of_and_measured_bit_for_bit(
    quick_start, tmp_path, caplog, name, operation, jobs
):
    net = make(name)
    points = sensitivity_sweep(net, [AxisRequest("element", (0.3, 0.8))], data(), tmp_path, jobs=jobs)
    expected = perform_sensitivity_analysis(net, ["*"], (0.0, 0.3, 0.8), evaluate, "element")
    assert curves_by_axis(points)["element"] == expected
    assert told(caplog) == [
        f"the network itself rounds, compares or chooses ({operation}), where a last bit counts: every level "
        "is run bit for bit as the whole network is, which takes longer"
    ]


def test_units_that_cannot_be_cut_are_told_and_measured_all_the_same(tmp_path, caplog):
    net = make("Tied")
    context = AxisContext(activation_ranges=input_ranges(net, [X]))
    request = [AxisRequest("activation-bits", (4.0,))]
    points = sensitivity_sweep(net, request, data(), tmp_path, context=context)
    expected = perform_sensitivity_analysis(net, ["*"], (32.0, 4.0), evaluate, "activation-bits", context)
    assert curves_by_axis(points)["activation-bits"] == {
        name: {level: (score[0], score[1], pytest.approx(score[2])) for level, score in curve.items()}
        for name, curve in expected.items()
    }
    assert told(caplog) == [
        "activation-bits, again.weight: run as a whole for every level, which takes longer: "
        "'again' is 2 convolutions or linear layers, one that is run once expected"
    ]


def test_fast_says_how_many_decisions_it_changed(net, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("distiller.sensitivity.tuning._is_faster", lambda *args: True)
    points = sensitivity_sweep(net, [AxisRequest("element", (0.5,))], data(), tmp_path, fast=True)
    assert points[0].score.top1 == evaluate(model=net)[0]
    assert len(told(caplog)) == 1
    assert told(caplog)[0].startswith("fast: in bfloat16 the dense model answers ")
    assert told(caplog)[0].endswith(" of 50 images otherwise")


def test_fast_says_when_there_is_nothing_faster(net, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("distiller.sensitivity.tuning._is_faster", lambda *args: False)
    sensitivity_sweep(net, [AxisRequest("element", (0.5,))], data(), tmp_path, fast=True)
    assert told(caplog) == [
        "fast: bfloat16 was not used: it is not faster on this machine, or only inputs are rounded; every decision "
        "is exact"
    ]


@pytest.mark.parametrize(
    "axes, kind, message",
    [
        ([AxisRequest("elements")], UnknownNameError, "sensitivity: unknown axis 'elements'"),
        (
            [AxisRequest("element"), AxisRequest("element")],
            UsageError,
            "axis 'element' is there twice; name it once",
        ),
        ([], UsageError, "sensitivity: no axis to sweep along; give one"),
        (
            [AxisRequest("element", (0.0,))],
            UsageError,
            "has no level to measure but the dense one, 0; give others",
        ),
        (
            [AxisRequest("filter", None, ("fc.*",))],
            UsageError,
            "takes convolution weights of several filters",
        ),
        ([AxisRequest("activation-bits")], UsageError, "activation"),
    ],
)
def test_what_cannot_be_swept_is_refused_and_leaves_no_file(net, tmp_path, axes, kind, message):
    with pytest.raises(kind) as raised:
        sensitivity_sweep(net, axes, data(), tmp_path)
    assert message in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_another_model_is_refused(net, tmp_path):
    request = [AxisRequest("element", (0.5,))]
    sensitivity_sweep(net, request, data(), tmp_path)
    with torch.no_grad():
        net.norm.running_mean += 1
    with pytest.raises(SensitivityError, match="the folder holds another sweep, weights: "):
        sensitivity_sweep(net, request, data(), tmp_path)


def test_the_model_comes_back_bit_for_bit_and_in_its_modes(net, tmp_path):
    net.train()
    net.norm1.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    sensitivity_sweep(net, [AxisRequest("element", (0.5,)), AxisRequest("group", (0.5,))], data(), tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert not net.norm1.training


def killed(folder, error, *moments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        str(KILLED_SWEEP),
        str(folder),
        "exact" if error is None else str(error),
        *moments,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("error", [None, 30.0])
def test_a_sweep_killed_ten_times_ends_in_the_same_file_as_an_uninterrupted_one(tmp_path, error):
    """At the beginning of blocks, in the middle of lines, and whenever it happens to be."""
    script = runpy.run_path(str(KILLED_SWEEP))
    folder = tmp_path / "killed"
    generator = random.Random(7)
    moments = [f"{generator.uniform(0.05, 1.5):.2f}" for _ in range(6)]
    killed(folder, error, *moments[:3], "block:2", "write:1", "block:1", "write:2", *moments[3:])
    resumed = script["sweep"](str(folder), error)
    straight = tmp_path / "straight"
    assert script["sweep"](str(straight), error) == resumed
    assert any(point.n < 96 for point in resumed) == (error is not None)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in straight.iterdir()
    }
