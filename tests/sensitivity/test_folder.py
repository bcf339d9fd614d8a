from __future__ import annotations

import errno
import gc
import json
import os
import platform
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from distiller.errors import SensitivityError
from distiller.sensitivity.block_engine import BlockScores, EngineSettings
from distiller.sensitivity.curves import Score, SensitivityPoint
from distiller.sensitivity.decisions import Tally
from distiller.sensitivity.folder import SweepFolder, SweepSettings, SweptAxis

ELEMENT = SweptAxis("element", (0.0, 0.5), ("a.weight", "b.weight"))
SETTINGS = SweepSettings(
    (ELEMENT,),
    "f" * 64,
    "100 of digits",
    10,
    context={"block": 4, "activation_ranges": {"a": [0.0, 1.0]}},
)
REMEDY = "give another folder, or empty this one to start afresh"
BLOCKS = [
    BlockScores(
        Tally(10, 9, 10, 1.25), {(0, 0): Tally(10, 8, 10, 0.1 + 0.2, 1, 0), (1, 0): Tally(10, 1, 5, 9.0, 8)}
    ),
    BlockScores(Tally(7, 7, 7, 0.5), {(1, 0): Tally(7, 0, 1, float("inf"), 7)}, flipped=2),
]
POINTS = [
    SensitivityPoint("element", name, level, Score(90.0, 99.0, 0.25), 17, 12, 15)
    for name in ELEMENT.parameters
    for level in ELEMENT.levels
]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def swept(folder):
    with SweepFolder(folder, SETTINGS) as files:
        for index, scores in enumerate(BLOCKS):
            files.append(index, scores)


def test_blocks_are_taken_up_as_they_were(tmp_path):
    swept(tmp_path)
    with SweepFolder(tmp_path, SETTINGS) as files:
        assert files.blocks == {0: BLOCKS[0], 1: BLOCKS[1]}
        assert files.finished() is None


def test_a_file_torn_at_any_byte_loses_the_last_block_only(tmp_path):
    swept(tmp_path)
    path = tmp_path / "sensitivity.blocks"
    whole = path.read_bytes()
    for torn in range(len(whole) + 1):
        path.write_bytes(whole[:torn])
        with SweepFolder(tmp_path, SETTINGS) as files:
            assert len(files.blocks) == max(0, whole[:torn].count(b"\n") - 1)
            for index, scores in enumerate(BLOCKS):
                if index not in files.blocks:
                    files.append(index, scores)
        assert path.read_bytes() == whole


def test_settings_are_plain_json_with_how_blocks_are_run(tmp_path):
    with SweepFolder(tmp_path / "new" / "folder", SETTINGS) as files:
        assert files.engine is None
        assert files.jobs is None
        files.choose(EngineSettings(32, True, whole={1: "no cut"}), 2)
    assert json.loads((tmp_path / "new" / "folder" / "sensitivity.json").read_text()) == {
        "axes": [{"axis": "element", "levels": [0.0, 0.5], "parameters": ["a.weight", "b.weight"]}],
        "weights": "f" * 64,
        "test_images": "100 of digits",
        "batch_size": 10,
        "error": None,
        "fast": False,
        "context": {"block": 4, "activation_ranges": {"a": [0.0, 1.0]}},
        "version": 3,
        "engine": {"chunk": 32, "channels_last": True, "bfloat16": False, "whole": {"1": "no cut"}},
        "jobs": 2,
    }
    with SweepFolder(tmp_path / "new" / "folder", SETTINGS) as files:
        assert files.engine == EngineSettings(32, True, whole={1: "no cut"})
        assert files.jobs == 2


def test_a_complete_sweep_is_its_points(tmp_path):
    swept(tmp_path)
    with SweepFolder(tmp_path, SETTINGS) as files:
        files.write(POINTS[:2])
        assert files.finished() is None
        files.complete(POINTS)
    assert set(files_of(tmp_path)) == {"sensitivity.csv", "sensitivity.json"}
    assert SweepFolder(tmp_path, SETTINGS).finished() == POINTS


