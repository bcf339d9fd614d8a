"""A classifier under compression: its model, data, schedule and run folder, put together.

What the program and a user's own script share. Training it is in `classifier_training.py`, the
other jobs are in `classifier_jobs.py`. Knows nothing about how flags are parsed.
"""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from distiller.apputils.checkpoint import (
    Checkpoint,
    load_state,
    read_checkpoint,
    restore_quantizer,
    restore_structure,
)
from distiller.apputils.data_loaders import DataBundle, load_data
from distiller.apputils.datasets import dataset_info
from distiller.apputils.determinism import set_deterministic
from distiller.apputils.device import choose_device
from distiller.apputils.exit_scores import evaluate
from distiller.apputils.experiment import RunFolder
from distiller.apputils.measurement import Measurement, measure, measurement_of, with_latencies
from distiller.apputils.meters import EvalResult
from distiller.apputils.model_checks import check_arch, check_finite, check_user_model
from distiller.apputils.packing_usage import packs_only
from distiller.apputils.progress import EpochProgress
from distiller.apputils.results_card import ResultsCard, build_card
from distiller.apputils.run_seed import choose_seed, seed_warning, split_warning
from distiller.apputils.stored_exits import prepared_exits
from distiller.apputils.structure import history_of, recipes_of
from distiller.config import file_config
from distiller.data_loggers.loggers import Logger, NullLogger
from distiller.dataset_facts import infer_dataset
from distiller.early_exit.branches import attach_stored_exits, stored_exits
from distiller.errors import CheckpointError, UsageError
from distiller.factorization.replacement import factorizations_of
from distiller.model_summaries import total_macs
from distiller.models import create_model, input_shape_for
from distiller.quantization import Quantizer, stored_params
from distiller.scheduler import CompressionScheduler

