from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from distiller import atomic_file
from distiller.atomic_file import remove_stale_parts, replacing, write_whole

HOST = platform.node().partition(".")[0]


def test_a_file_is_written_and_nothing_else_is_left(tmp_path):
    write_whole(tmp_path / "a.txt", "text")
    write_whole(tmp_path / "a.txt", b"bytes")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_bytes() == b"bytes"


def test_an_error_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_the_file_that_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "a.txt", tmp_path / "link.txt"
    write_whole(target, "old")
    link.symlink_to(target)
    write_whole(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_a_pipe_is_refused_and_stays_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="not an ordinary file"):
        write_whole(pipe, "text")
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize("name", [".", "folder"])
def test_a_folder_is_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / name, "text")


def test_a_name_that_the_file_system_refuses_is_told_as_such(tmp_path):
    with pytest.raises(OSError, match="File name too long"):
        write_whole(tmp_path / ("x" * 300), "text")


def killed_writer(path):
    """Start to write and be killed; returns the process id."""
    program = (
        "import os, runpy, signal, sys; replacing = runpy.run_path(sys.argv[1])['replacing']\n"  # without torch
        "with replacing(sys.argv[2]) as file:\n"
        "    file.write(b'half'); file.flush(); print(os.getpid(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", program, atomic_file.__file__, str(path)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE)
    assert done.returncode == -9
    return int(done.stdout)


def test_a_kill_while_writing_leaves_the_old_file_and_the_next_write_cleans_up(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    killed_writer(path)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    write_whole(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "none" / "a.txt", "x")


def test_a_folder_is_cleared_of_what_killed_processes_left_and_of_nothing_else(tmp_path):
    dead = killed_writer(tmp_path / "a.bin")
    assert [path.name for path in tmp_path.iterdir()] == [f"a.bin.{HOST}.{dead}.part"]
    others = {
        f"a.bin.{HOST}.{os.getpid()}.part",  # of a process that runs
        f"a.bin.another-{HOST}.{dead}.part",  # of another machine, whose processes are not known
        f"a.bin.{dead}.part", f"a.bin.{HOST}.first.part", f"a.bin.{HOST}.{9**40}.part", "a.bin.part",  # not of ours
    }  # fmt: skip
    for name in others:
        (tmp_path / name).touch()
    write_whole(tmp_path / "b.bin", b"")
    assert len(list(tmp_path.iterdir())) == len(others) + 2
    remove_stale_parts(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == others | {"b.bin"}


def test_a_part_that_may_not_be_removed_is_left(tmp_path, monkeypatch):
    (tmp_path / f"a.bin.{HOST}.99999999.part").touch()

    def refuse(*args, **kwargs):
        raise PermissionError

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    remove_stale_parts(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