@pytest.mark.parametrize("lost", range(5))
def test_a_file_that_lost_points_is_of_no_finished_sweep(tmp_path, lost):
    with SweepFolder(tmp_path, SETTINGS) as files:
        files.complete(POINTS)
    lines = files.path.read_text().splitlines(keepends=True)
    files.path.write_text("".join(lines[: len(lines) - lost]))
    assert (SweepFolder(tmp_path, SETTINGS).finished() is None) == (lost > 0)


def test_a_finished_file_that_is_damaged_names_a_way_out(tmp_path):
    with SweepFolder(tmp_path, SETTINGS) as files:
        files.complete(POINTS)
    text = files.path.read_text()
    files.path.write_text(text[: text.rindex(",")])
    with pytest.raises(SensitivityError) as error:
        SweepFolder(tmp_path, SETTINGS).finished()
    assert str(error.value).startswith(f"{files.path}:5: 13 columns expected, got ")
    assert str(error.value).endswith(f"; {REMEDY}")


def test_an_empty_folder_is_of_no_finished_sweep(tmp_path):
    assert SweepFolder(tmp_path, SETTINGS).finished() is None


@pytest.mark.parametrize(
    "change, difference",
    [
        ({"axes": (replace(ELEMENT, axis="filter"),)}, "axes: element there, filter asked for now"),
        (
            {"axes": (ELEMENT, SweptAxis("rank", (0.0, 0.5), ("a.weight",)))},
            "axes: element there, element, rank asked for now",
        ),
        ({"axes": (replace(ELEMENT, levels=(0.0, 0.5, 0.9)),)}, "levels of element: 0.9 only asked for now"),
        ({"axes": (replace(ELEMENT, levels=(0.5, 0.0)),)}, "levels of element: in another order"),
        (
            {"axes": (replace(ELEMENT, parameters=("a.weight",)),)},
            "parameters of element: b.weight only there",
        ),
        (
            {"axes": (replace(ELEMENT, parameters=tuple(f"p{i}" for i in range(5))),)},
            "parameters of element: a.weight, b.weight only there and p0, p1, p2 and 2 more only asked for now",
        ),
        ({"weights": "e" * 64}, "weights: ffffffffffff... there, eeeeeeeeeeee... asked for now"),
        (
            {"error": 0.5, "test_images": "7"},
            "test_images: 100 of digits there, 7 asked for now; error: nothing there, 0.5 asked for now",
        ),
        ({"batch_size": 20}, "batch_size: 10 there, 20 asked for now"),
        (
            {"context": {"block": 2, "activation_ranges": {"a": [0.0, 2.0]}}},
            "block: 4 there, 2 asked for now; "
            "activation_ranges: other ones there, which were measured on other images",
        ),
        (
            {"context": {"block": 4, "activation_ranges": None}},
            "activation_ranges: {'a': [0.0, 1.0]} there, nothing asked for now",
        ),
    ],
)
def test_a_folder_of_another_sweep_is_refused_and_left_alone(tmp_path, change, difference):
    swept(tmp_path)
    before = files_of(tmp_path)

    with pytest.raises(SensitivityError) as error:
        SweepFolder(tmp_path, replace(SETTINGS, **change))

    assert str(error.value) == (
        f"{tmp_path / 'sensitivity.json'}: the folder holds another sweep, {difference}; {REMEDY}"
    )
    assert files_of(tmp_path) == before


def test_a_sweep_of_an_older_program_is_refused(tmp_path):
    (tmp_path / "sensitivity.json").write_text('{"axis": "element", "weights": "f"}')
    with pytest.raises(SensitivityError) as error:
        SweepFolder(tmp_path, SETTINGS)
    assert str(error.value) == (
        f"{tmp_path / 'sensitivity.json'}: of another version of this program, which cannot be gone on with; {REMEDY}"
    )


