"""A process that has imported what the program imports, and forks a process for each command line.

Each command is a process of its own: its own memory, folder, output, signals and exit status. Only
the seconds of `import torch` are spent once. Requests and replies are JSON, one a line:

    {"argv": [...], "cwd": ..., "stdout": file, "stderr": file, "env": {...}, "kill": [target, n],
     "file_size": bytes}  ->  {"pid": ...}
    {"wait": pid}  ->  {"status": ...}, negative for a signal, as of subprocess

`kill` ends the process with SIGKILL at the n-th call (from 1) of the function at `module:attribute`;
no file can grow beyond `file_size`, as on a full disk.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import runpy
import signal
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "compress_classifier.py"


def serve() -> None:
    sys.path[0] = str(ROOT)
    preload()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            reply = {"status": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])}
        else:
            pid = os.fork()
            if pid == 0:
                become(request)
            reply = {"pid": pid}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


def preload() -> None:
    """Import what the jobs import late, too: scikit-learn, TensorBoard, matplotlib, the tracer of graphs."""
    import matplotlib.pyplot  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch
    import torch.utils.tensorboard

    import distiller.apputils.classifier_jobs  # noqa: F401
    from distiller.export.latency import measure_latencies, measure_latency
    from distiller.graph import SummaryGraph

    torch.set_num_threads(1)
    SummaryGraph(torch.nn.Linear(2, 2), torch.zeros(1, 2), purpose="a warm-up")
    for measure in (measure_latency, measure_latencies):  # no test looks at how long anything takes
        measure.__kwdefaults__.update(min_time=0.01)  # pyright: ignore[reportOptionalMemberAccess]
    gc.freeze()  # so that collections do not copy the memory that all processes share


def become(request: dict) -> None:
    """Turn this process into a run of the program; does not return."""
    import torch

    status = 1
    # PyTorch makes its pool of threads anew in a forked process; two threads that need one at once would abort.
    torch.set_num_threads(1)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["cwd"])
        os.environ.update(request.get("env") or {})
        sys.argv = [str(PROGRAM), *request["argv"]]
        if request.get("kill"):
            kill_at(*request["kill"])
        if request.get("file_size"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size"],) * 2)
        runpy.run_path(str(PROGRAM), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            traceback.print_exc()
            status = 120  # as the interpreter's own
        finally:
            os._exit(status)


def kill_at(target: str, count: int) -> None:
    """Put in the place of a function one that kills this process at its `count`-th call."""
    module, _, path = target.partition(":")
    owner = importlib.import_module(module)
    *parts, name = path.split(".")
    for part in parts:
        owner = getattr(owner, part)
    function, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count:
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, counted)


if __name__ == "__main__":
    serve()
