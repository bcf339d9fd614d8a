"""Training a classifier under its schedule, from an epoch or a checkpoint to the last epoch.

Knows nothing about flags' spelling; what an epoch does is in `training_loop.py`.
"""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import asdict

import torch
from torch import nn

from distiller.apputils.checkpoint import (
    read_checkpoint,
    restore_optimizer,
    restore_rng_state,
    restore_scheduler,
    save_checkpoint,
)
from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.apputils.measurement import Measurement
from distiller.apputils.meters import EvalResult
from distiller.apputils.progress import EpochProgress
from distiller.apputils.results_card import ResultsCard
from distiller.apputils.scores import ScoreTracker
from distiller.apputils.training_loop import train_epoch
from distiller.atomic_file import write_whole
from distiller.data_loggers.loggers import EpochRecord
from distiller.errors import DivergenceError, UsageError
from distiller.names import named_parameters
from distiller.tensor_stats import sparsity_2D

_LOG = logging.getLogger(__name__)


class ClassifierTraining:
    """The training run that a classifier's flags ask for.

    Attributes:
        optimizer: of the model.
        scheduler: of the schedule, or one without policies.
        tracker: of the best epochs.
        start: the epoch to begin with, from 0.

    Raises:
        UsageError: the checkpoint has been trained for so many epochs already.
        CheckpointError: it is of another optimizer or schedule.
    """

    def __init__(self, compressor: ClassifierCompressor) -> None:
        self.compressor = compressor
        self.args = compressor.args
        self.model = compressor.model
        self.optimizer = compressor.make_optimizer()
        self.scheduler = compressor.make_scheduler(self.optimizer)
        self.tracker = ScoreTracker(self.args.num_best_scores)
        self.start = self._resume()
        end = self.args.epochs
        if self.start >= end:
            raise UsageError(
                f"--epochs {end}: nothing to do, the checkpoint has finished epoch {self.start - 1}; "
                f"give an ending epoch above {self.start}, or --reset-optimizer to begin at 0"
            )
        self._reference: Measurement | None = None
        self._dense: nn.Module | None = None

    def run(self) -> ResultsCard:
        """Train to `--epochs`, test, and return the results card.

        Raises:
            DivergenceError: the loss became NaN or infinite; the last epoch's checkpoint stays.
        """
        if self.compressor.data.valid_is_test:
            _LOG.warning(
                "no validation set (--validation-split 0): the test set is used, and is no longer unseen"
            )
        _ = self.compressor.run  # opened: from here on files are written
        self._carry_best_over()
        self._find_reference()
        for note in self.scheduler.idle_notes(self.start, self.args.epochs):
            _LOG.warning(note)
        _LOG.info(self.tracker.rule)
        checkpoint = self.compressor.checkpoint
        if self.start > 0 and checkpoint is not None and checkpoint.rng is not None:
            restore_rng_state(checkpoint.rng)  # last: reading the data may have drawn random numbers
        for epoch in range(self.start, self.args.epochs):
            self._train_one_epoch(epoch)
        _LOG.info("--- test ---------------------")
        with self.scheduler.masked():
            return self.compressor.card(self.compressor.test(), self._reference, self._dense)

    def _resume(self) -> int:
        """Take over what the checkpoint holds beside weights; returns the epoch to begin with."""
        checkpoint = self.compressor.checkpoint
        if checkpoint is None or not self.args.resumed_checkpoint_path:
            return 0
        goes_on = not self.args.reset_optimizer and checkpoint.epoch is not None
        takes_policies = goes_on and bool(self.scheduler.policies)
        if goes_on and not takes_policies and (checkpoint.scheduler or {}).get("policies"):
            _LOG.warning("no --compress: the checkpoint's masks stay in force, its schedule does not go on")
        restore_scheduler(self.scheduler, checkpoint, masks_only=not takes_policies)
        if not goes_on:
            return 0
        restore_optimizer(self.model, checkpoint, self.optimizer)
        _LOG.info(
            "resumed after epoch %d; the optimizer goes on as it was saved, with learning rate %g: "
            "--lr, --momentum and --weight-decay take effect with --reset-optimizer only",
            checkpoint.epoch,
            float(self.optimizer.param_groups[0]["lr"]),
        )
        if "tracker" in checkpoint.extras:
            self.tracker.load_state_dict(checkpoint.extras["tracker"])
        assert checkpoint.epoch is not None
        return checkpoint.epoch + 1

    def _carry_best_over(self) -> None:
        """Bring the resumed run's best checkpoint here: this run may never save a better one."""
        checkpoint, folder = self.compressor.checkpoint, self.compressor.run.folder
        if self.start == 0 or folder is None or checkpoint is None or not self.tracker.best():
            return
        name = checkpoint.path.name
        best = checkpoint.path.with_name(name.replace("checkpoint.pth.tar", "best.pth.tar"))
        if best.name == name or not best.is_file():
            return
        # A best file beside an older copy of a checkpoint may be of a later epoch than it knows of.
        if read_checkpoint(best).epoch == self.tracker.best()[0].epoch:
            prefix = f"{self.args.name}_" if self.args.name else ""
            write_whole(folder.path / f"{prefix}best.pth.tar", best.read_bytes())

    def _find_reference(self) -> None:
        """What the run knows of the uncompressed model: what it starts from, if trained and not pruned."""
        compressor = self.compressor
        self._reference = compressor.known_reference()
        was_trained = compressor.checkpoint is not None or self.args.pretrained
        if self._reference or self.start > 0 or not was_trained or self.scheduler.masks.masked():
            return
        if compressor.is_pruned(compressor.measure(self.model, None)):
            return
        _LOG.info("--- test of the model to start from ---------------------")
        self._dense = copy.deepcopy(self.model)
        figures = compressor.measure(self._dense, compressor.test(self._dense))
        [self._reference] = compressor.with_latencies((figures, self._dense))

    def _train_one_epoch(self, epoch: int) -> None:
        begin = time.perf_counter()
        rate = float(self.optimizer.param_groups[0]["lr"])
        compressor, scheduler = self.compressor, self.scheduler
        assert compressor.data.train is not None
        scheduler.on_epoch_begin(epoch, self.optimizer)
        with EpochProgress(compressor.run.loggers, self.args.print_freq, self.optimizer) as report:
            trained = train_epoch(
                self.model,
                compressor.data.train,
                self.optimizer,
                scheduler,
                epoch,
                device=compressor.device,
                report=report,
                check_every=self.args.print_freq,
            )
        _LOG.info("--- validate (epoch=%d) -----------", epoch)
        with scheduler.masked():
            result = compressor.validate(epoch)
        if not result.loss_is_finite:
            raise DivergenceError(
                f"epoch {epoch}: the validation loss is {result.loss}; training stops here and the last "
                "checkpoint stays as it is. Try a lower --lr"
            )
        scheduler.on_epoch_end(epoch, self.optimizer, {"loss": result.loss, "top1": result.top1})
        with scheduler.masked():
            self._finish_epoch(epoch, rate, trained, result, begin)

    def _finish_epoch(
        self, epoch: int, rate: float, trained: EvalResult, valid: EvalResult, begin: float
    ) -> None:
        """Log the epoch, rank it, and save it."""
        by_param, total, nnz = weight_sparsity(self.model)
        kernels = kernel_sparsity(self.model)
        is_complete = self.scheduler.pruning_is_complete(epoch)
        is_best = self.tracker.step(epoch, valid.top1, valid.top5, valid.loss, total, nnz, is_complete)
        record = EpochRecord(
            epoch, rate, trained.loss, trained.top1, trained.top5, valid.loss, valid.top1, valid.top5,
            total, time.perf_counter() - begin,
        )  # fmt: skip
        for logger in self.compressor.run.loggers:
            logger.log_validation(epoch, valid.loss, valid.top1, valid.top5)
            logger.log_weight_sparsity(epoch, by_param, total)
            logger.log_kernel_sparsity(epoch, kernels)
            logger.log_epoch(record)
        for score in self.tracker.best():
            _LOG.info(score.line())
        if self.compressor.run.folder is not None:
            self._save(epoch, is_best)

    def _save(self, epoch: int, is_best: bool) -> None:
        best = self.tracker.best()[0]
        extras = {
            "seed": self.compressor.seed,
            "tracker": self.tracker.state_dict(),
            "best_top1": best.top1,
            "best_epoch": best.epoch,
            "reference": None if self._reference is None else asdict(self._reference),
        }
        path = save_checkpoint(
            epoch,
            self.args.arch,
            self.model,
            self.optimizer,
            self.scheduler,
            extras,
            is_best,
            self.args.name,
            self.compressor.run.require_folder(),
        )
        _LOG.info("Saved checkpoint to: %s", path)


def weight_sparsity(model: nn.Module) -> tuple[dict[str, float], float, int]:
    """Sparsity by weight tensor (2-D and up), of all of them together, and non-zero parameters in all."""
    by_param, zeros, elements, nonzeros = {}, 0, 0, 0
    for name, param in named_parameters(model):
        kept = int(torch.count_nonzero(param))
        nonzeros += kept
        if param.dim() >= 2:
            by_param[name] = 1 - kept / param.numel()
            zeros += param.numel() - kept
            elements += param.numel()
    return by_param, zeros / elements if elements else 0.0, nonzeros


def kernel_sparsity(model: nn.Module) -> dict[str, float]:
    """The fraction of all-zero kernels (convolutions) or rows (matrices) of each weight tensor."""
    return {name: sparsity_2D(param) for name, param in named_parameters(model) if param.dim() >= 2}
