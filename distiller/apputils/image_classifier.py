"""A classifier under compression: its model, data, schedule and run folder, put together and trained.

What the program and a user's own script share. The other jobs (quantize, sweep, collect
statistics) are in `classifier_jobs.py`. Knows nothing about how flags are parsed.
"""

from __future__ import annotations

import copy
import logging
import random
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from distiller.apputils.checkpoint import (
    load_state,
    read_checkpoint,
    restore_optimizer,
    restore_rng_state,
    save_checkpoint,
)
from distiller.apputils.data_loaders import DataBundle, load_data
from distiller.apputils.datasets import dataset_info
from distiller.apputils.determinism import set_deterministic
from distiller.apputils.device import choose_device
from distiller.apputils.experiment import RunFolder
from distiller.apputils.meters import EvalResult
from distiller.apputils.progress import EpochProgress
from distiller.apputils.results_card import Measurement, ResultsCard, build_card, measurement_of
from distiller.apputils.scores import ScoreTracker
from distiller.apputils.training_loop import evaluate, train_epoch
from distiller.config import file_config
from distiller.data_loggers.loggers import EpochRecord, Logger, NullLogger
from distiller.dataset_facts import infer_dataset
from distiller.errors import DivergenceError, UsageError
from distiller.model_summaries import total_macs
from distiller.models import create_model, input_shape_for
from distiller.names import named_parameters
from distiller.quantization import rebuild_quantized, stored_params
from distiller.scheduler import CompressionScheduler

_LOG = logging.getLogger(__name__)
_OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@dataclass(frozen=True, slots=True)
class Run:
    """Where the files and figures of a run go.

    Attributes:
        folder: None: no files are written.
        loggers: take the figures of training.
    """

    folder: RunFolder | None
    loggers: tuple[Logger, ...] = (NullLogger(),)

    def require_folder(self) -> Path:
        """The folder of a job that cannot do without.

        Raises:
            UsageError: there is none.
        """
        if self.folder is None:
            raise UsageError("this job writes files and needs a run folder; pass open_run")
        return self.folder.path