@pytest.mark.parametrize("name", ["sensitivity.csv", "sensitivity.blocks"])
def test_results_without_settings_are_refused_and_left_alone(tmp_path, name):
    path = tmp_path / name
    path.write_text("x")

    with pytest.raises(SensitivityError) as error:
        SweepFolder(tmp_path, SETTINGS)

    assert str(error.value) == (
        f"{path}: is there without the sensitivity.json of a sweep that could be resumed; "
        "give another folder, or move it away"
    )
    assert files_of(tmp_path) == {name: b"x"}


@pytest.mark.parametrize("bit", range(8))
def test_a_block_with_any_bit_changed_is_refused_or_counts_as_torn(tmp_path, bit):
    swept(tmp_path)
    path = tmp_path / "sensitivity.blocks"
    whole = path.read_bytes()
    begin = whole.index(b"\n") + 1
    for at in range(begin, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        try:
            with SweepFolder(tmp_path, SETTINGS) as files:
                assert all(files.blocks[index] == BLOCKS[index] for index in files.blocks)
                assert at == len(whole) - 1  # the end of the last line, which is torn then
        except SensitivityError as error:
            assert str(error).startswith(f"{path}")  # noqa: PT017 - that it is raised is not asked for
            assert str(error).endswith(REMEDY)  # noqa: PT017


def test_a_block_that_is_there_twice_is_refused(tmp_path):
    swept(tmp_path)
    path = tmp_path / "sensitivity.blocks"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[1]]))

    with pytest.raises(SensitivityError) as error:
        SweepFolder(tmp_path, SETTINGS)

    assert str(error.value) == f"{path}, line 4: not a block of a sweep, block 0 is there twice; {REMEDY}"


def test_a_block_of_another_checksum_is_refused(tmp_path):
    swept(tmp_path)
    path = tmp_path / "sensitivity.blocks"
    path.write_text(path.read_text().replace("[10,9,10,1.25,0,0]", "[10,9,10,1.5,0,0]"))

    with pytest.raises(SensitivityError) as error:
        SweepFolder(tmp_path, SETTINGS)

    assert str(error.value) == f"{path}, line 2: not a block of a sweep, its checksum is another; {REMEDY}"


def test_a_binary_file_of_blocks_is_refused(tmp_path):
    swept(tmp_path)
    (tmp_path / "sensitivity.blocks").write_bytes(b"\xff\xfe\n")

    with pytest.raises(SensitivityError, match="not a CSV file, got binary data"):
        SweepFolder(tmp_path, SETTINGS)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_damaged_settings_are_refused(tmp_path, content):
    (tmp_path / "sensitivity.json").write_bytes(content)

    with pytest.raises(
        SensitivityError, match=r"sensitivity\.json: not the settings of a sweep, .*; give another"
    ):
        SweepFolder(tmp_path, SETTINGS)


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"chunk": "x"}, "chunk must be a number of images, at least 1, got 'x'"),
        ({"chunk": 0}, "chunk must be a number of images, at least 1, got 0"),
        ({"chunk": True}, "chunk must be a number of images, at least 1, got True"),
        ({"bfloat16": True}, "bfloat16 in a sweep that does not allow it"),
        ({"channels_last": 1}, "channels_last and bfloat16 must be true or false, got .*"),
        ({"whole": {"2": "why"}}, r"whole must name places of 2 curves, got \[2\]"),
        ({"whole": {"x": "why"}}, "invalid literal .*"),
        ({"whole": []}, ".* no attribute 'items'"),
    ],
)
def test_an_engine_that_no_sweep_has_is_refused(tmp_path, change, fault):
    SweepFolder(tmp_path, SETTINGS).choose(EngineSettings(32), 1)
    path = tmp_path / "sensitivity.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps({**plain, "engine": {**plain["engine"], **change}}))
    with pytest.raises(
        SensitivityError, match=rf"sensitivity\.json: engine: not the settings of one, {fault}; give another"
    ):
        SweepFolder(tmp_path, SETTINGS)


