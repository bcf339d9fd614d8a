"""Training a classifier under its schedule, from an epoch or a checkpoint to the last epoch.

Knows nothing about flags' spelling; what an epoch does is in `training_loop.py`.
"""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import asdict

import numpy as np
import torch
from torch import nn

from distiller.apputils.activation_phases import ActivationPhases
from distiller.apputils.checkpoint import (
    read_checkpoint,
    restore_optimizer,
    restore_rng_state,
    restore_scheduler,
    save_checkpoint,
)
from distiller.apputils.distillation_job import NAME as DISTILLATION
from distiller.apputils.distillation_job import (
    add_distillation,
    refuse_lost_teacher,
    refuse_unlearned_exits,
    rehearse_hints,
    with_teachers,
)
from distiller.apputils.early_exit_job import with_early_exit
from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.apputils.measurement import Measurement
from distiller.apputils.meters import EvalResult
from distiller.apputils.model_checks import check_single_image
from distiller.apputils.progress import EpochProgress
from distiller.apputils.results_card import ResultsCard
from distiller.apputils.run_seed import split_extras
from distiller.apputils.scores import ScoreTracker
from distiller.apputils.stored_exits import joint_loss
from distiller.apputils.training_loop import train_epoch
from distiller.atomic_file import write_whole
from distiller.data_loggers.loggers import EpochRecord
from distiller.errors import DivergenceError, UsageError
from distiller.model_summaries import masks_sparsity_tbl_summary
from distiller.names import named_parameters
from distiller.schedule_yaml import read_document
from distiller.tensor_stats import sparsity_2D, to_np

_LOG = logging.getLogger(__name__)


