"""The folder that a run writes into, and a record of what it ran on.

Knows nothing about what is written there, and configures no logging.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from distiller.errors import UsageError

_LONGEST_NAME = 128  # bytes; the names of files made from it must stay within the 255 of most file systems


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a run's files go.

    Attributes:
        path: the run's own folder; its name is the experiment's name.
        log_file: `<experiment>.log` in it; not made yet.
        configs: the copies in `configs/`, in the order given.
        links: `latest_log_dir` and `latest_log_file` beside the folder, as far as they could
            be made (not every file system has symbolic links).
    """

    path: Path
    log_file: Path
    configs: tuple[Path, ...]
    links: tuple[Path, ...]


def create_run_folder(
    out_dir: str | Path,
    name: str | None = None,
    config_files: Iterable[str | Path] = (),
    now: datetime | None = None,
) -> RunFolder:
    """Make `<out_dir>/<name___>YYYY.MM.DD-HHMMSS/`, with copies of the run's input files.

    A second run in the same second gets `-2` appended, a third `-3`.

    Args:
        out_dir: made when missing.
        name: the experiment's name; None or empty for none.
        config_files: files to copy into `configs/` (schedule, statistics).
        now: time of the run; default the local time.

    Raises:
        UsageError: the folder cannot be made, a file cannot be read, or `name` cannot be
            part of a file name. Nothing is left behind.
    """
    if name and (Path(name).name != name or "\\" in name or "\0" in name):
        raise UsageError(f"name: cannot be part of a folder's name, got '{name}'; leave out '/' and '\\'")
    size = len((name or "").encode(errors="surrogateescape"))
    if size > _LONGEST_NAME:
        raise UsageError(
            f"name: is part of file names and may have {_LONGEST_NAME} bytes, got {size}; give a shorter one"
        )
    contents = [(Path(file).name, _read(Path(file))) for file in config_files]
    stamp = (now or datetime.now()).strftime("%Y.%m.%d-%H%M%S")
    out_dir = Path(os.path.abspath(Path(out_dir).expanduser()))  # noqa: PTH100 - keeps links in the path

    path, made = None, []
    try:
        made = [folder for folder in (out_dir, *out_dir.parents) if not folder.exists()]
        out_dir.mkdir(parents=True, exist_ok=True)
        path = _make_unique(out_dir, f"{name}___{stamp}" if name else stamp)
        configs = _copy(contents, path / "configs")
    except OSError as error:
        if path is not None:
            shutil.rmtree(path)
        for folder in made:
            with contextlib.suppress(OSError):  # never made, or used by another run by now
                folder.rmdir()
        raise UsageError(
            f"out-dir: '{out_dir}' cannot be written, {error.strerror or error}; "
            "give a folder that can with --out-dir"
        ) from error
    log_file = path / f"{path.name}.log"
    links = {"latest_log_dir": path, "latest_log_file": log_file}
    made_links = tuple(out_dir / link for link, target in links.items() if _link(out_dir / link, target))
    return RunFolder(path, log_file, configs, made_links)


def environment(command_line: Sequence[str], repository: str | Path) -> dict[str, Any]:
    """What a run ran on, as plain data for its log and its results.

    Args:
        command_line: the program and its arguments.
        repository: a folder whose git commit is recorded, if it is in a work tree.

    Returns:
        `cpus` (of the machine), `cpus_usable`, `threads`, `gpus` (names), `torch`, `cuda`,
        `cudnn`, `python`, `platform`, `packages` (version by name), `git` (commit, branch,
        dirty; None outside of a work tree), `command_line`.
    """
    gpus = range(torch.cuda.device_count())
    return {
        "cpus": os.cpu_count(),
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpus else None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _packages(),
        "git": _git_state(Path(repository)),
        "command_line": shlex.join(command_line),
    }


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: cannot be read, {error.strerror}; give a file that can") from error


def _make_unique(out_dir: Path, stem: str) -> Path:
    attempt = 1
    while True:
        path = out_dir / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            path.mkdir()
        except FileExistsError:
            attempt += 1
        else:
            return path


def _copy(contents: Sequence[tuple[str, bytes]], folder: Path) -> tuple[Path, ...]:
    """Write the files; one whose name is taken by a file before it gets a number in front."""
    written: list[Path] = []
    for file_name, data in contents:
        folder.mkdir(exist_ok=True)
        path = folder / file_name
        if path in written:
            path = folder / f"{len(written) + 1}_{file_name}"
        path.write_bytes(data)
        written.append(path)
    return tuple(written)


def _link(link: Path, target: Path) -> bool:
    """Point a link beside the run folder at `target`, in one step; returns whether that was possible.

    The links are a convenience: on a file system without them the run goes on, and what
    is no link is left alone.
    """
    if link.exists() and not link.is_symlink():
        return False
    fresh = link.with_name(f".{link.name}-{target.name}")
    try:
        fresh.symlink_to(target.relative_to(link.parent))
        fresh.replace(link)
    except OSError:
        return False
    return True


def _packages() -> dict[str, str]:
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return dict(sorted(found.items(), key=lambda item: str(item[0]).lower()))


def _git_state(folder: Path) -> dict[str, Any] | None:
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit,
        "branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD"),
        "dirty": bool(changes) if changes is not None else None,
    }


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None when there is no git, no work tree, or no answer in time."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
