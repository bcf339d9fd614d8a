import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest
import torch

from distiller.apputils.experiment import create_run_folder, environment
from distiller.atomic_file import write_whole
from distiller.errors import UsageError

NOW = datetime(2026, 3, 9, 7, 5, 2)


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ----------------------------------------------------------------------- run folder


def test_folder_is_called_by_name_and_time(tmp_path):
    run = create_run_folder(tmp_path / "logs", "lenet", now=NOW)
    assert run.path == tmp_path / "logs" / "lenet___2026.03.09-070502"
    assert run.path.is_dir()
    assert run.log_file == run.path / "lenet___2026.03.09-070502.log"


@pytest.mark.parametrize("name", [None, ""])
def test_folder_of_a_nameless_run_is_called_by_the_time(tmp_path, name):
    assert create_run_folder(tmp_path, name, now=NOW).path.name == "2026.03.09-070502"


def test_time_is_now_unless_given(tmp_path):
    before = datetime.now().replace(microsecond=0)
    stamp = datetime.strptime(create_run_folder(tmp_path).path.name, "%Y.%m.%d-%H%M%S")
    assert before <= stamp <= datetime.now()


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        runs = list(threads.map(lambda _: create_run_folder(tmp_path, "a", now=NOW), range(8)))
    assert sorted(run.path.name for run in runs) == [
        "a___2026.03.09-070502",
        *(f"a___2026.03.09-070502-{i}" for i in range(2, 9)),
    ]
    assert len({run.log_file for run in runs}) == 8


def test_library_makes_no_log_file_and_adds_no_handlers(tmp_path, caplog):
    run = create_run_folder(tmp_path)
    assert list(run.path.iterdir()) == []


def test_relative_out_dir_gives_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = create_run_folder("logs", now=NOW)
    assert run.path == tmp_path / "logs" / "2026.03.09-070502"


# ---------------------------------------------------------------------------- links


def test_links_in_the_out_dir_lead_to_the_newest_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    create_run_folder("logs", "old", now=NOW)
    run = create_run_folder("logs", "new", now=NOW)
    run.log_file.write_text("hello")

    logs = tmp_path / "logs"
    assert run.links == (logs / "latest_log_dir", logs / "latest_log_file")
    assert (logs / "latest_log_dir").samefile(run.path)
    assert (logs / "latest_log_file").read_text() == "hello"
    assert everything_in(tmp_path) == [
        "logs",
        "logs/latest_log_dir",
        "logs/latest_log_file",
        "logs/new___2026.03.09-070502",
        "logs/new___2026.03.09-070502/new___2026.03.09-070502.log",
        "logs/old___2026.03.09-070502",
    ]


def test_links_survive_a_move_of_the_out_dir(tmp_path):
    run = create_run_folder(tmp_path / "logs", now=NOW)
    (tmp_path / "logs").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "latest_log_dir").samefile(tmp_path / "moved" / run.path.name)


def test_what_is_no_link_is_left_alone(tmp_path):
    (tmp_path / "latest_log_file").write_text("mine")
    run = create_run_folder(tmp_path)
    assert run.links == (tmp_path / "latest_log_dir",)
    assert (tmp_path / "latest_log_file").read_text() == "mine"


