"""The program's job `--evaluate --quantize-eval`: quantize after training, in steps; test before and after.

Searches and learned rounding keep their states in the run folder, for `--qe-resume`.
Knows nothing about what the steps do.
"""

from __future__ import annotations

import copy
import logging
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from distiller.apputils.checkpoint import save_checkpoint
from distiller.apputils.image_classifier import ClassifierCompressor
from distiller.apputils.int8_job import check_export, export_int8
from distiller.apputils.meters import EvalResult
from distiller.apputils.pytorch_int8_job import evaluate_in_pytorch
from distiller.apputils.quantization_report_job import write_report
from distiller.apputils.quantization_steps import (
    RESUMABLE,
    SEARCHES,
    begin_record,
    check_resumable,
    steps_identity,
    steps_of_flags,
    told_of_flags,
)
from distiller.apputils.results_card import ResultsCard, build_card
from distiller.apputils.sampling import fingerprint
from distiller.apputils.statistics_job import (
    StatsCollector,
    calibration_batches,
    calibration_share,
    collected,
    name_operations,
)
from distiller.apputils.training_loop import evaluate
from distiller.config import config_component_from_file_by_class, post_training_steps
from distiller.data_loggers.quant_stats import STATS_FILE
from distiller.dummy_input import get_dummy_input
from distiller.errors import QuantizationError, UnknownNameError, UsageError
from distiller.functional_modules import to_modules
from distiller.names import strip_wrappers, unwrap
from distiller.quantization import PostTrainLinearQuantizer
from distiller.quantization.data_steps import DataSteps
from distiller.quantization.functional_operations import is_converted
from distiller.quantization.ptq_settings import parse_multiplier_bits
from distiller.quantization.refinement import float_twin
from distiller.quantization.search.copies import identity_of, lacks_statistics
from distiller.quantization.with_data import QuantizedWithData, quantize_with_data
from distiller.schedule_shape import STEPS
from distiller.schedule_yaml import read_document

_LOG = logging.getLogger(__name__)
DEFAULT_SEARCH = 0.05
"""Share of the training set that the searches measure the loss on."""
_FLAGS = {
    "bits_activations": "--qe-bits-acts",
    "bits_weights": "--qe-bits-wts",
    "bits_accum": "--qe-bits-accum",
    "clip_n_stds": "--qe-clip-n-stds",
}
"""The flag of a setting of the quantizer, by the name that its errors begin with."""


def quantize_and_evaluate(compressor: ClassifierCompressor) -> ResultsCard:
    """Test the model, quantize it, test it again, and save the quantized checkpoint.

    The uncompressed model on the card is the one that the checkpoint knows of; this one, when it is
    not pruned and knows of none.
    """
    check_export(compressor)
    _ = compressor.data
    dense = copy.deepcopy(compressor.model)
    quantization = _Quantization(compressor)
    quantizer, float_model = quantization.run()
    compressor.model = quantizer.model
    folder = compressor.run.require_folder()
    quantization.save_statistics(folder)
    quantizer.save_per_layer_parameters(folder)
    _LOG.info("--- test before quantization ---------------------")
    before = compressor.test(dense)
    _LOG.info("--- test after quantization (simulated) ---------------------")
    after = compressor.test()
    card = _card(compressor, dense, before, after)
    extras = {
        "quantized_top1": after.top1,
        "reference": None if card.reference is None else asdict(card.reference),
        "before_quantization": None if card.before is None else asdict(card.before),
    }
    name = f"{compressor.args.name}_quantized" if compressor.args.name else "quantized"
    path = save_checkpoint(0, compressor.args.arch, compressor.model, extras=extras, name=name, dir=folder)
    _LOG.info("Saved quantized checkpoint to: %s", path)
    if compressor.args.qe_report:
        assert float_model is not None
        write_report(compressor, float_model)
    if compressor.args.export_int8:
        export_int8(compressor, dense, before)
    if compressor.args.qe_convert_pytorch:
        evaluate_in_pytorch(compressor)
    return card


def _card(
    compressor: ClassifierCompressor, dense: nn.Module, before: EvalResult, after: EvalResult
) -> ResultsCard:
    """The quantized model beside the one it was, and the uncompressed one."""
    figures = compressor.measure(dense, before)
    card = compressor.card(after, figures, dense)
    uncompressed = compressor.known_reference()
    if compressor.is_smaller:
        uncompressed, whole = compressor.whole(uncompressed)
        measured, thin, uncompressed = compressor.with_latencies(
            (card.measured, compressor.model), (figures, dense), (uncompressed, whole)
        )
        return build_card(
            measured,
            uncompressed,
            before=thin,
            is_thinned=compressor.is_thinned,
            is_factored=compressor.is_factored,
        )
    if uncompressed is not None or compressor.is_pruned(figures):
        return build_card(card.measured, uncompressed, before=card.reference)
    return card


