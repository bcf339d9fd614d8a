"""The program's job `--sense`: accuracy against compression, layer by layer, along one axis or several.

Knows nothing about how points are measured.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distiller.apputils.data_loaders import Loader
from distiller.apputils.given_flags import given_flags
from distiller.apputils.sampling import fingerprint
from distiller.errors import UnknownNameError, UsageError
from distiller.names import named_modules, unwrap
from distiller.sensitivity.axes import AxisContext, find_axis, input_ranges
from distiller.sensitivity.folder import CSV_NAME, SETTINGS_NAME
from distiller.sensitivity.paired_drop import check_error
from distiller.sensitivity.plot import plot_points
from distiller.sensitivity.sweep import AxisRequest, SweepProgress, sensitivity_sweep, sweep_units
from distiller.sensitivity.sweep_data import random_order

if TYPE_CHECKING:
    from distiller.apputils.image_classifier import ClassifierCompressor

_LOG = logging.getLogger(__name__)
_RANGE_IMAGES = 1024
"""Training images that the ranges of activations are measured on."""
_ACTIVATIONS = "activation-bits"
_BLOCKS = "n:m"


class LoaderBlocks:
    """The images of a loader as blocks of a sweep.

    Args:
        loader: of a test set.
        identity: a text that other images do not have.
        device: where blocks are put.
        order: of the samples; default the loader's own.
    """

    def __init__(
        self, loader: Loader, identity: str, device: torch.device | str, order: Tensor | None = None
    ) -> None:
        self.num_samples, self.batch_size, self.identity = loader.num_samples, loader.batch_size, identity
        self._loader, self._device = loader, device
        samples = loader.indices() if order is None else loader.indices()[order]
        self._parts = samples.split(self.batch_size)

    def blocks(self, indices: Iterable[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """(images, labels) of blocks, in ascending order; each is read when it is its turn."""
        chosen = [self._parts[index] for index in indices]
        if chosen:
            for images, labels in self._loader.of_samples(torch.cat(chosen)):
                yield images.to(self._device), labels.to(self._device)


def sweep_sensitivity(compressor: ClassifierCompressor) -> None:
    """Sweep into `sensitivity.csv`, and draw it."""
    args, model = compressor.args, unwrap(compressor.model)
    if not any(True for _ in model.parameters()):
        raise UsageError(
            f"--sense {','.join(args.sensitivity)}: '{args.arch}' has no parameters to prune; "
            "give a model that has some, or test this one with --evaluate"
        )
    requests = _requests(args.sensitivity, args.sense_range or {}, args.sense_params)
    if "sense_block" in given_flags(args) and all(request.axis != _BLOCKS for request in requests):
        raise UsageError(f"--sense-block: goes with the axis {_BLOCKS}, which --sense does not have")
    # What is wrong with flags is told before the data are read.
    if args.sense_error is not None:
        check_error(args.sense_error)
    any_ranges = dict.fromkeys(dict(named_modules(model)), (0.0, 1.0))
    try:
        sweep_units(model, requests, AxisContext(block=args.sense_block, activation_ranges=any_ranges))
    except UnknownNameError as error:
        names = "; ".join(str(error).splitlines())
        raise UnknownNameError(
            f"--sense-params: {names}; '--summary sparsity' lists all of them", faults=error.faults
        ) from error
    loader, part = _images(compressor)
    target = _interrupted_sweep(args.sense_resume) if args.sense_resume else compressor.run.require_folder()
    identity = f"{loader.num_samples} of {compressor.dataset}{part}, {fingerprint(loader.indices())}"
    order = None if args.sense_error is None else random_order(loader.num_samples)
    data = LoaderBlocks(loader, identity, compressor.device, order)
    points = sensitivity_sweep(
        model,
        requests,
        data,
        target,
        context=_context(compressor, requests),
        error=args.sense_error,
        fast=args.sense_fast,
        jobs=args.sense_jobs,
        on_progress=_Reporter(),
    )
    _LOG.info("Drawing %d points", len(points))
    pictures = plot_points(points, target)
    _LOG.info("Saved %s and %s", target / CSV_NAME, ", ".join(map(str, pictures)))


class _Reporter:
    """Logs how far a sweep is, and how long it will go on.

    That is by the blocks after the first: until then processes are started and much is prepared. Several
    processes end their blocks at about the same time: only as many as there are of them tell.
    """

    def __init__(self) -> None:
        self._first: float | None = None

    def __call__(self, progress: SweepProgress) -> None:
        now = time.perf_counter()
        left = ""
        if self._first is None:
            self._first = now
        elif told := (progress.new_blocks - 1) // progress.jobs * progress.jobs:
            seconds = (now - self._first) / told
            left = f"  about {seconds * (progress.of_blocks - progress.blocks):.0f} s left"
        _LOG.info(
            "[%d/%d blocks of images, %d/%d points known]%s",
            progress.blocks, progress.of_blocks, progress.points, progress.of_points, left,
        )  # fmt: skip


def _requests(
    axes: Iterable[str], ranges: dict[str, tuple[float, float, float]], names: list[str] | None
) -> list[AxisRequest]:
    chosen = [find_axis(name).name for name in axes]
    if "" in ranges and len(chosen) != 1:
        raise UsageError(
            f"--sense-range: of several axes, say which is meant, as in '--sense-range {chosen[0]} "
            f"{' '.join(f'{number:g}' for number in ranges[''])}'"
        )
    own = {find_axis(name or chosen[0]).name: numbers for name, numbers in ranges.items()}
    for name in own:
        if name not in chosen:
            raise UsageError(f"--sense-range {name}: is not among the axes of --sense {','.join(chosen)}")
    return [
        AxisRequest(name, find_axis(name).levels(*own[name]) if name in own else None, tuple(names or ("*",)))
        for name in chosen
    ]


def _images(compressor: ClassifierCompressor) -> tuple[Loader, str]:
    """What is swept on, and the part of the data set that it is."""
    if not compressor.args.sense_valid:
        return compressor.data.test, ""
    if compressor.data.valid is None or compressor.data.valid_is_test:
        raise UsageError(
            "--sense-valid: there are no validation images; give a --validation-split above 0, or leave the "
            "flag out"
        )
    return compressor.data.valid, " (validation)"


def _context(compressor: ClassifierCompressor, requests: Iterable[AxisRequest]) -> AxisContext:
    block = compressor.args.sense_block
    if not any(request.axis == _ACTIVATIONS for request in requests):
        return AxisContext(block=block)
    train = compressor.data.train
    assert train is not None
    loader = compressor.data.calibration(min(1.0, _RANGE_IMAGES / train.num_samples))
    batches = (images.to(compressor.device) for images, _ in loader)
    ranges = input_ranges(unwrap(compressor.model), batches)
    return AxisContext(block=block, activation_ranges=ranges)


def _interrupted_sweep(folder: str) -> Path:
    if not (Path(folder) / SETTINGS_NAME).is_file():
        raise UsageError(
            f"--sense-resume {folder}: no sweep to go on with, there is no {SETTINGS_NAME}; "
            "give the run folder of a sweep, or leave the flag out"
        )
    return Path(folder)