def test_run_goes_on_without_links_where_there_are_none(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    run = create_run_folder(tmp_path)
    assert run.links == ()
    assert list(tmp_path.iterdir()) == [run.path]


# -------------------------------------------------------------------------- configs


def test_configs_are_byte_for_byte_copies(tmp_path):
    schedule, stats = tmp_path / "agp.yaml", tmp_path / "stats.yaml"
    schedule.write_bytes(b"version: 1\r\n\xff")
    stats.write_text("conv1:\n")
    run = create_run_folder(tmp_path / "logs", config_files=[schedule, str(stats)])
    assert run.configs == (run.path / "configs" / "agp.yaml", run.path / "configs" / "stats.yaml")
    assert [path.read_bytes() for path in run.configs] == [b"version: 1\r\n\xff", b"conv1:\n"]


def test_configs_of_the_same_name_are_both_kept(tmp_path):
    files = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        files.append(tmp_path / folder / "x.yaml")
        files[-1].write_text(folder)
    run = create_run_folder(tmp_path / "logs", config_files=files)
    assert [(path.name, path.read_text()) for path in run.configs] == [("x.yaml", "a"), ("2_x.yaml", "b")]


def test_run_without_configs_has_no_configs_folder(tmp_path):
    assert everything_in(create_run_folder(tmp_path).path) == []


def test_missing_config_is_refused_before_anything_is_made(tmp_path):
    missing = tmp_path / "agp.yaml"
    with pytest.raises(UsageError) as error:
        create_run_folder(tmp_path / "logs", config_files=[missing])
    assert str(error.value) == f"{missing}: cannot be read, No such file or directory; give a file that can"
    assert everything_in(tmp_path) == []


# --------------------------------------------------------------------------- errors


def test_out_dir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "logs").write_text("mine")
    with pytest.raises(UsageError) as error:
        create_run_folder(tmp_path / "logs")
    assert str(error.value) == (
        f"out-dir: '{tmp_path}/logs' cannot be written, File exists; give a folder that can with --out-dir"
    )
    assert (tmp_path / "logs").read_text() == "mine"


def test_out_dir_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError) as error:
        create_run_folder(tmp_path / "file" / "logs")
    assert "cannot be written, Not a directory; give a folder that can with --out-dir" in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
@pytest.mark.parametrize("sub", ["", "a/b"])
def test_out_dir_without_permission_is_refused(tmp_path, sub):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match=r"cannot be written, Permission denied; give a folder that can"):
        create_run_folder(tmp_path / sub)
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("existing", [True, False])
def test_failed_run_folder_leaves_nothing_half_made(tmp_path, monkeypatch, existing):
    config = tmp_path / "agp.yaml"
    config.write_text("version: 1")
    out_dir = tmp_path / "a" / "b"
    if existing:
        out_dir.mkdir(parents=True)
    before = everything_in(tmp_path)

    def disk_full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(UsageError, match="cannot be written, No space left on device; give a folder"):
        create_run_folder(out_dir, config_files=[config])
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("name", ["a/b", "../up", "a/", "a\\b"])
def test_name_that_would_leave_the_out_dir_is_refused(tmp_path, name):
    with pytest.raises(UsageError) as error:
        create_run_folder(tmp_path, name)
    assert str(error.value) == (
        f"name: cannot be part of a folder's name, got '{name}'; leave out '/' and '\\'"
    )
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("name", ["a" * 129, "ä" * 65, "a" * 300])
def test_name_too_long_for_the_files_that_it_is_part_of_is_refused(tmp_path, name):
    with pytest.raises(UsageError) as error:
        create_run_folder(tmp_path, name)
    assert str(error.value) == (
        f"name: is part of file names and may have 128 bytes, got {len(name.encode())}; give a shorter one"
    )
    assert everything_in(tmp_path) == []


def test_longest_name_is_short_enough_for_every_file_of_the_run(tmp_path):
    name = "a" * 128
    run = create_run_folder(tmp_path, name)
    run.log_file.touch()
    assert len(run.links) == 2
    write_whole(run.path / f"{name}_quantized_checkpoint.pth.tar", b"")


# ---------------------------------------------------------------------- environment


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=trunk"]
    done = subprocess.run(
        ["git", *settings, "-C", str(folder), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_environment_is_plain_data(tmp_path):
    found = environment(["prog.py", "data dir", "--lr", "0.1"], tmp_path)
    assert json.loads(json.dumps(found)) == found
    assert found["command_line"] == "prog.py 'data dir' --lr 0.1"
    assert found["torch"] == str(torch.__version__)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["cpus"] >= found["cpus_usable"] >= 1
    assert len(found["gpus"]) == torch.cuda.device_count()


def test_environment_outside_of_a_work_tree_has_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment([], tmp_path)["git"] is None


def test_environment_without_git_on_the_machine_has_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment([], tmp_path)["git"] is None


def test_environment_names_the_commit_and_whether_files_differ_from_it(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("")

    assert environment([], tmp_path)["git"] == {"commit": commit, "branch": "trunk", "dirty": False}
    (tmp_path / "a.py").write_text("2")
    assert environment([], tmp_path)["git"] == {"commit": commit, "branch": "trunk", "dirty": True}