class _Quantization:
    """One quantization: the settings, the steps, the data."""

    def __init__(self, compressor: ClassifierCompressor) -> None:
        self.compressor, self.args = compressor, compressor.args
        self.portion = calibration_share(compressor)
        self.dummy_input = get_dummy_input(device=compressor.device, input_shape=(1, *compressor.input_shape))
        self.collector: StatsCollector | None = None
        self.collects = False

    def run(self) -> tuple[PostTrainLinearQuantizer, nn.Module | None]:
        """The prepared quantizer; and what its model was in floating point, where that is kept."""
        args, model = self.args, self.compressor.model
        steps = self._steps()
        if args.qe_config_file:
            quantizer = _quantizer_of_file(model, args.qe_config_file)
            self._check_ranges_of_file(quantizer, steps)
        else:
            quantizer = self._quantizer()
        folder = self._begun(quantizer, steps)
        if self.collects and (not steps.names or args.qe_scale_approx_bits is not None):
            quantizer = _quantizer_of_flags(model, _with(args, qe_stats_file=self._collect(model)))
        if steps.names:
            result = self._with_data(quantizer, steps, folder)
            return result.quantizer, result.float_model
        twin = copy.deepcopy(unwrap(model)) if args.qe_report else None
        quantizer.prepare_model(self.dummy_input)
        if twin is None:
            return quantizer, None
        if is_converted(unwrap(quantizer.model)):
            to_modules(twin, self.dummy_input)
        return quantizer, float_twin(twin, self.dummy_input)

    def save_statistics(self, folder: Path) -> None:
        """Write the statistics that were collected, if any were."""
        if self.collector is not None:
            self.collector.save(folder / STATS_FILE)

    def _steps(self) -> DataSteps:
        args = self.args
        if not args.qe_config_file:
            return steps_of_flags(args)
        steps = post_training_steps(args.qe_config_file)
        if args.qe_resume and not set(steps.names) & set(RESUMABLE):
            raise UsageError(
                f"--qe-resume: {args.qe_config_file} has no step that can be resumed; leave the flag out"
            )
        needless = [flag for flag, is_given in (
            ("--qe-search-size", args.qe_search_size is not None),
            ("--lapq-eval-memoize-dataloader", args.lapq_eval_memoize_dataloader),
        ) if is_given]  # fmt: skip
        if needless and not set(steps.names) & set(SEARCHES):
            raise UsageError(f"{needless[0]}: {args.qe_config_file} has no search; leave the flag out")
        return steps

    def _check_ranges_of_file(self, quantizer: PostTrainLinearQuantizer, steps: DataSteps) -> None:
        """Tell where the ranges of a file without statistics come from; refuse flags that need others."""
        args, where = self.args, f"--qe-config-file {self.args.qe_config_file}"
        lacks = lacks_statistics(quantizer) and quantizer.settings()["fpq_module"] is None
        self.collects = lacks and bool(steps.names)
        if args.qe_one_pass and not self.collects:
            raise UsageError(f"--qe-one-pass: without effect, with {where} no statistics are collected")
        remedy = (
            "collect statistics with --qe-calibration, and give their file there, as model_activation_stats"
        )
        if self.collects:
            _LOG.info(
                "%s: has no model_activation_stats, and steps need fixed ranges: calibrating on %.0f %% of "
                "the training set",
                where,
                100 * self.portion,
            )
        elif lacks:
            for name in ("qe_report", "qe_convert_pytorch"):
                if getattr(args, name):
                    raise UsageError(
                        f"--{name.replace('_', '-')}: needs fixed ranges, {args.qe_config_file} takes those "
                        f"of each batch; {remedy}"
                    )
            _LOG.warning(
                "%s: has no model_activation_stats: ranges of activations are those of each batch, as with "
                "--qe-dynamic; for fixed ranges %s",
                where,
                remedy,
            )

    def _quantizer(self) -> PostTrainLinearQuantizer:
        """The quantizer that the flags ask for, not prepared, without statistics that are to be collected."""
        args, model = self.args, self.compressor.model
        is_weights_only = args.qe_bits_acts == 0 and args.qe_calibration is None
        if args.qe_stats_file or args.qe_dynamic or is_weights_only or args.qe_fpq is not None:
            return _quantizer_of_flags(model, args)
        name_operations(self.compressor)
        # What is wrong with the flags is told before statistics are collected, which may take long.
        parse_multiplier_bits(args.qe_scale_approx_bits, "--qe-scale-approx-bits")
        without = _quantizer_of_flags(model, _with(args, qe_dynamic=True, qe_scale_approx_bits=None))
        if args.qe_calibration is None:
            _LOG.info(
                "no source of activation ranges given: calibrating on %.0f %% of the training set",
                100 * self.portion,
            )
        self.collects = True
        return without

    def _begun(self, quantizer: PostTrainLinearQuantizer, steps: DataSteps) -> Path | None:
        """The folder of the states of steps; what is wrong with folders is told before what takes long."""
        args, compressor = self.args, self.compressor
        if not set(steps.names) & set(RESUMABLE):
            if self.collects:
                compressor.run.require_folder()
            return None
        identity = steps_identity(
            steps,
            data=self._data_identity(),
            one_pass=args.qe_one_pass,
            scale_approx_bits=args.qe_scale_approx_bits,
            **identity_of(quantizer),
        )
        if args.qe_resume:
            check_resumable(args.qe_resume, identity)
        folder = compressor.run.require_folder()
        begin_record(folder, identity, args.qe_resume)
        return folder

    def _collect(self, model: nn.Module) -> dict[str, Any]:
        self.collector = collected(self.compressor, model, self.portion)
        return self.collector.value()

    def _with_data(
        self, quantizer: PostTrainLinearQuantizer, steps: DataSteps, folder: Path | None
    ) -> QuantizedWithData:
        _LOG.info("--- quantization: %s ---------------------", ", ".join(steps.names))
        try:
            return quantize_with_data(
                quantizer,
                steps,
                self.dummy_input,
                calibration_batches(self.compressor),
                self._loss(),
                folder=folder,
                progress=_LOG.info,
                collect=self._collect,
            )
        except QuantizationError as error:
            told = error if self.args.qe_config_file else told_of_flags(error)
            if told is error:
                raise
            raise told from error

    def _data_identity(self) -> dict[str, Any]:
        data, search = self.compressor.data, self.args.qe_search_size or DEFAULT_SEARCH
        return {
            "of": self.compressor.dataset,
            "calibration": fingerprint(data.calibration(self.portion).indices()),
            "search": fingerprint(data.calibration(search).indices()),
        }

    def _loss(self) -> Callable[[nn.Module], float]:
        """The loss on a share of the training set: Distiller chose by the test set, which is unseen here."""
        loader: Any = self.compressor.data.calibration(self.args.qe_search_size or DEFAULT_SEARCH)
        if self.args.lapq_eval_memoize_dataloader:
            loader = list(loader)
        return lambda model: evaluate(model, loader, device=self.compressor.device).loss