_LOG = logging.getLogger(__name__)
_LATENCY_MACS = 250 * 10**9
"""Work of a timed mini-batch: about ten seconds of one core. Small ones are timed whatever they cost."""
_LATENCY_IMAGES = 256
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
        self.seed = choose_seed(args, self.checkpoint, trains=self.trains)
        _LOG.info("Random seed: %d", self.seed)
        set_deterministic(self.seed, args.deterministic)
        check_arch(args.arch)
        self.dataset: str = args.dataset or infer_dataset(args.arch)
        if self.checkpoint is not None:
            self._check_run_of(self.checkpoint)
        self.facts = dataset_info(self.dataset, args.data)
        self.input_shape = tuple(input_shape_for(args.arch, self.facts.channels, self.facts.size))
        self._device_ids = device_ids
        self.model: nn.Module = self._create_model(args.pretrained)
        if ":" in args.arch:
            check_user_model(self.model, args.arch, (1, *self.input_shape), self.facts.num_classes)
        self.quantizer: Quantizer | None = None
        self._macs: dict[int, int] = {}
        self.macs = self._macs_of(self.model)
        if self.checkpoint is not None:
            for note in self.checkpoint.notes:
                _LOG.warning("%s: %s", self.checkpoint.path, note)
            restore_structure(self.model, self.checkpoint)
            self._macs_of(self.model)  # before it is quantized: its layers are counted as they were
            self.quantizer = restore_quantizer(self.model, self.checkpoint)
            load_state(self.model, self.checkpoint)
            check_finite(self.model, self.checkpoint.path)
        self._placed(prepared_exits(self))

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

    @property
    def trains(self) -> bool:
        """Whether the flags ask for training and no other job."""
        args = self.args
        others = (args.evaluate, args.sensitivity, args.summary, args.export_onnx, args.export_int8)
        collects = args.qe_calibration is not None or args.activation_histograms is not None
        others = (*others, args.thinnify, args.layerwise, args.recommend)
        return not any((*others, collects, packs_only(args)))

    @property
    def goes_on(self) -> bool:
        """Whether the flags ask for the training of the checkpoint to go on where it ended."""
        return self.trains and bool(self.args.resumed_checkpoint_path) and not self.args.reset_optimizer

    def known_reference(self) -> Measurement | None:
        """The figures of the uncompressed model that the checkpoint keeps."""
        return self._kept_figures("reference")

    @property
    def is_thinned(self) -> bool:
        """Whether the model is physically smaller than its architecture."""
        return bool(recipes_of(self.model))

    @property
    def is_factored(self) -> bool:
        """Whether layers of the model are products of smaller ones."""
        return any(recipe.layers for recipe in factorizations_of(self.model))

    @property
    def is_smaller(self) -> bool:
        """Whether the model has another structure than its architecture: it is thinned, or factored."""
        return self.is_thinned or self.is_factored

    def whole(self, known: Measurement | None) -> tuple[Measurement, nn.Module]:
        """The whole architecture of a thinned or factored model, its exits too, with fresh weights.

        Args:
            known: figures of the uncompressed model; None: of the fresh weights, without accuracy.
        """
        with torch.random.fork_rng(devices=[]):
            model = self._create_model()
            if exits := stored_exits(self.model):
                attach_stored_exits(model, exits)
            model = self._placed(model)
        return self.measure(model, None) if known is None else replace(known, source=None), model

    def is_pruned(self, figures: Measurement) -> bool:
        """Whether this model is smaller, or it, or its checkpoint's masks, have zeros not left by training.

        Args:
            figures: of the model in float32.
        """
        return self.is_smaller or figures.has_pruned_weights or self._has_masks_that_prune()

    def make_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The optimizer that the flags ask for, of this model or another of its architecture.

        Raises:
            UsageError: the model has nothing to train.
        """
        args = self.args
        model = model if model is not None else self.model
        if not any(param.requires_grad for param in model.parameters()):
            raise UsageError(
                f"arch: '{args.arch}' has no parameters that can be trained; "
                "give a model that has some, or test this one with --evaluate"
            )
        options: dict[str, Any] = {"lr": args.lr, "weight_decay": args.weight_decay}
        if args.optimizer == "sgd":
            options["momentum"] = args.momentum
        return _OPTIMIZERS[args.optimizer](model.parameters(), **options)

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
    def latency_batch(self) -> int:
        """The images of a mini-batch that is timed: the evaluation's, fewer when that takes too long."""
        evaluated = min(self.args.batch_size, self.data.test.num_samples)
        return min(evaluated, max(_LATENCY_IMAGES, _LATENCY_MACS // max(1, self.macs)))

    def measure(self, model: nn.Module, result: EvalResult | None) -> Measurement:
        """The figures of a model of this architecture, all but its latencies."""
        stored = stored_params(model)
        return measure(
            model,
            result,
            macs=self._macs_of(model),
            bits_by_param=stored.bits,
            per_channel=stored.per_channel,
            stored=stored.tensors,
        )

    def with_latencies(self, *pairs: tuple[Measurement, nn.Module]) -> list[Measurement]:
        """Figures of models of this architecture with their latencies, measured side by side."""
        figures, models = zip(*pairs, strict=True)
        return with_latencies(figures, models, self.input_shape, self.latency_batch, self.device)

    def card(
        self,
        result: EvalResult | None,
        reference: Measurement | None = None,
        reference_model: nn.Module | None = None,
    ) -> ResultsCard:
        """The results card of this model; with `reference_model`, latencies of both measured in turns.

        Beside a thinned or factored model that has none, its whole architecture is measured.
        """
        measured = self.measure(self.model, result)
        if reference_model is None and self.is_smaller:
            reference, reference_model = self.whole(reference)
        if reference is None or reference_model is None:
            [measured] = self.with_latencies((measured, self.model))
        else:
            measured, reference = self.with_latencies((measured, self.model), (reference, reference_model))
        before = self._kept_figures("before_quantization")
        return build_card(
            measured, reference, before=before, is_thinned=self.is_thinned, is_factored=self.is_factored
        )

    def _create_model(self, pretrained: bool = False) -> nn.Module:
        return create_model(
            pretrained,
            self.dataset,
            self.args.arch,
            parallel=not self.args.load_serialized,
            device_ids=self._device_ids,
            num_classes=self.facts.num_classes,
            input_shape=(1, *self.input_shape),
        )

    def _placed(self, model: nn.Module) -> nn.Module:
        """The model, moved where and laid out as the flags ask for."""
        layout = torch.channels_last if self.args.channels_last else torch.preserve_format
        return model.to(self.device).to(memory_format=layout)

    def _macs_of(self, model: nn.Module) -> int:
        """For one image; counted once for each structure that the model has gone through."""
        stage = len(history_of(model))
        if stage not in self._macs:
            self._macs[stage] = total_macs(model, (1, *self.input_shape))
        return self._macs[stage]

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

    def _check_run_of(self, checkpoint: Checkpoint) -> None:
        """See to it that what goes on is the run that the checkpoint is of.

        Raises:
            CheckpointError: it was on other data.
        """
        if checkpoint.dataset not in (None, self.dataset):
            theirs, ours = checkpoint.dataset, self.dataset
            told = f"{checkpoint.path}: is of data set '{theirs}', this run is on '{ours}'"
            if self.goes_on:
                raise CheckpointError(
                    f"{told}; give --dataset {theirs}, or take the weights only, with --exp-load-weights-from"
                )
            _LOG.warning("%s", told)
        trains, goes_on = self.trains, self.goes_on
        for warning in (
            seed_warning(self.args, checkpoint, self.seed, trains=trains, goes_on=goes_on),
            split_warning(self.args, checkpoint, trains=trains, goes_on=goes_on),
        ):
            if warning is not None:
                _LOG.warning("%s", warning)

    def _kept_figures(self, name: str) -> Measurement | None:
        """Figures of another model that the checkpoint keeps in its extras."""
        if self.checkpoint is None or self.checkpoint.extras.get(name) is None:
            return None
        return measurement_of(self.checkpoint.extras[name], source=str(self.checkpoint.path))

    def _has_masks_that_prune(self) -> bool:
        if self.checkpoint is None:
            return False
        masks = self.checkpoint.masks or (self.checkpoint.scheduler or {}).get("masks", {})
        by_slot = (slots if isinstance(slots, dict) else {"": slots} for slots in masks.values())
        return any(not mask.all() for slots in by_slot for mask in slots.values())