class ClassifierCompressor:
    """A classifier, its data and its run folder.

    Args:
        args: settings by the names of the program's flags; read, never changed.
        open_run: makes the run folder and the loggers; called once, when everything that was asked
            for has been found to be in order. None: nothing is written.

    Raises:
        DistillerError: the settings cannot be met; nothing has been written.
    """

    def __init__(self, args: Namespace, open_run: Callable[[], Run] | None = None) -> None:
        self.args = args
        self._open_run = open_run
        self.device, device_ids = choose_device(args.device, args.cpu, args.gpus)
        source = args.resumed_checkpoint_path or args.load_model_path
        self.checkpoint = read_checkpoint(source) if source else None
        self.seed = self._choose_seed()
        _LOG.info("Random seed: %d", self.seed)
        set_deterministic(self.seed, args.deterministic)
        self.dataset: str = args.dataset or infer_dataset(args.arch)
        self.facts = dataset_info(self.dataset, args.data)
        self.input_shape = tuple(input_shape_for(args.arch, self.facts.channels, self.facts.size))
        self.model: nn.Module = create_model(
            args.pretrained,
            self.dataset,
            args.arch,
            parallel=not args.load_serialized,
            device_ids=device_ids,
            num_classes=self.facts.num_classes,
            input_shape=(1, *self.input_shape),
        )
        self.macs = total_macs(self.model, (1, *self.input_shape))
        if self.checkpoint is not None:
            for note in self.checkpoint.notes:
                _LOG.warning("%s: %s", self.checkpoint.path, note)
            if self.checkpoint.quantizer is not None:
                rebuild_quantized(self.model, self.checkpoint.quantizer)
            load_state(self.model, self.checkpoint)
        self.model.to(self.device)
        self._dense: nn.Module | None = None

    @cached_property
    def run(self) -> Run:
        """Where this run's files and figures go."""
        return self._open_run() if self._open_run is not None else Run(None)

    @cached_property
    def data(self) -> DataBundle:
        """The loaders; read from disk at the first use."""
        args = self.args
        return load_data(
            self.dataset,
            args.data,
            input_shape=self.input_shape,
            batch_size=args.batch_size,
            workers=args.workers,
            validation_split=args.validation_split,
            effective_train_size=args.effective_train_size,
            effective_valid_size=args.effective_valid_size,
            effective_test_size=args.effective_test_size,
            seed=self.seed,
            download=args.download,
        )

    @property
    def is_quantized(self) -> bool:
        """Whether the checkpoint was of a quantized model."""
        return self.checkpoint is not None and self.checkpoint.quantizer is not None

    def known_reference(self) -> Measurement | None:
        """The figures of the uncompressed model that the checkpoint keeps."""
        if self.checkpoint is None or self.checkpoint.extras.get("reference") is None:
            return None
        return measurement_of(self.checkpoint.extras["reference"], source=str(self.checkpoint.path))

    def make_optimizer(self) -> Optimizer:
        """The optimizer that the flags ask for."""
        args = self.args
        options: dict[str, Any] = {"lr": args.lr, "weight_decay": args.weight_decay}
        if args.optimizer == "sgd":
            options["momentum"] = args.momentum
        return _OPTIMIZERS[args.optimizer](self.model.parameters(), **options)

    def make_scheduler(self, optimizer: Optimizer | None) -> CompressionScheduler:
        """The scheduler of `--compress`, or one without policies."""
        if self.args.compress is None:
            return CompressionScheduler(self.model)
        return file_config(self.model, optimizer, self.args.compress, plugins=self.args.plugin)

    def resume(self, optimizer: Optimizer, scheduler: CompressionScheduler, tracker: ScoreTracker) -> int:
        """Take over what the checkpoint holds beside weights; returns the epoch to begin with.

        Raises:
            CheckpointError: its optimizer or schedule is not the one asked for.
        """
        checkpoint = self.checkpoint
        if checkpoint is None or not self.args.resumed_checkpoint_path:
            return 0
        goes_on = not self.args.reset_optimizer and checkpoint.epoch is not None
        state = dict(checkpoint.scheduler or {"masks": checkpoint.masks})
        if (not goes_on or not scheduler.policies) and state.pop("policies", None) and goes_on:
            _LOG.warning("no --compress: the checkpoint's masks stay in force, its schedule does not go on")
        scheduler.load_state_dict(state)
        if not goes_on:
            return 0
        restore_optimizer(self.model, checkpoint, optimizer)
        _LOG.info(
            "resumed after epoch %d; the optimizer goes on as it was saved, with learning rate %g: "
            "--lr, --momentum and --weight-decay take effect with --reset-optimizer only",
            checkpoint.epoch,
            float(optimizer.param_groups[0]["lr"]),
        )
        if "tracker" in checkpoint.extras:
            tracker.load_state_dict(checkpoint.extras["tracker"])
        if checkpoint.rng is not None:
            restore_rng_state(checkpoint.rng)
        assert checkpoint.epoch is not None
        return checkpoint.epoch + 1

    def train(self) -> tuple[CompressionScheduler, ResultsCard]:
        """Train to `--epochs` under the schedule, test, and return the scheduler and the results card.

        Raises:
            UsageError: the checkpoint has been trained for so many epochs already.
            DivergenceError: the loss became NaN or infinite; the last epoch's checkpoint stays.
        """
        optimizer = self.make_optimizer()
        scheduler = self.make_scheduler(optimizer)
        tracker = ScoreTracker(None, self.args.num_best_scores)
        start = self.resume(optimizer, scheduler, tracker)
        if start >= self.args.epochs:
            raise UsageError(
                f"--epochs {self.args.epochs}: nothing to do, the checkpoint has finished epoch {start - 1}; "
                f"give an ending epoch above {start}, or --reset-optimizer to begin at 0"
            )
        data = self.data
        if data.valid_is_test:
            _LOG.warning(
                "no validation set (--validation-split 0): the test set is used, and is no longer unseen"
            )
        _ = self.run  # opened: from here on files are written
        reference = self._reference(start, scheduler)
        _LOG.info(tracker.rule)
        for epoch in range(start, self.args.epochs):
            self._train_one_epoch(epoch, optimizer, scheduler, tracker, reference)
        _LOG.info("--- test ---------------------")
        with scheduler.masked():
            result = self.test()
            return scheduler, self.card(result, reference, self._dense)

    def validate(self, epoch: int | None = None) -> EvalResult:
        """Evaluate on the validation set."""
        assert self.data.valid is not None
        return self._evaluate(self.model, self.data.valid, "validate", epoch)

    def test(self, model: nn.Module | None = None) -> EvalResult:
        """Evaluate on the test set, and log the result line."""
        result = self._evaluate(model if model is not None else self.model, self.data.test, "test")
        _LOG.info(result.line())
        return result

    def measure(self, model: nn.Module, result: EvalResult | None) -> Measurement:
        """The figures of a model of this architecture."""
        return self._card(model, result).measured

    def card(
        self,
        result: EvalResult | None,
        reference: Measurement | None = None,
        reference_model: nn.Module | None = None,
    ) -> ResultsCard:
        """The results card of this model; arguments as of `build_card`."""
        return self._card(self.model, result, reference=reference, reference_model=reference_model)

    def _card(self, model: nn.Module, result: EvalResult | None, **options: Any) -> ResultsCard:
        stored = stored_params(model)
        return build_card(
            model,
            result,
            self.input_shape,
            self.args.batch_size,
            device=self.device,
            macs=self.macs,
            bits_by_param=stored.bits,
            per_channel=stored.per_channel,
            stored=stored.tensors,
            **options,
        )

    def _train_one_epoch(
        self,
        epoch: int,
        optimizer: Optimizer,
        scheduler: CompressionScheduler,
        tracker: ScoreTracker,
        reference: Measurement | None,
    ) -> None:
        begin = time.perf_counter()
        rate = float(optimizer.param_groups[0]["lr"])
        assert self.data.train is not None
        scheduler.on_epoch_begin(epoch, optimizer)
        with EpochProgress(self.run.loggers, self.args.print_freq, optimizer) as report:
            trained = train_epoch(
                self.model,
                self.data.train,
                optimizer,
                scheduler,
                epoch,
                device=self.device,
                report=report,
                check_every=self.args.print_freq,
            )
        _LOG.info("--- validate (epoch=%d) -----------", epoch)
        with scheduler.masked():
            result = self.validate(epoch)
        if not result.loss_is_finite:
            raise DivergenceError(
                f"epoch {epoch}: the validation loss is {result.loss}; training stops here and the last "
                "checkpoint stays as it is. Try a lower --lr"
            )
        scheduler.on_epoch_end(epoch, optimizer, {"loss": result.loss, "top1": result.top1})
        with scheduler.masked():
            by_param, total, nnz = weight_sparsity(self.model)
            is_best = tracker.step(
                epoch, result.top1, result.top5, result.loss, total, nnz, scheduler.pruning_is_complete(epoch)
            )
            record = EpochRecord(
                epoch, rate, trained.loss, trained.top1, trained.top5, result.loss, result.top1, result.top5,
                total, time.perf_counter() - begin,
            )  # fmt: skip
            for logger in self.run.loggers:
                logger.log_validation(epoch, result.loss, result.top1, result.top5)
                logger.log_weight_sparsity(epoch, by_param, total)
                logger.log_epoch(record)
            for score in tracker.best():
                _LOG.info(score.line())
            self._save(epoch, optimizer, scheduler, tracker, reference, is_best)

    def _save(
        self,
        epoch: int,
        optimizer: Optimizer,
        scheduler: CompressionScheduler,
        tracker: ScoreTracker,
        reference: Measurement | None,
        is_best: bool,
    ) -> None:
        if self.run.folder is None:
            return
        best = tracker.best()[0]
        extras = {
            "seed": self.seed,
            "tracker": tracker.state_dict(),
            "best_top1": best.top1,
            "best_epoch": best.epoch,
            "reference": None if reference is None else asdict(reference),
        }
        name, folder = self.args.name, self.run.folder.path
        path = save_checkpoint(
            epoch, self.args.arch, self.model, optimizer, scheduler, extras, is_best, name, folder
        )
        _LOG.info("Saved checkpoint to: %s", path)

    def _evaluate(self, model: nn.Module, loader: Any, phase: str, epoch: int | None = None) -> EvalResult:
        _LOG.info("%d samples (%d per mini-batch)", loader.num_samples, loader.batch_size)
        classes = self.facts.num_classes if self.args.display_confusion else None
        with EpochProgress(self.run.loggers, self.args.print_freq) as report:
            result = evaluate(
                model,
                loader,
                device=self.device,
                report=report,
                phase=phase,
                epoch=epoch,
                num_classes=classes,
            )
        if result.confusion is not None:
            matrix = np.array2string(
                result.confusion.numpy(), threshold=sys.maxsize, max_line_width=sys.maxsize
            )
            _LOG.info("confusion matrix (rows: true class, columns: predicted):\n%s", matrix)
        return result

    def _reference(self, start: int, scheduler: CompressionScheduler) -> Measurement | None:
        """What the run knows of the uncompressed model: the weights it starts from, if they were trained."""
        known = self.known_reference()
        if known is not None:
            return known
        was_trained = self.checkpoint is not None or self.args.pretrained
        if start > 0 or not was_trained or scheduler.masks.masked():
            return None
        _LOG.info("--- test of the model to start from ---------------------")
        self._dense = copy.deepcopy(self.model)
        return self.measure(self._dense, self.test(self._dense))

    def _choose_seed(self) -> int:
        """Given, the resumed run's, or drawn; 0 for what does not train: the same images each time."""
        args = self.args
        if args.seed is not None:
            return args.seed
        if args.resumed_checkpoint_path and self.checkpoint is not None and "seed" in self.checkpoint.extras:
            return int(self.checkpoint.extras["seed"])
        trains = not (args.evaluate or args.sensitivity or args.qe_calibration is not None)
        return random.SystemRandom().randint(1, 100_000) if trains and not args.deterministic else 0


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
