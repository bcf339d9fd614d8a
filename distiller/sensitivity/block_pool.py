"""Blocks of a sweep run by one process or by several.

Each process of several has a copy of the model and of the units, and its share of the threads; blocks are
handed out one by one, so that memory does not grow with their number.
Knows nothing about data sets or files.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from distiller.errors import DistillerError, SensitivityError, UsageError
from distiller.evaluation_mode import buffers_kept, evaluating
from distiller.sensitivity.block_engine import BlockEngine, BlockScores, EngineSettings, Place
from distiller.sensitivity.tuning import traced_program
from distiller.sensitivity.units import Unit

_CONTEXT = multiprocessing.get_context("spawn")
"""How processes come to be: each anew, as copies of this one would hang on the locks of its threads."""
_PATIENCE = 5.0
"""Seconds that a process has to end by itself."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt."""
_KEPT_BYTES, _LARGEST_KEPT = 2**30, 2**25
_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


@dataclass(frozen=True, slots=True)
class BlockTask:
    """A block to run.

    Attributes:
        index: of the block.
        images: (batch, ...).
        labels: (batch,).
        active: the points that are wanted; None: all.
    """

    index: int
    images: Tensor
    labels: Tensor
    active: Collection[Place] | None


class BlockPool:
    """Runs blocks of one sweep; a context manager.

        with BlockPool(model, units, settings, jobs=2) as pool:
            for index, scores in pool.run(tasks):
                ...

    Args:
        model: comes back unchanged, in its own modes.
        units: of the sweep.
        settings: of the engine.
        jobs: processes, at least 1, that each has its share of the threads; models on a GPU take one. One is
            this process.

    Raises:
        UsageError: the model cannot be copied into other processes, or is on a GPU.
    """

    def __init__(
        self, model: nn.Module, units: Sequence[Unit], settings: EngineSettings, jobs: int = 1
    ) -> None:
        if jobs > 1:
            _check_device(model, jobs)
        self._own = _OwnProcess(model, units, settings) if jobs == 1 else None
        self._others = None if jobs == 1 else _OtherProcesses(_copied(model, units, settings), jobs)

    def run(self, tasks: Iterator[BlockTask | None]) -> Iterator[tuple[int, BlockScores]]:
        """(index, scores) of each block, as soon as it is run; of several processes in any order.

        Args:
            tasks: the blocks; each is asked for when there is a process for it. None: the next one has to
                wait until more of the results were taken, and is asked for again then.

        Raises:
            SensitivityError: a process died.
        """
        if self._own is not None:
            return self._own.run(tasks)
        assert self._others is not None
        return self._others.run(tasks)

    def close(self) -> None:
        """End the processes."""
        if self._others is not None:
            self._others.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _OwnProcess:
    def __init__(self, model: nn.Module, units: Sequence[Unit], settings: EngineSettings) -> None:
        self._model, self._units, self._settings = model, units, settings
        self._engine: BlockEngine | None = None

    def run(self, tasks: Iterator[BlockTask | None]) -> Iterator[tuple[int, BlockScores]]:
        for task in tasks:
            assert task is not None  # no result is ever out
            with evaluating(self._model), buffers_kept(self._model):
                if self._engine is None:
                    self._engine = _engine(self._model, self._units, self._settings, task.images)
                scores = self._engine.run(task.images, task.labels, task.active)
            yield task.index, scores


