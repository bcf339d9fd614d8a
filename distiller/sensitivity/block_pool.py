"""Blocks of a sweep run by one process or by several.

Each process of several has a copy of the model and of the units, and its share of the threads; blocks are
handed out one by one, so that memory does not grow with their number.
Knows nothing about data sets or files.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from distiller.errors import DistillerError, SensitivityError, UsageError
from distiller.evaluation_mode import buffers_kept, evaluating
from distiller.sensitivity.block_engine import BlockEngine, BlockScores, EngineSettings, Place
from distiller.sensitivity.tuning import traced_program
from distiller.sensitivity.variants import Unit

_PATIENCE = 2.0
"""Seconds between looks at whether the other side is still there."""


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
        UsageError: the model cannot be copied into other processes.
    """

    def __init__(
        self, model: nn.Module, units: Sequence[Unit], settings: EngineSettings, jobs: int = 1
    ) -> None:
        self._own = _OwnProcess(model, units, settings) if jobs == 1 else None
        self._others = None if jobs == 1 else _OtherProcesses(_copied(model, units, settings), jobs)

    def run(self, tasks: Iterator[BlockTask]) -> Iterator[tuple[int, BlockScores]]:
        """(index, scores) of each block, as soon as it is run; of several processes in any order.

        Args:
            tasks: the blocks; each is asked for when there is a process for it.

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

    def run(self, tasks: Iterator[BlockTask]) -> Iterator[tuple[int, BlockScores]]:
        for task in tasks:
            with evaluating(self._model), buffers_kept(self._model):
                if self._engine is None:
                    self._engine = _engine(self._model, self._units, self._settings, task.images)
                scores = self._engine.run(task.images, task.labels, task.active)
            yield task.index, scores


class _OtherProcesses:
    def __init__(self, payload: bytes, jobs: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._jobs = jobs
        self._todo, self._done = context.Queue(), context.Queue()
        threads = max(1, torch.get_num_threads() // jobs)
        arguments = (payload, self._todo, self._done, threads, os.getpid())
        self._workers = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(jobs)]
        for worker in self._workers:
            worker.start()

    def run(self, tasks: Iterator[BlockTask]) -> Iterator[tuple[int, BlockScores]]:
        waiting, is_over = 0, False
        while True:
            while (
                not is_over and waiting <= self._jobs
            ):  # one more than there are processes, so that none waits
                task = next(tasks, None)
                if task is None:
                    is_over = True
                else:
                    # As numpy: tensors would go through shared memory, of which a machine may have little.
                    self._todo.put((task.index, task.images.numpy(), task.labels.numpy(), task.active))
                    waiting += 1
            if not waiting:
                return
            result = self._next_result()
            waiting -= 1
            yield result

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.join()
        for channel in (self._todo, self._done):
            channel.cancel_join_thread()
            channel.close()

    def _next_result(self) -> tuple[int, BlockScores]:
        while True:
            try:
                index, scores = self._done.get(timeout=_PATIENCE)
            except queue.Empty:
                dead = [worker for worker in self._workers if worker.exitcode is not None]
                if dead:
                    raise SensitivityError(
                        f"sensitivity: a process ended with exit status {dead[0].exitcode}, out of memory "
                        "perhaps; what was measured is kept: go on with fewer --sense-jobs"
                    ) from None
                continue
            if isinstance(scores, DistillerError):
                raise scores
            return index, scores


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


def _no_copy(error: Exception) -> UsageError:
    return UsageError(
        "--sense-jobs: the model cannot be copied into other processes, "
        f"{type(error).__name__}: {error}; give --sense-jobs 1"
    )


def _work(payload: bytes, todo: Any, done: Any, threads: int, parent: int) -> None:
    """The life of a process: run blocks until there is nobody to run them for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    torch.set_num_threads(threads)
    if str(Path.cwd()) not in sys.path:  # where packages of the user's own lie
        sys.path.append(str(Path.cwd()))
    try:
        model, units, settings = pickle.loads(payload)
    except Exception as error:  # whatever a model of the user's own raises
        done.put((-1, _no_copy(error)))
        return
    engine: BlockEngine | None = None
    with evaluating(model):
        while True:
            try:
                index, images, labels, active = todo.get(timeout=_PATIENCE)
            except queue.Empty:
                if os.getppid() != parent:
                    return  # it was killed
                continue
            images, labels = torch.from_numpy(images), torch.from_numpy(labels)
            try:
                engine = engine or _engine(model, units, settings, images)
                done.put((index, engine.run(images, labels, active)))
            except DistillerError as error:
                done.put((index, error))