@pytest.mark.parametrize("jobs", [0, "two", True, 1.5])
def test_jobs_that_are_no_number_of_processes_are_refused(tmp_path, jobs):
    SweepFolder(tmp_path, SETTINGS).choose(EngineSettings(32), 1)
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "jobs": jobs}))
    with pytest.raises(SensitivityError) as raised:
        SweepFolder(tmp_path, SETTINGS)
    assert str(raised.value) == f"{path}: jobs: must be a number of processes, got {jobs}; {REMEDY}"


def test_a_folder_that_is_swept_into_is_refused_until_that_has_ended(tmp_path):
    with SweepFolder(tmp_path, SETTINGS) as files:
        files.append(0, BLOCKS[0])
        before = files_of(tmp_path)
        with pytest.raises(SensitivityError) as raised:
            SweepFolder(tmp_path, SETTINGS)
        assert str(raised.value) == (
            f"{tmp_path}: a sweep is running there; wait until it has ended, or give another folder"
        )
        assert files_of(tmp_path) == before
    with SweepFolder(tmp_path, SETTINGS) as files:
        assert files.blocks == {0: BLOCKS[0]}


def test_processes_that_were_forked_meanwhile_do_not_keep_a_folder(tmp_path):
    """As workers that read images, which live on for seconds when a sweep is killed."""
    with SweepFolder(tmp_path, SETTINGS):
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(theirs, b"x")
            time.sleep(60)
            os._exit(0)
        assert os.read(ours, 1) == b"x"  # it runs
        with pytest.raises(SensitivityError, match="a sweep is running there"):
            SweepFolder(tmp_path, SETTINGS)
    try:
        SweepFolder(tmp_path, SETTINGS).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(ours)
        os.close(theirs)


@pytest.mark.parametrize("engine", [{}, []])
def test_an_engine_that_is_none_is_refused(tmp_path, engine):
    SweepFolder(tmp_path, SETTINGS).close()
    path = tmp_path / "sensitivity.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "engine": engine}))
    with pytest.raises(SensitivityError, match=r"sensitivity\.json: engine: not the settings of one, "):
        SweepFolder(tmp_path, SETTINGS)


def test_a_folder_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").touch()

    with pytest.raises(SensitivityError) as error:
        SweepFolder(tmp_path / "file" / "folder", SETTINGS)

    assert str(error.value) == f"{tmp_path}/file/folder/sensitivity.csv: cannot be written, Not a directory"


def test_a_disk_that_is_full_is_reported_once_and_keeps_the_blocks_before(tmp_path):
    with pytest.raises(SensitivityError) as error, SweepFolder(tmp_path, SETTINGS) as files:
        files.append(0, BLOCKS[0])
        files._file.close()
        files._file._file = Path("/dev/full").open("wb")  # noqa: SIM115 - the folder closes it
        files.append(1, BLOCKS[1])

    assert (
        str(error.value) == f"{tmp_path / 'sensitivity.blocks'}: cannot be written, No space left on device"
    )
    with SweepFolder(tmp_path, SETTINGS) as again:
        assert list(again.blocks) == [0]


def test_a_disk_that_is_full_from_the_beginning_leaves_no_open_file(tmp_path, monkeypatch):
    files = SweepFolder(tmp_path, SETTINGS)

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(SensitivityError, match="cannot be written, No space left on device"):
        files.append(0, BLOCKS[0])
    gc.collect()  # an open file would be a ResourceWarning, which is an error


def test_a_resumed_sweep_clears_the_folder_of_what_a_kill_left(tmp_path):
    SweepFolder(tmp_path, SETTINGS).close()
    stale = tmp_path / f"sensitivity.png.{platform.node().partition('.')[0]}.99999999.part"
    stale.touch()
    with pytest.raises(SensitivityError):
        SweepFolder(tmp_path, replace(SETTINGS, error=1.0))
    assert stale.exists()

    SweepFolder(tmp_path, SETTINGS).close()
    assert not stale.exists()