class _OtherProcesses:
    def __init__(self, payload: bytes, jobs: int) -> None:
        threads = max(1, torch.get_num_threads() // jobs)
        self._workers: dict[Connection, BaseProcess] = {}
        try:
            with _uninterrupted(), _with_huge_pages():
                for _ in range(jobs):
                    ours, theirs = _CONTEXT.Pipe()
                    worker = _CONTEXT.Process(target=_work, args=(theirs, threads), daemon=True)
                    worker.start()
                    theirs.close()  # else nobody would be told when the process is gone
                    self._workers[ours] = worker
            for connection in self._workers:  # all of them are starting by now
                with suppress(OSError):  # of a process that is gone, which `_result` tells
                    connection.send_bytes(payload)
        except BaseException:
            self.close()
            raise

    def run(self, tasks: Iterator[BlockTask | None]) -> Iterator[tuple[int, BlockScores]]:
        idle, busy = list(self._workers), set[Connection]()
        self._hand_out(tasks, idle, busy)
        while busy:
            for worker in wait(list(busy)):
                assert isinstance(worker, Connection)
                result = self._result(worker)
                busy.remove(worker)
                idle.append(worker)
                self._hand_out(tasks, idle, busy)  # before whoever asks does something with the result
                yield result
                self._hand_out(tasks, idle, busy)  # what had to wait for it

    def close(self) -> None:
        for worker in self._workers.values():
            worker.terminate()
        for connection, worker in self._workers.items():
            worker.join(_PATIENCE)
            if worker.exitcode is None:
                worker.kill()
                worker.join()
            worker.close()
            connection.close()
        self._workers = {}

    def _hand_out(
        self, tasks: Iterator[BlockTask | None], idle: list[Connection], busy: set[Connection]
    ) -> None:
        """Give blocks to processes that have none, as long as there are both."""
        while idle and (task := next(tasks, None)) is not None:
            worker = idle.pop(0)
            busy.add(worker)
            with suppress(OSError):  # of a process that is gone, which `_result` tells
                worker.send((task.index, _bytes_of(task.images), _bytes_of(task.labels), task.active))

    def _result(self, worker: Connection) -> tuple[int, BlockScores]:
        try:
            index, scores = worker.recv()
        except (EOFError, OSError) as error:
            process = self._workers[worker]
            process.join()
            raise SensitivityError(_gone(process.exitcode)) from error
        if isinstance(scores, DistillerError):
            raise scores
        return index, scores


_Bytes = tuple[np.ndarray, torch.dtype]


def _bytes_of(tensor: Tensor) -> _Bytes:
    """Bytes and their type: a tensor would go through shared memory, of which a machine may have little."""
    return tensor.contiguous().view(torch.uint8).numpy(), tensor.dtype


def _tensor_of(sent: _Bytes) -> Tensor:
    array, dtype = sent
    return torch.from_numpy(array).view(dtype)


def _gone(status: int | None) -> str:
    if status == -signal.SIGKILL:
        told, remedy = "was killed, out of memory perhaps", "with fewer --sense-jobs"
    else:
        told = f"ended with exit status {status}, and its own message if it had one"
        remedy = "when that is mended, or with --sense-jobs 1"
    return f"sensitivity: a process {told}; what was measured is kept: go on {remedy}"


def _engine(model: nn.Module, units: Sequence[Unit], settings: EngineSettings, images: Tensor) -> BlockEngine:
    is_cut = len(settings.whole) < len(units)
    program, _ = traced_program(model, images) if is_cut else (None, "")
    return BlockEngine(model, program, units, settings)


def _copied(model: nn.Module, units: Sequence[Unit], settings: EngineSettings) -> bytes:
    """All that a process needs, as plain bytes: tensors sent as such would be shared, and each writes."""
    try:
        return pickle.dumps((model, units, settings))
    except Exception as error:  # whatever a model of the user's own raises
        raise _no_copy(error) from error


def _check_device(model: nn.Module, jobs: int) -> None:
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    if device.type != "cpu":
        raise UsageError(
            f"--sense-jobs {jobs}: the model is on {device}, where one process takes all there is; give "
            "--sense-jobs 1"
        )


def _no_copy(error: Exception) -> UsageError:
    return UsageError(
        "--sense-jobs: the model cannot be copied into other processes, "
        f"{type(error).__name__}: {error}; give --sense-jobs 1"
    )


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Keep Ctrl-C until the end; processes that are started meanwhile never get it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which would let Ctrl-C through when it is started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _with_huge_pages() -> Iterator[None]:
    """Let processes that are started meanwhile ask for huge pages, where the C library is glibc: without them
    a large tensor has a thousand pages, and looking these up takes its time."""
    before = os.environ.get(_TUNABLES)
    if before is None or _HUGE_PAGES not in before:
        os.environ[_TUNABLES] = f"{before}:{_HUGE_PAGES}=1" if before else f"{_HUGE_PAGES}=1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_TUNABLES]
        else:
            os.environ[_TUNABLES] = before


def _work(tasks: Connection, threads: int) -> None:
    """The life of a process: what there is to sweep, then blocks, until there is nobody to run them for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    signal.signal(signal.SIGTERM, _end)
    torch.set_num_threads(threads)
    keep_freed_memory()
    if str(Path.cwd()) not in sys.path:  # where packages of the user's own lie
        sys.path.append(str(Path.cwd()))
    try:
        payload = tasks.recv_bytes()
    except (EOFError, OSError):
        return
    try:
        model, units, settings = pickle.loads(payload)
    except Exception as error:  # whatever a model of the user's own raises
        tasks.send((-1, _no_copy(error)))
        return
    engine: BlockEngine | None = None
    with evaluating(model):
        while (task := _next_task(tasks)) is not None:
            index, images, labels, active = task
            images, labels = _tensor_of(images), _tensor_of(labels)
            try:
                engine = engine or _engine(model, units, settings, images)
                scores: BlockScores | DistillerError = engine.run(images, labels, active)
            except DistillerError as error:
                scores = error
            with suppress(OSError):  # the other side is gone, which the next task says
                tasks.send((index, scores))


def _next_task(tasks: Connection) -> tuple[Any, ...] | None:
    """What to do next; None when the other side is gone."""
    try:
        return tasks.recv()
    except (EOFError, OSError):
        return None


def _end(number: int, frame: FrameType | None) -> None:
    """End as a process does by itself: what it has imported may have something to clear up."""
    raise SystemExit(0)


def keep_freed_memory() -> None:
    """Use freed memory again, where the C library is glibc: by default it gives each large tensor back to the
    system, which fills the next one with zeros, page by page."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