def _quantizer_of_file(model: nn.Module, file: str) -> PostTrainLinearQuantizer:
    quantizer = config_component_from_file_by_class(model, file, "PostTrainLinearQuantizer")
    read = ("version", "quantizers", STEPS)
    others = [key for key, value in read_document(file).data.items() if key not in read and value]
    if others:
        _LOG.warning(
            "--qe-config-file %s: without effect: %s; of such a file only its quantizers are read",
            file,
            ", ".join(others),
        )
    return quantizer


def _quantizer_of_flags(model: nn.Module, args: Namespace) -> PostTrainLinearQuantizer:
    """The quantizer; what is wrong with a setting is told of its flag."""
    try:
        return PostTrainLinearQuantizer.from_args(model, args)
    except UnknownNameError as error:
        no_clip = {strip_wrappers(name) for name in args.qe_no_clip_layers}
        told = [
            text.replace("overrides", "--qe-no-clip-layers" if name in no_clip else "--qe-no-quant-layers", 1)
            for name, text in error.faults.items()
        ]
        raise UnknownNameError("\n".join(told), faults=error.faults) from error
    except QuantizationError as error:
        setting, colon, text = str(error).partition(": ")
        raise QuantizationError(f"{_FLAGS.get(setting, setting)}{colon}{text}") from error


def _with(args: Namespace, **changes: Any) -> Namespace:
    return Namespace(**{**vars(args), **changes})
