"""A sweep into a folder, which a killed run resumes: units, blocks and files put together.

    for each block of images, in order:
        run the dense model and all points that are not known yet
        put the counts on disk
        with an error: after a look, points whose drop is known are finished

Knows nothing about where images come from.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from distiller.errors import UsageError
from distiller.evaluation_mode import answer, buffers_kept, evaluating
from distiller.sensitivity.axes import AxisContext, find_axis
from distiller.sensitivity.block_engine import EngineSettings
from distiller.sensitivity.block_pool import BlockPool, BlockTask
from distiller.sensitivity.curves import SensitivityPoint, clean_level
from distiller.sensitivity.fingerprint import images_fingerprint, weights_fingerprint
from distiller.sensitivity.folder import SweepFolder, SweepSettings, SweptAxis
from distiller.sensitivity.standings import Standings
from distiller.sensitivity.sweep_data import SweepData, block_count
from distiller.sensitivity.tuning import choose_settings, traced_program
from distiller.sensitivity.units import Unit

_LOG = logging.getLogger(__name__)
_SOON = 30.0
"""Seconds; several processes take some to start."""


@dataclass(frozen=True, slots=True)
class AxisRequest:
    """What is swept along one axis.

    Attributes:
        axis: its name.
        levels: in any order; default the axis's own. The dense level is always measured.
        parameters: names or patterns; those that the axis is not meant for are passed over.
    """

    axis: str
    levels: tuple[float, ...] | None = None
    parameters: tuple[str, ...] = ("*",)


@dataclass(frozen=True, slots=True)
class SweepProgress:
    """Where a sweep stands.

    Attributes:
        blocks: that are done, those of earlier runs included.
        of_blocks: in all.
        new_blocks: that were done in this run.
        points: that are finished.
        of_points: in all.
        jobs: processes, each with a block at a time.
    """

    blocks: int
    of_blocks: int
    new_blocks: int
    points: int
    of_points: int
    jobs: int


def sensitivity_sweep(
    model: nn.Module,
    axes: Sequence[AxisRequest],
    data: SweepData,
    folder: str | Path,
    *,
    context: AxisContext | None = None,
    error: float | None = None,
    fast: bool = False,
    jobs: int | None = 1,
    on_progress: Callable[[SweepProgress], None] | None = None,
) -> list[SensitivityPoint]:
    """Sweep into `folder/sensitivity.csv`, going on where an earlier run was killed.

    Every point is the same as that of a full evaluation of its variant (`perform_sensitivity_analysis`): same
    top-1 and top-5, the loss within rounding. With an `error` a point takes the images that it needs, and has
    an interval.

    Args:
        model: the dense model; takes one batch of images, returns logits. It comes back unchanged.
        axes: what is swept; all of them share the runs of the dense model.
        data: the test images; in a random order where there is an `error` (`random_order`).
        folder: where the CSV and its settings go; made when missing.
        context: what some axes have to know besides; default an image as input, where that is needed.
        error: a point is finished as soon as its drop of top-1 against the dense model is known, with 95 %
            confidence, to within so many points or a tenth of it; None: all images are looked at.
        fast: allow arithmetic (bfloat16) that may change rare decisions, where it is faster; how many of the
            dense model's it changed is logged.
        jobs: processes that share the work; None: one for each thread where the sweep takes longer than it
            takes to start them.
        on_progress: called after every block.

    Returns:
        The points, axis by axis, the dense one of each parameter first.

    Raises:
        UnknownNameError: an unknown axis, or a name that matches nothing.
        UsageError: an axis is meant for none of the parameters, is there twice, or something is out of range.
        SensitivityError: the folder holds another sweep, or cannot be written; a process died.
    """
    images, labels = next(data.blocks([0]))
    if context is None:
        context = AxisContext(dummy_input=images[:1])
    units = sweep_units(model, axes, context)
    standings = Standings(units, data.num_samples, data.batch_size, error)
    settings = SweepSettings(
        axes=tuple(_swept(axis.axis, units) for axis in axes),
        weights=weights_fingerprint(model),
        test_images=f"{data.identity}, the first of them {images_fingerprint(images, labels)}",
        batch_size=data.batch_size,
        error=error,
        fast=fast,
        context={"block": context.block, "activation_ranges": context.activation_ranges},
    )
    with SweepFolder(folder, settings) as files:
        finished = files.finished()
        if finished is not None:
            return finished
        _LOG.info("%d points on %d images: making ready", standings.count, data.num_samples)
        todo = [index for index in range(block_count(data)) if index not in files.blocks]
        if jobs is None:
            jobs = files.jobs or _paying_jobs(model, images, standings.count * len(todo))
        jobs = min(jobs, max(1, len(todo)))
        engine = files.engine or _chosen(model, units, images, fast)
        first_jobs = files.jobs or jobs
        if files.engine is None or files.jobs is None:
            files.choose(engine, first_jobs)
        for index in sorted(files.blocks):
            standings.add(index, files.blocks[index])
        with BlockPool(model, units, engine, jobs) as pool:
            done = pool.run(_tasks(data, todo, standings, first_jobs))
            for number, (index, scores) in enumerate(done, start=1):
                files.append(index, scores)
                if standings.add(index, scores):
                    files.write(standings.points(finished_only=True))
                if on_progress is not None:
                    blocks = block_count(data)
                    left = len(todo) - number
                    on_progress(
                        SweepProgress(
                            blocks - left, blocks, number, standings.finished, standings.count, jobs
                        )
                    )
        if fast:
            _tell_flips(engine, standings.flipped, data.num_samples)
        points = standings.points()
        files.complete(points)
        return points


def sweep_units(model: nn.Module, axes: Iterable[AxisRequest], context: AxisContext) -> list[Unit]:
    """The units of all axes, in their order.

    Raises:
        UnknownNameError, UsageError: as `sensitivity_sweep`.
    """
    units: list[Unit] = []
    for request in axes:
        axis = find_axis(request.axis)
        if any(unit.axis == axis.name for unit in units):
            raise UsageError(f"sensitivity: axis '{axis.name}' is there twice; name it once")
        levels = axis.default_levels(context) if request.levels is None else request.levels
        found = axis.units(model, request.parameters, levels, context)
        if not found[0].levels:
            raise UsageError(
                f"sensitivity: axis '{axis.name}' has no level to measure but the dense one, "
                f"{axis.dense_level:g}; give others"
            )
        units += found
    if not units:
        raise UsageError("sensitivity: no axis to sweep along; give one")
    return units


def _swept(name: str, units: Sequence[Unit]) -> SweptAxis:
    axis = find_axis(name)
    own = [unit for unit in units if unit.axis == axis.name]
    levels = (axis.dense_level, *(clean_level(level) for level in own[0].levels))
    return SweptAxis(axis.name, levels, tuple(unit.parameter for unit in own))


def _chosen(model: nn.Module, units: Sequence[Unit], images: Tensor, fast: bool) -> EngineSettings:
    """How blocks are run, from the first of them."""
    with evaluating(model), buffers_kept(model):
        program, reason = traced_program(model, images)
        if program is None:
            engine = EngineSettings(len(images), whole=dict.fromkeys(range(len(units)), reason))
        else:
            engine = choose_settings(model, program, units, images, fast=fast)
            if program.discontinuous and len(engine.whole) < len(units):
                _LOG.warning(
                    "the network itself rounds, compares or chooses (%s), where a last bit counts: every "
                    "level is run bit for bit as the whole network is, which takes longer",
                    ", ".join(program.discontinuous),
                )
    by_reason: dict[str, list[Unit]] = {}
    for place, why in engine.whole.items():
        by_reason.setdefault(why, []).append(units[place])
    for why, own in by_reason.items():
        _LOG.warning("%s: run as a whole for every level, which takes longer: %s", _told(own, units), why)
    return engine


def _told(own: Sequence[Unit], units: Sequence[Unit]) -> str:
    if len(own) == len(units) > 1:
        return f"all {len(units)} curves"
    return "; ".join(f"{unit.axis}, {unit.parameter}" for unit in own)


def _paying_jobs(model: nn.Module, images: Tensor, evaluations: int) -> int:
    """One process for each thread, or one where all of it is soon done; `evaluations` of one block each."""
    if images.device.type != "cpu":
        return 1
    with evaluating(model), buffers_kept(model), torch.inference_mode():
        answer(model, images[:1])
        begin = time.perf_counter()
        answer(model, images)
        seconds = time.perf_counter() - begin
    return 1 if seconds * evaluations < _SOON else torch.get_num_threads()


def _tasks(
    data: SweepData, todo: Sequence[int], standings: Standings, jobs: int
) -> Iterator[BlockTask | None]:
    """The blocks with the points that each is run on; None while that is not clear.

    Several processes get a block before the last ones are looked at. What it is run on is always what was
    known so many blocks before, so that a sweep says the same whichever process is the faster one.
    """
    behind = 1 if jobs == 1 else jobs + 1
    blocks = data.blocks(todo)
    for index in todo:
        while not standings.is_clear(index, behind):
            yield None
        images, labels = next(blocks)
        yield BlockTask(index, images, labels, standings.active(index, behind))


def _tell_flips(engine: EngineSettings, flipped: int, images: int) -> None:
    if engine.bfloat16:
        _LOG.warning("fast: in bfloat16 the dense model answers %d of %d images otherwise", flipped, images)
    else:
        _LOG.warning(
            "fast: bfloat16 was not used: it is not faster on this machine, or only inputs are rounded; "
            "every decision is exact"
        )
