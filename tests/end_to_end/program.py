"""The program as its user runs it: a command line in a folder, what it prints, what it leaves there."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.end_to_end.fork_server import PROGRAM

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass(frozen=True)
class Done:
    """A run that ended; a negative status is the signal that ended it."""

    status: int
    out: str
    err: str

    def succeeded(self) -> Done:
        assert self.status == 0, f"status {self.status}\n{self.out}\n{self.err}"
        assert self.err == ""
        assert "Warning" not in self.out
        return self


class ForkServer:
    """The client of `fork_server.py`."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ENVIRONMENT},
        )

    def ask(self, **request) -> dict:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


@dataclass
class Program:
    """Runs in `folder`; what they print goes into files outside of it."""

    server: ForkServer
    folder: Path
    printed: Path
    _count: int = field(default=0)

    def start(
        self,
        command: str,
        *more: str | Path,
        kill: tuple[str, int] | None = None,
        file_size: int | None = None,
        env=None,
        **files: str,
    ) -> Running:
        """Start a command line: `command` is split as a shell does, `more` are single arguments.

        `stdout` and `stderr` name other files than those that `Running` reads.
        """
        self._count += 1
        files = {name: str(self.printed / f"{self._count}.{name}") for name in ("stdout", "stderr")} | files
        argv = [*shlex.split(command), *map(str, more)]
        limits = {"kill": kill, "file_size": file_size}
        reply = self.server.ask(argv=argv, cwd=str(self.folder), env=env or {}, **limits, **files)
        return Running(self.server, reply["pid"], Path(files["stdout"]), Path(files["stderr"]))

    def run(self, command: str, *more: str | Path, kill: tuple[str, int] | None = None, env=None) -> Done:
        return self.start(command, *more, kill=kill, env=env).wait()

    def write(self, name: str, content: str | bytes) -> Path:
        """A file of the user's, in the folder of the runs; returns its absolute path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def state(self) -> dict[str, tuple[bytes, int]]:
        """Every file with its content and time of change, every folder, every link."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            content = path.readlink().name.encode() if path.is_symlink() else b""
            if path.is_file() and not path.is_symlink():
                content = path.read_bytes()
            found[str(path.relative_to(self.folder))] = (content, path.lstat().st_mtime_ns if content else 0)
        return found

    def latest(self, out_dir: str) -> Path:
        """The folder of the last run into `out_dir`."""
        return (self.folder / out_dir / "latest_log_dir").resolve()

    def names(self, folder: str | Path = ".") -> set[str]:
        """The names in a folder; the log and the event file, which carry the time, as `LOG` and `EVENTS`."""
        folder = self.folder / folder
        shown = {f"{folder.name}.log": "LOG"}
        return {
            "EVENTS" if path.name.startswith("events.out.tfevents.") else shown.get(path.name, path.name)
            for path in folder.iterdir()
        }


@dataclass(frozen=True)
class Running:
    """A run that has been started."""

    server: ForkServer
    pid: int
    stdout: Path
    stderr: Path

    def wait(self) -> Done:
        status = self.server.ask(wait=self.pid)["status"]
        return Done(status, *(read(path) for path in (self.stdout, self.stderr)))

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Wait until it has printed `text`; a run that never does, because it ended early, fails the test."""
        deadline = time.monotonic() + seconds
        while text not in read(self.stdout):
            assert time.monotonic() < deadline, f"no '{text}' in:\n{read(self.stdout)}\n{read(self.stderr)}"
            time.sleep(0.005)


def read(path: Path) -> str:
    """What a run printed, as far as it is a file by now."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""  # a device is none


def in_a_fresh_interpreter(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """The program without the fork server: everything as the user's shell starts it."""
    return subprocess.run(
        [sys.executable, str(PROGRAM), *shlex.split(command)],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )


def refused(program: Program, command: str, *more: str | Path, env=None) -> str:
    """Run what must be refused: exit status 2, one message, nothing written or changed. Returns the message."""
    before = program.state()
    done = program.run(command, *more, env=env)
    assert done.status == 2, f"status {done.status}\n{done.out}\n{done.err}"
    assert done.err
    assert "Traceback" not in done.out + done.err
    assert program.state() == before
    return done.err


def load(path: Path) -> dict:
    """A checkpoint, as the file is."""
    return torch.load(path, weights_only=True)


def differences(a, b, path: str = "") -> list[str]:
    """Where two nests of plain data and tensors differ, bit for bit."""
    if type(a) is not type(b):
        return [f"{path}: {type(a).__name__} and {type(b).__name__}"]
    if isinstance(a, dict):
        found = [f"{path}/{key}: only in one" for key in a.keys() ^ b.keys()]
        return found + [
            d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{path}/{key}")
        ]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} items"]
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, f"{path}[{i}]")]
    if isinstance(a, torch.Tensor):
        is_same = a.dtype == b.dtype and a.shape == b.shape and bool((a.flatten() == b.flatten()).all())
        return [] if is_same else [f"{path}: tensors differ"]
    return [] if a == b else [f"{path}: {a!r} and {b!r}"]
