"""Post-training quantization that looks at data: the steps one after the other, to a quantized model.

    equalize -> collect statistics -> choose widths -> choose clip modes -> quantize
    -> scales of weights -> scales by the loss -> learned rounding -> corrected biases

What can be resumed (searches, learned rounding) keeps its state in files of a folder.
Knows nothing about files of images or command lines.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from distiller.data_loggers.quant_stats import collect_quant_stats
from distiller.errors import QuantizationError
from distiller.functional_modules import to_modules
from distiller.names import unwrap
from distiller.quantization.data_steps import BUDGETS, DataSteps, checked
from distiller.quantization.post_train import PostTrainLinearQuantizer
from distiller.quantization.refinement import (
    AdaRoundReport,
    AdaRoundSettings,
    adaround,
    correct_biases,
    equalize,
    float_twin,
    rescale_weights,
)
from distiller.quantization.refinement.capture import Batches, each_batch
from distiller.quantization.refinement.structure import note_changes
from distiller.quantization.rounding_state import resumed_rounding, rounding_identity, save_rounding
from distiller.quantization.search.clip_search import CLIP_MODES, parse_modes, ptq_greedy_search
from distiller.quantization.search.copies import EvalFn, lacks_statistics
from distiller.quantization.search.lapq import coordinate_search
from distiller.quantization.search.lapq_settings import LapqSettings
from distiller.quantization.search.mixed_precision import checked_widths, mixed_precision_search
from distiller.quantization.search.search_log import SearchProgress
from distiller.quantization.search.width_budget import WEIGHT_WIDTHS, reachable_budget
from distiller.quantization.step_reports import (
    clip_modes_told,
    equalization_told,
    progress_told,
    width_told,
    widths_told,
)

__all__ = ["STATE_FILES", "QuantizedWithData", "quantize_with_data"]

_LOG = logging.getLogger(__name__)
_WIDTHS_STATE, _CLIPS_STATE = "mixed_precision.jsonl", "clip_search.jsonl"
_SCALES_STATE, ROUNDING_STATE = "lapq.jsonl", "adaround.pt"
STATE_FILES = (_WIDTHS_STATE, _CLIPS_STATE, _SCALES_STATE, ROUNDING_STATE)
"""What a folder may hold after a kill: the states of searches and of learned rounding."""


Collect: TypeAlias = Callable[[nn.Module], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class QuantizedWithData:
    """The outcome.

    Attributes:
        quantizer: prepared; `quantizer.model` is the quantized model, which may be a copy.
        float_model: the model in floating point whose layers the quantized ones approximate, under the same
            names: equalized where that was asked for, batch norms folded.
        stats: the activation statistics that were collected; None where they were given, or not needed.
        reports: what each step did, by its name.
    """

    quantizer: PostTrainLinearQuantizer
    float_model: nn.Module
    stats: Mapping[str, Any] | None
    reports: Mapping[str, Any] = field(default_factory=dict)


def quantize_with_data(
    quantizer: PostTrainLinearQuantizer,
    steps: DataSteps,
    dummy_input: Any,
    batches: Batches,
    eval_fn: EvalFn,
    *,
    folder: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    collect: Collect | None = None,
) -> QuantizedWithData:
    """Quantize a model with the settings of a quantizer, in steps that look at data.

    Args:
        quantizer: not prepared, its settings are those of the result; its model may be changed, and is in
            floating point no more.
        steps: which steps, beyond statistics (collected where the quantizer has none).
        dummy_input: an input, or a tuple of them.
        batches: inputs of the model to calibrate on, the same in each pass.
        eval_fn: the model's loss on data, the same each time.
        folder: keeps the states of searches and of learned rounding, to go on from after a kill; made where
            it is missing. None: none.
        progress: called with a line of text now and then.
        collect: `collect(model)` returns the activation statistics, where they are to be collected; default
            exact ones of `batches`, in two passes.

    Raises:
        QuantizationError: the steps do not go together, a setting is wrong, the quantizer is prepared, or the
            folder cannot be made, or has states of another model, of other settings or of other data.
        DistillerError: as the steps.
    """
    if quantizer.is_prepared:
        raise QuantizationError(
            "quantize_with_data: the model is prepared already; give it in floating point"
        )
    tell = progress or _LOG.info
    return _Pipeline(quantizer, steps, dummy_input, batches, eval_fn, folder, tell, collect).run()


def check_steps(steps: DataSteps) -> None:
    """Find out what is wrong with the settings of steps, as far as that takes no model.

    Raises:
        QuantizationError: a setting is wrong; names the step.
    """
    checked(AdaRoundSettings, steps.adaround or {}, "adaround")
    checked(LapqSettings, steps.lapq or {}, "lapq")
    for name, value in (steps.cross_layer_equalization or {}).items():
        if not isinstance(value, bool):
            raise QuantizationError(f"cross_layer_equalization: {name}: must be true or false, got {value!r}")
    if steps.lapq is not None and steps.mse_weight_scales is not None:
        raise QuantizationError(
            "mse_weight_scales: not with lapq, whose scales of weights it would replace; leave one out"
        )
    parse_modes((steps.clip_search or {}).get("clip_modes", CLIP_MODES))
    if steps.mixed_precision is not None:
        _check_mixed_precision(dict(steps.mixed_precision))


def _check_mixed_precision(given: dict[str, Any]) -> None:
    average = given.get("average_bits", 8)
    if isinstance(average, bool) or not isinstance(average, int | float) or not 2 <= average <= 16:
        raise QuantizationError(
            f"mixed_precision: average_bits: must be a number from 2 to 16, got {average!r}"
        )
    units = [unit for unit in BUDGETS if unit in given]
    if len(units) != 1:
        raise QuantizationError(f"mixed_precision: needs one budget of {', '.join(BUDGETS)}, got {given!r}")
    [unit] = units
    budget, limit = ("weight_bytes", 1.0) if unit == "average_bits" else (unit, given[unit])
    widths = given.get("weight_widths", WEIGHT_WIDTHS), given.get("activation_widths", ())
    try:
        checked_widths([limit], budget, *widths, given.get("metric", "loss"))
    except QuantizationError as error:
        raise QuantizationError(f"mixed_precision: {error}") from error


class _Pipeline:
    """The steps, with what they hand on."""

    def __init__(
        self,
        quantizer: PostTrainLinearQuantizer,
        steps: DataSteps,
        dummy_input: Any,
        batches: Batches,
        eval_fn: EvalFn,
        folder: str | Path | None,
        tell: Callable[[str], None],
        collect: Collect | None,
    ) -> None:
        self.model = quantizer.model
        self.steps = steps
        self.settings = quantizer.settings()
        self.dummy_input = dummy_input
        self.batches = batches
        self.eval_fn = eval_fn
        self.folder = None if folder is None else Path(folder)
        self.tell = tell
        self.collect = collect or self._collect
        self.reports: dict[str, Any] = {}
        self.stats: Mapping[str, Any] | None = None
        check_steps(steps)
        self.rounding = AdaRoundSettings(**(steps.adaround or {}))
        self.lapq = LapqSettings(**(steps.lapq or {}))
        has_stats = self.settings["model_activation_stats"] is not None
        self.needs_stats = lacks_statistics(quantizer)
        if steps.cross_layer_equalization is not None and has_stats:
            raise QuantizationError(
                "cross_layer_equalization: changes the ranges that model_activation_stats tell of; "
                "leave the statistics out: they are collected once it is done"
            )
        if self.folder is not None:
            _make(self.folder)

    def run(self) -> QuantizedWithData:
        steps = self.steps
        model = unwrap(self.model).eval()
        to_modules(model, self.dummy_input)
        if steps.cross_layer_equalization is not None:
            self.reports["cross_layer_equalization"] = equalize(
                model, self.dummy_input, **steps.cross_layer_equalization
            )
            given = (steps.cross_layer_equalization.get(name) for name in ("replace_relu6", "absorb_bias"))
            for line in equalization_told(self.reports["cross_layer_equalization"], *map(bool, given)):
                self.tell(line)
        if steps.mixed_precision is not None:  # before statistics, which may take long
            self._find_budget()
        if self.needs_stats:
            self.stats = self.collect(model)
            self.settings["model_activation_stats"] = self.stats
        if steps.mixed_precision is not None:
            self._choose_widths()
        if steps.clip_search is not None:
            self._choose_clip_modes()
        twin = float_twin(model, self.dummy_input)
        quantizer = self._quantized()
        if steps.mse_weight_scales is not None:
            self.reports["mse_weight_scales"] = rescale_weights(twin, quantizer.model)
        if steps.adaround is not None:
            self.reports["adaround"] = self._round(twin, quantizer.model)
        if steps.bias_correction is not None:
            self.reports["bias_correction"] = correct_biases(twin, quantizer.model, self.batches)
            self.tell(f"corrected {len(self.reports['bias_correction'].layers)} biases")
        note_changes(
            quantizer.model,
            has_folded_norms="cross_layer_equalization" in self.reports,
            replaced_relu6s=self._names("cross_layer_equalization", "replaced_relu6s"),
            new_biases=(
                *self._names("cross_layer_equalization", "new_biases"),
                *self._names("bias_correction", "new_biases"),
            ),
        )
        return QuantizedWithData(quantizer, twin, self.stats, self.reports)

    def _quantized(self) -> PostTrainLinearQuantizer:
        """The model quantized; by the scales of the least loss where that is asked for."""
        if self.steps.lapq is None:
            quantizer = PostTrainLinearQuantizer(self.model, **self.settings)
            quantizer.prepare_model(self.dummy_input)
            return quantizer
        result = coordinate_search(
            PostTrainLinearQuantizer(self.model, **self.settings),
            self.dummy_input,
            self.eval_fn,
            self.lapq,
            None,
            self._file(_SCALES_STATE),
            self._told("LAPQ"),
        )
        self.reports["lapq"] = result
        return result.quantizer

    def _find_budget(self) -> None:
        given = self.steps.mixed_precision or {}
        [unit] = [unit for unit in BUDGETS if unit in given]
        widths = given.get("weight_widths", WEIGHT_WIDTHS), given.get("activation_widths", ())
        quantizer = PostTrainLinearQuantizer(self.model, **self.settings)
        try:
            self.budget = reachable_budget(quantizer, self.dummy_input, unit, given[unit], *widths)
        except QuantizationError as error:
            raise QuantizationError(f"mixed_precision: {error}") from error

    def _choose_widths(self) -> None:
        given = {k: v for k, v in (self.steps.mixed_precision or {}).items() if k not in BUDGETS}
        budget, limit = self.budget
        metric = given.get("metric", "loss")
        result = mixed_precision_search(
            PostTrainLinearQuantizer(self.model, **self.settings),
            self.dummy_input,
            self.eval_fn,
            [limit],
            budget,
            **given,
            log_path=self._file(_WIDTHS_STATE),
            progress=lambda progress: self.tell(width_told(progress, metric)),
        )
        [point] = result.points
        self.settings["overrides"] = point.overrides
        self.reports["mixed_precision"] = result
        for line in widths_told(point, budget, metric):
            self.tell(line)

    def _choose_clip_modes(self) -> None:
        _, chosen = ptq_greedy_search(
            self.model,
            self.dummy_input,
            self.eval_fn,
            settings=self.settings,
            log_path=self._file(_CLIPS_STATE),
            progress=self._told("clip search"),
            **(self.steps.clip_search or {}),
        )
        self.settings["overrides"] = chosen
        self.reports["clip_search"] = chosen
        self.tell(clip_modes_told(chosen))

    def _round(self, twin: nn.Module, model: nn.Module) -> AdaRoundReport:
        path = self._file(ROUNDING_STATE)
        settings = {key: value for key, value in self.settings.items() if key != "model_activation_stats"}
        identity = rounding_identity(
            twin, model, self.batches, quantizer=settings, adaround=self.rounding.as_plain()
        )
        state = resumed_rounding(path, identity)

        def keep(report: AdaRoundReport, count: int) -> None:
            done = report.layers[-1]
            if path is not None:
                save_rounding(path, report.state, identity)
            self.tell(
                f"AdaRound [{len(report.layers)}/{count}] {done.name}: "
                f"error {done.loss_before:.3g} -> {done.loss_after:.3g}"
            )

        return adaround(twin, model, self.batches, self.rounding, resume_from=state, on_layer=keep)

    def _names(self, step: str, attribute: str) -> tuple[str, ...]:
        """The layers that a step's report tells of."""
        return getattr(self.reports.get(step), attribute, ())

    def _collect(self, model: nn.Module) -> Mapping[str, Any]:
        self.tell("collecting activation statistics, in two passes")
        return collect_quant_stats(model, self._run_over_batches)

    def _run_over_batches(self, model: nn.Module) -> None:
        with torch.inference_mode():
            for arguments in each_batch(self.batches):
                model(*arguments)

    def _file(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name

    def _told(self, search: str) -> Callable[[SearchProgress], None]:
        return lambda progress: self.tell(progress_told(search, progress))


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QuantizationError(
            f"folder: '{folder}' cannot be made, {error.strerror or error}; give a folder that can be written"
        ) from error
