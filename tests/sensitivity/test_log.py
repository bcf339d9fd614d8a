import errno
import gc
import json
import os
import platform
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from distiller.errors import SensitivityError
from distiller.sensitivity.curves import Score, SensitivityPoint
from distiller.sensitivity.log import SensitivityLog, SweepSettings, weights_fingerprint
from distiller.sensitivity.sweep import sensitivity_sweep

SETTINGS = SweepSettings("element", (0.0, 0.5), ("a.weight", "b.weight"), "f" * 64, 100)
REMEDY = "give another folder, or remove both files to start afresh"
HEADER = "parameter,sparsity,top1,top5,loss\n"
KILLED_SWEEP = Path(__file__).with_name("killed_sweep.py")


def point(name, level, top1=90.0):
    return SensitivityPoint(name, level, Score(top1, 99.0, 0.25))


ALL_POINTS = [point(name, level) for name in SETTINGS.parameters for level in SETTINGS.levels]
ALL_LINES = HEADER + "".join(f"{p.parameter},{p.level},90.0,99.0,0.25\n" for p in ALL_POINTS)


def test_every_point_is_in_the_file_at_once(tmp_path):
    log = SensitivityLog(tmp_path, SETTINGS)
    for count, one in enumerate(ALL_POINTS, start=1):
        log.append(one)
        assert log.path.read_text() == "".join(ALL_LINES.splitlines(keepends=True)[: count + 1])
    log.close()


def test_settings_are_beside_the_points_in_plain_json(tmp_path):
    SensitivityLog(tmp_path / "new" / "folder", SETTINGS).close()

    assert json.loads((tmp_path / "new" / "folder" / "sensitivity.json").read_text()) == {
        "axis": "element",
        "levels": [0.0, 0.5],
        "parameters": ["a.weight", "b.weight"],
        "weights": "f" * 64,
        "test_images": 100,
    }


def test_a_log_torn_at_any_byte_is_completed_to_the_same_file(tmp_path):
    SensitivityLog(tmp_path, SETTINGS).close()
    for torn in range(len(ALL_LINES) + 1):
        (tmp_path / "sensitivity.csv").write_text(ALL_LINES[:torn])

        with SensitivityLog(tmp_path, SETTINGS) as log:
            assert len(log.finished) == max(0, ALL_LINES[:torn].count("\n") - 1)
            for one in ALL_POINTS:
                if (one.parameter, one.level) not in log.finished:
                    log.append(one)
            log.complete()

        assert log.path.read_text() == ALL_LINES


def test_a_kill_between_the_two_files_is_no_hindrance(tmp_path):
    SensitivityLog(tmp_path, SETTINGS).close()
    (tmp_path / "sensitivity.csv").unlink()

    with SensitivityLog(tmp_path, SETTINGS) as log:
        assert log.finished == {}


def test_complete_puts_the_points_in_order(tmp_path):
    with SensitivityLog(tmp_path, SETTINGS) as log:
        for one in reversed(ALL_POINTS):
            log.append(one)
        curves = log.complete()

    assert log.path.read_text() == ALL_LINES
    assert [(name, list(points)) for name, points in curves.items()] == [
        ("a.weight", [0.0, 0.5]),
        ("b.weight", [0.0, 0.5]),
    ]


@pytest.mark.parametrize(
    "change, difference",
    [
        ({"axis": "filter"}, "axis: element there, filter asked for now"),
        ({"levels": (0.0, 0.5, 0.9)}, "levels: 0.9 only asked for now"),
        ({"levels": (0.5, 0.0)}, "levels: in another order"),
        ({"parameters": ("a.weight",)}, "parameters: b.weight only there"),
        (
            {"parameters": tuple(f"p{i}" for i in range(5))},
            "parameters: a.weight, b.weight only there and p0, p1, p2 and 2 more only asked for now",
        ),
        ({"weights": "e" * 64}, "weights: ffffffffffff... there, eeeeeeeeeeee... asked for now"),
        (
            {"axis": "filter", "test_images": 7},
            "axis: element there, filter asked for now; test_images: 100 there, 7 asked for now",
        ),
    ],
)
def test_a_folder_of_another_sweep_is_refused_and_left_alone(tmp_path, change, difference):
    with SensitivityLog(tmp_path, SETTINGS) as log:
        log.append(ALL_POINTS[0])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    with pytest.raises(SensitivityError) as error:
        SensitivityLog(tmp_path, replace(SETTINGS, **change))

    assert str(error.value) == (
        f"{tmp_path / 'sensitivity.json'}: the folder holds another sweep, {difference}; {REMEDY}"
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_csv_without_settings_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "sensitivity.csv"
    path.write_text(ALL_LINES)

    with pytest.raises(SensitivityError) as error:
        SensitivityLog(tmp_path, SETTINGS)

    assert str(error.value) == (
        f"{path}: is there without the sensitivity.json of a sweep that could be resumed; "
        "give another folder, or move it away"
    )
    assert path.read_text() == ALL_LINES
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "line, fault",
    [
        ("a.weight,0.5,91\n", "sensitivity.csv:2: 5 columns expected, got 'a.weight,0.5,91'"),
        ("c.weight,0.5,91,99,1\n", f"sensitivity.csv: 'c.weight' at 0.5 is no point of the sweep in sensitivity.json; {REMEDY}"),
        ("a.weight,0.7,91,99,1\n", f"sensitivity.csv: 'a.weight' at 0.7 is no point of the sweep in sensitivity.json; {REMEDY}"),
    ],
)  # fmt: skip
def test_a_damaged_log_is_refused(tmp_path, line, fault):
    SensitivityLog(tmp_path, SETTINGS).close()
    (tmp_path / "sensitivity.csv").write_text(HEADER + line)

    with pytest.raises(SensitivityError) as error:
        SensitivityLog(tmp_path, SETTINGS)

    assert str(error.value) == f"{tmp_path}/{fault}"


