"""The program's job `--thinnify`: a checkpoint whose filters and channels of zeros are physically removed.

    <checkpoint's name minus .pth.tar>_thinned_checkpoint.pth.tar

What is removed, and what has to stay, is found in `thinning.thin_model`.
Knows nothing about training.
"""

from __future__ import annotations

import copy
import logging

from torch import nn
from torch.optim import Optimizer

from distiller.apputils.checkpoint import (
    restore_optimizer,
    restore_rng_state,
    restore_scheduler,
    save_checkpoint,
)
from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.apputils.run_seed import SPLIT_EXTRAS
from distiller.errors import UsageError
from distiller.export.latency import measure_latencies
from distiller.scheduler import CompressionScheduler
from distiller.thinning.thin_model import ThinningReport, contract_model

_LOG = logging.getLogger(__name__)
_KEPT_EXTRAS = (*SPLIT_EXTRAS, "reference", "is_untrained")


def thinnify(compressor: ClassifierCompressor) -> None:
    """Thin the checkpoint's model, and save it with all that goes on with it.

    With `--resume-from` masks and the optimizer's state become smaller with the weights; with `--compress`
    the states of its policies, too, so that training can go on under the schedule.

    Raises:
        UsageError: there is nothing that could be removed.
    """
    args, checkpoint, model = compressor.args, compressor.checkpoint, compressor.model
    assert checkpoint is not None
    optimizer, scheduler = _resumed(compressor)
    with scheduler.masked():
        before = copy.deepcopy(model)
    report = contract_model(
        model,
        scheduler.masks,
        args.arch,
        compressor.dataset,
        optimizer,
        policies=[entry.policy for entry in scheduler.policies],
    )
    if not report.has_removed:
        raise UsageError(
            f"--thinnify: nothing can be removed from the model of {checkpoint.path}"
            + "".join(f"\n  {kept}" for kept in report.kept)
            + "\nprune whole filters or channels first"
        )
    folder = compressor.run.require_folder()
    extras = {key: checkpoint.extras[key] for key in _KEPT_EXTRAS if key in checkpoint.extras}
    if checkpoint.rng is not None:
        restore_rng_state(checkpoint.rng)  # so that training goes on with the same random numbers
    name = checkpoint.path.name.removesuffix(".pth.tar")
    with scheduler.masked():
        path = save_checkpoint(
            checkpoint.epoch or 0,
            args.arch,
            model,
            optimizer,
            scheduler,
            extras,
            name=f"{name}_thinned",
            dir=folder,
        )
        latencies = _latencies(compressor, before, model)
    _LOG.info("--- thinned ---------------------\n%s", "\n".join([*report_lines(report), *latencies]))
    _LOG.info("Saved thinned checkpoint to: %s", path)


def report_lines(report: ThinningReport) -> list[str]:
    """What went, what stays and why, and what the model has lost by it, a line each."""
    lines = [f"{name}: {tuple(was)} -> {tuple(now)}" for name, (was, now) in report.layers.items()]
    lines += [f"stays: {kept}" for kept in report.kept]
    for what, (was, now) in (("parameters", report.parameters), ("MACs", report.macs)):
        lines.append(f"{what}: {was:,} -> {now:,} ({was / max(1, now):.2f}x fewer)")
    return [*lines, f"outputs differ by {report.change:.1e} of their scale, on random input"]


def _resumed(compressor: ClassifierCompressor) -> tuple[Optimizer | None, CompressionScheduler]:
    """What the checkpoint holds beside weights; with `--exp-load-weights-from`, nothing."""
    args, checkpoint, model = compressor.args, compressor.checkpoint, compressor.model
    assert checkpoint is not None
    if not args.resumed_checkpoint_path:
        return None, CompressionScheduler(model)
    goes_on = not args.reset_optimizer
    optimizer = restore_optimizer(model, checkpoint) if goes_on else None
    has_policies = goes_on and bool((checkpoint.scheduler or {}).get("policies"))
    if has_policies and not args.compress:
        _LOG.warning(
            "no --compress: masks are kept, the states of the schedule's policies are not; give the "
            "checkpoint's schedule if training is to go on with it"
        )
    if not (has_policies and args.compress):
        scheduler = CompressionScheduler(model)
        restore_scheduler(scheduler, checkpoint, masks_only=True)
        return optimizer, scheduler
    scheduler = compressor.make_scheduler(optimizer or compressor.make_optimizer())
    restore_scheduler(scheduler, checkpoint)
    return restore_optimizer(model, checkpoint, optimizer), scheduler  # learning rates as they were saved


def _latencies(compressor: ClassifierCompressor, before: nn.Module, after: nn.Module) -> list[str]:
    """Median latencies of both, measured in turns."""
    lines = []
    for images in dict.fromkeys((1, compressor.args.batch_size)):
        was, now = measure_latencies(
            [before, after], compressor.input_shape, images, device=compressor.device
        )
        lines.append(
            f"median latency, batch {images} ({now.device}, {now.threads} thread{'s' * (now.threads > 1)}): "
            f"{1000 * was.median_s:.3f} ms -> {1000 * now.median_s:.3f} ms "
            f"({was.median_s / now.median_s:.2f}x as fast)"
        )
    return lines
