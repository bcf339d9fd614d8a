"""A classifier under compression: its model, data, schedule and run folder, put together.

What the program and a user's own script share. Training it is in `classifier_training.py`, the
other jobs are in `classifier_jobs.py`. Knows nothing about how flags are parsed.
"""

from __future__ import annotations

import logging
import random
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
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
)
from distiller.apputils.data_loaders import DataBundle, load_data
from distiller.apputils.datasets import dataset_info
from distiller.apputils.determinism import set_deterministic
from distiller.apputils.device import choose_device
from distiller.apputils.experiment import RunFolder
from distiller.apputils.meters import EvalResult
from distiller.apputils.progress import EpochProgress
from distiller.apputils.results_card import (
    Measurement,
    ResultsCard,
    build_card,
    measure,
    measurement_of,
    with_latencies_in_turns,
)
from distiller.apputils.training_loop import evaluate
from distiller.config import file_config
from distiller.data_loggers.loggers import Logger, NullLogger
from distiller.dataset_facts import infer_dataset
from distiller.errors import UsageError
from distiller.model_summaries import total_macs
from distiller.models import create_model, input_shape_for
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
        if ":" in args.arch:
            _check_user_model(self.model, args.arch, (1, *self.input_shape), self.facts.num_classes)
        self.macs = total_macs(self.model, (1, *self.input_shape))
        if self.checkpoint is not None:
            for note in self.checkpoint.notes:
                _LOG.warning("%s: %s", self.checkpoint.path, note)
            if self.checkpoint.quantizer is not None:
                rebuild_quantized(self.model, self.checkpoint.quantizer)
            load_state(self.model, self.checkpoint)
        self.model.to(self.device)

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

    def validate(self, epoch: int | None = None) -> EvalResult:
        """Evaluate on the validation set."""
        assert self.data.valid is not None
        return self._evaluate(self.model, self.data.valid, "validate", epoch)

    def test(self, model: nn.Module | None = None) -> EvalResult:
        """Evaluate on the test set, and log the result line."""
        result = self._evaluate(model if model is not None else self.model, self.data.test, "test")
        _LOG.info(result.line())
        return result

    @property
    def test_batch(self) -> int:
        """The images in a mini-batch of the test set."""
        return min(self.args.batch_size, self.data.test.num_samples)

    def measure(self, model: nn.Module, result: EvalResult | None) -> Measurement:
        """The figures of a model of this architecture."""
        stored = stored_params(model)
        return measure(
            model,
            result,
            self.input_shape,
            self.test_batch,
            device=self.device,
            macs=self.macs,
            bits_by_param=stored.bits,
            per_channel=stored.per_channel,
            stored=stored.tensors,
        )

    def card(
        self,
        result: EvalResult | None,
        reference: Measurement | None = None,
        reference_model: nn.Module | None = None,
    ) -> ResultsCard:
        """The results card of this model; with `reference_model`, latencies of both measured in turns."""
        measured = self.measure(self.model, result)
        if reference is not None and reference_model is not None:
            models = (self.model, reference_model)
            measured, reference = with_latencies_in_turns(
                measured, reference, models, self.input_shape, self.test_batch, self.device
            )
        return build_card(measured, reference)

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

    def _choose_seed(self) -> int:
        """Given, the resumed run's, or drawn; 0 for what does not train: the same images each time."""
        args = self.args
        if args.seed is not None:
            return args.seed
        if args.resumed_checkpoint_path and self.checkpoint is not None and "seed" in self.checkpoint.extras:
            return int(self.checkpoint.extras["seed"])
        trains = not (args.evaluate or args.sensitivity or args.qe_calibration is not None)
        return random.SystemRandom().randint(1, 100_000) if trains and not args.deterministic else 0


def _check_user_model(model: nn.Module, arch: str, shape: tuple[int, ...], num_classes: int) -> None:
    """See to it that a model of the user's own answers an image with a number for each class."""
    was_training = model.training
    try:
        with torch.no_grad():
            answer = model.eval()(torch.zeros(shape))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"arch: '{arch}' does not take images of shape {shape}: {reason}") from error
    model.train(was_training)
    is_fit = isinstance(answer, torch.Tensor) and answer.dim() == 2 and answer.shape[1] >= num_classes
    if not is_fit:
        got = tuple(answer.shape) if isinstance(answer, torch.Tensor) else type(answer).__name__
        raise UsageError(
            f"arch: '{arch}' must answer images of shape {shape} with logits of shape (1, {num_classes}), "
            f"got {got}; build it with the parameters num_classes and in_channels"
        )