def test_a_binary_log_is_refused(tmp_path):
    SensitivityLog(tmp_path, SETTINGS).close()
    (tmp_path / "sensitivity.csv").write_bytes(b"\xff\xfe\n")

    with pytest.raises(SensitivityError) as error:
        SensitivityLog(tmp_path, SETTINGS)

    assert str(error.value) == f"{tmp_path / 'sensitivity.csv'}: not a CSV file, got binary data; {REMEDY}"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_damaged_settings_are_refused(tmp_path, content):
    (tmp_path / "sensitivity.json").write_bytes(content)

    with pytest.raises(
        SensitivityError, match=r"sensitivity\.json: not the settings of a sweep, .*; give another"
    ):
        SensitivityLog(tmp_path, SETTINGS)


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(SensitivityError) as error:
        SensitivityLog(tmp_path / "file" / "folder", SETTINGS)

    assert str(error.value) == f"{tmp_path}/file/folder/sensitivity.csv: cannot be written, Not a directory"


def test_a_disk_that_is_full_is_reported_once_and_keeps_the_points_before(tmp_path):
    with pytest.raises(SensitivityError) as error, SensitivityLog(tmp_path, SETTINGS) as log:
        log.append(ALL_POINTS[0])
        log.close()
        log._file._file = Path("/dev/full").open("wb")  # noqa: SIM115 - the log closes it
        log.append(ALL_POINTS[1])

    assert str(error.value) == f"{tmp_path / 'sensitivity.csv'}: cannot be written, No space left on device"
    assert log._file._file.closed
    with SensitivityLog(tmp_path, SETTINGS) as again:
        assert list(again.finished) == [("a.weight", 0.0)]


def test_a_disk_that_is_full_from_the_beginning_leaves_no_open_file(tmp_path, monkeypatch):
    SensitivityLog(tmp_path, SETTINGS).close()
    (tmp_path / "sensitivity.csv").unlink()

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(SensitivityError, match="cannot be written, No space left on device"):
        SensitivityLog(tmp_path, SETTINGS)
    gc.collect()  # an open file would be a ResourceWarning, which is an error


def test_a_resumed_sweep_clears_the_folder_of_what_a_kill_left(tmp_path, monkeypatch):
    SensitivityLog(tmp_path, SETTINGS).close()
    stale = tmp_path / f"sensitivity.png.{platform.node().partition('.')[0]}.99999999.part"
    stale.touch()
    with pytest.raises(SensitivityError):
        SensitivityLog(tmp_path, replace(SETTINGS, axis="filter"))
    assert stale.exists()

    SensitivityLog(tmp_path, SETTINGS).close()
    assert not stale.exists()


def test_fingerprint_is_that_of_the_weights_not_of_the_wrapper():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    fingerprint = weights_fingerprint(model)

    assert weights_fingerprint(nn.DataParallel(model)) == fingerprint
    assert weights_fingerprint(model.to(memory_format=torch.channels_last)) == fingerprint


@pytest.mark.parametrize("name", ["0.weight", "1.running_mean", "1.num_batches_tracked"])
def test_fingerprint_changes_with_a_single_bit(name):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    fingerprint = weights_fingerprint(model)

    flat = model.state_dict()[name].view(-1).view(torch.uint8)
    flat[0] ^= 1

    assert weights_fingerprint(model) != fingerprint


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fingerprint_takes_every_dtype(dtype):
    assert weights_fingerprint(nn.Linear(2, 2).to(dtype)) != weights_fingerprint(nn.Linear(2, 2))


def test_a_sweep_killed_twice_ends_in_the_same_files_as_an_uninterrupted_one(tmp_path):
    sweep = runpy.run_path(str(KILLED_SWEEP))
    model, levels, evaluate = sweep["make_model"](), sweep["LEVELS"], sweep["evaluate"]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    expected = sensitivity_sweep(model, "element", levels, evaluate, straight, test_images=10)

    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, str(KILLED_SWEEP), str(killed), "test:4", "write:2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (killed / "sensitivity.csv").read_bytes().endswith(b"\n")

    measured = []
    resumed = sensitivity_sweep(
        sweep["make_model"](),
        "element",
        levels,
        evaluate,
        killed,
        test_images=10,
        on_point=lambda *progress: measured.append(progress),
    )

    assert resumed == expected
    assert {path.name: path.read_bytes() for path in killed.iterdir()} == {
        path.name: path.read_bytes() for path in straight.iterdir()
    }
    # The first run leaves 3 of 8 points; the second adds the last of that parameter, and the dense point of
    # the other one for nothing, before its next line is torn.
    assert [(finished, total) for _, finished, total in measured] == [(6, 8), (7, 8), (8, 8)]