class ClassifierTraining:
    """The training run that a classifier's flags ask for.

    Attributes:
        optimizer: of the model.
        scheduler: of the schedule, or one without policies.
        activations: the phases whose activations are looked at.
        tracker: of the best epochs.
        start: the epoch to begin with, from 0.

    Raises:
        UsageError: the checkpoint has been trained for so many epochs already, or for none.
        CheckpointError: it is of another optimizer or schedule.
    """

    def __init__(self, compressor: ClassifierCompressor) -> None:
        self.compressor = compressor
        self.args = compressor.args
        self.model = compressor.model
        self._criterion = joint_loss(self.model, self.args.earlyexit_lossweights)
        self.optimizer = compressor.make_optimizer()
        self._dense: nn.Module | None = None
        self._floating = copy.deepcopy(self.model) if _will_be_quantized(compressor) else None
        self.scheduler = compressor.make_scheduler(self.optimizer)
        add_distillation(self.scheduler, compressor)
        refuse_unlearned_exits(self.model, self.scheduler)
        rehearse_hints(self.scheduler, compressor)
        self.activations = ActivationPhases(self.model, self.args.activation_stats)
        self.tracker = ScoreTracker(self.args.num_best_scores)
        self._has_resumed_optimizer = False
        self.start = self._resume()
        end = self.args.epochs
        if self.start >= end:
            raise UsageError(
                f"--epochs {end}: nothing to do, the checkpoint has finished epoch {self.start - 1}; "
                f"give an ending epoch above {self.start}, or --reset-optimizer to begin at 0"
            )
        self._reference: Measurement | None = None

    def run(self) -> ResultsCard:
        """Train to `--epochs`, test, and return the results card.

        Raises:
            DivergenceError: the loss became NaN or infinite; the last epoch's checkpoint, if any, stays.
        """
        if self.compressor.data.valid_is_test:
            _LOG.warning(
                "no validation set (--validation-split 0): the test set is used, and is no longer unseen"
            )
        self._check_last_minibatch()
        _ = self.compressor.run  # opened: from here on files are written
        self._carry_best_over()
        if self.args.save_untrained_model:
            self._keep_untrained()
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
            with self.activations.collected("test", self.args.epochs - 1, self.compressor.run):
                result = self.compressor.test()
            card = self.compressor.card(result, self._reference, self._dense)
            card = with_early_exit(self.compressor, card)
        return with_teachers(card, self.compressor, self.scheduler)

    def _check_last_minibatch(self) -> None:
        """See to it that an epoch does not fail at its end, on a single image that is left over."""
        loader = self.compressor.data.train
        assert loader is not None
        if loader.num_samples % loader.batch_size == 1 or loader.batch_size == 1:
            image = torch.zeros(1, *self.compressor.input_shape, device=self.compressor.device)
            check_single_image(self.model, image)

    def _resume(self) -> int:
        """Take over what the checkpoint holds beside weights; returns the epoch to begin with."""
        checkpoint = self.compressor.checkpoint
        if checkpoint is None or not self.args.resumed_checkpoint_path:
            return 0
        goes_on = not self.args.reset_optimizer and checkpoint.epoch is not None
        if goes_on and checkpoint.extras.get("is_untrained") is True:
            raise UsageError(
                f"--resume-from {checkpoint.path}: is not trained yet, there is no epoch to go on after; "
                "add --reset-optimizer to begin at epoch 0"
            )
        takes_policies = goes_on and bool(self.scheduler.policies)
        if goes_on:
            refuse_lost_teacher(self.compressor, self.scheduler)
        if goes_on and not takes_policies and set(checkpoint.policies) - {DISTILLATION}:
            _LOG.warning("no --compress: the checkpoint's masks stay in force, its schedule does not go on")
        if takes_policies and not checkpoint.policies:
            _LOG.warning("the checkpoint has no schedule to go on with: the policies begin without a state")
        restore_scheduler(self.scheduler, checkpoint, masks_only=not takes_policies)
        if not goes_on:
            return 0
        restore_optimizer(self.model, checkpoint, self.optimizer)
        self._has_resumed_optimizer = checkpoint.optimizer is not None
        self._tell_optimizer(checkpoint.epoch)
        if "tracker" in checkpoint.extras:
            self.tracker.load_state_dict(checkpoint.extras["tracker"])
        assert checkpoint.epoch is not None
        return checkpoint.epoch + 1

    def _tell_optimizer(self, epoch: int | None) -> None:
        rate = float(self.optimizer.param_groups[0]["lr"])
        if self._has_resumed_optimizer:
            _LOG.info(
                "resumed after epoch %d; the optimizer goes on as it was saved, with learning rate %g: "
                "--lr, --momentum and --weight-decay take effect with --reset-optimizer only",
                epoch,
                rate,
            )
        else:
            _LOG.warning(
                "resumed after epoch %d; the checkpoint has no optimizer: a new one begins, "
                "with learning rate %g",
                epoch,
                rate,
            )

    def _advice(self, epoch: int) -> str:
        """What is left, and what to do, when the loss in an epoch is no longer finite."""
        has_checkpoint = self.start > 0 or (epoch > self.start and self.compressor.run.folder is not None)
        stop = "training stops here" + (" and the last checkpoint stays as it is" if has_checkpoint else "")
        if self._has_resumed_optimizer:
            return f"{stop}. Resume from an earlier checkpoint, or --reset-optimizer with a lower --lr"
        return f"{stop}. Try a lower --lr"

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

    def _keep_untrained(self) -> None:
        """Save the model that training begins with; a resumed run brings that of its beginning here."""
        checkpoint, folder = self.compressor.checkpoint, self.compressor.run.folder
        if folder is None:
            return
        name = f"{self.args.name}_untrained" if self.args.name else "untrained"
        if self.start == 0 or checkpoint is None:
            extras = {**split_extras(self.args, self.compressor.seed), "is_untrained": True}
            path = save_checkpoint(0, self.args.arch, self.model, extras=extras, name=name, dir=folder.path)
            _LOG.info("Saved untrained model to: %s", path)
            return
        kept = checkpoint.path.name.replace("checkpoint.pth.tar", "untrained_checkpoint.pth.tar")
        if kept != checkpoint.path.name and (path := checkpoint.path.with_name(kept)).is_file():
            write_whole(folder.path / f"{name}_checkpoint.pth.tar", path.read_bytes())
        else:
            _LOG.warning(
                "--save-untrained-model: without effect, this run goes on after epoch %d, and there is no %s "
                "beside its checkpoint",
                self.start - 1,
                kept,
            )

    def _find_reference(self) -> None:
        """What the run knows of the uncompressed model: what it starts from, if trained and not pruned."""
        compressor = self.compressor
        self._reference = compressor.known_reference()
        was_trained = compressor.checkpoint is not None or self.args.pretrained
        if self._reference or self.start > 0 or not was_trained or self.scheduler.masks.masked():
            return
        model = self.model if self._floating is None else self._floating
        if compressor.is_pruned(compressor.measure(model, None)):
            return
        _LOG.info("--- test of the model to start from ---------------------")
        self._dense = copy.deepcopy(model)
        figures = compressor.measure(self._dense, compressor.test(self._dense))
        [self._reference] = compressor.with_latencies((figures, self._dense))

    def _train_one_epoch(self, epoch: int) -> None:
        begin = time.perf_counter()
        rate = float(self.optimizer.param_groups[0]["lr"])
        compressor, scheduler = self.compressor, self.scheduler
        assert compressor.data.train is not None
        scheduler.on_epoch_begin(epoch, self.optimizer)
        with (
            self.activations.collected("train", epoch, compressor.run),
            EpochProgress(compressor.run.loggers, self.args.print_freq, self.optimizer) as report,
        ):
            trained = train_epoch(
                self.model,
                compressor.data.train,
                self.optimizer,
                scheduler,
                epoch,
                criterion=self._criterion,
                device=compressor.device,
                report=report,
                check_every=self.args.print_freq,
                advice=self._advice(epoch),
            )
        if self.args.masks_sparsity:
            table = masks_sparsity_tbl_summary(self.model, scheduler)
            _LOG.info("Sparsity of the masks after epoch %d:\n%s", epoch, table)
        _LOG.info("--- validate (epoch=%d) -----------", epoch)
        with scheduler.masked(), self.activations.collected("valid", epoch, compressor.run):
            result = compressor.validate(epoch)
        if not result.loss_is_finite:
            raise DivergenceError(
                f"epoch {epoch}: the validation loss is {result.loss}; {self._advice(epoch)}"
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
        values = parameter_values(self.model) if self.args.log_params_histograms else {}
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
            logger.log_parameter_histograms(epoch, values)
            logger.log_epoch(record)
        for score in self.tracker.best():
            _LOG.info(score.line())
        if self.compressor.run.folder is not None:
            self._save(epoch, is_best)

    def _save(self, epoch: int, is_best: bool) -> None:
        best = self.tracker.best()[0]
        extras = {
            **split_extras(self.args, self.compressor.seed),
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


def _will_be_quantized(compressor: ClassifierCompressor) -> bool:
    """Whether the schedule has a quantizer that is to prepare a model in floating point."""
    schedule = compressor.args.compress
    if schedule is None or compressor.is_quantized:
        return False
    data = read_document(schedule).data
    return isinstance(data, dict) and bool(data.get("quantizers"))


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


def parameter_values(model: nn.Module) -> dict[str, np.ndarray]:
    """The values of each parameter, as arrays in main memory."""
    return {name: to_np(param.float()) for name, param in named_parameters(model)}
