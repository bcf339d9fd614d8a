"""Loss-aware post-training quantization: all scales of a model searched together, for the least loss.

    start with ranges by clip modes, or of least error of each layer's values
    minimise the loss over the vector of all scales (Powell: one after the other, then along combinations)

With few bits the errors of layers do not add up: the best scale of one depends on those of the others.
Knows nothing about data.

Source: Nahshan et al., "Loss aware post-training quantization", arXiv 1911.07190.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
from torch import nn

from distiller.errors import QuantizationError
from distiller.quantization.clipping import ClipMode
from distiller.quantization.post_train import PostTrainLinearQuantizer
from distiller.quantization.ptq_weights import QuantizedWeightWrapper
from distiller.quantization.search.copies import (
    EvalFn,
    check_arguments,
    check_function,
    identity_of,
    loss_of,
    with_statistics,
)
from distiller.quantization.search.lapq_settings import WHERE, LapqSettings
from distiller.quantization.search.lapq_space import LARGEST, ScaleSpace, nearest_point, plain_params
from distiller.quantization.search.lapq_start import started
from distiller.quantization.search.search_log import Progress, SearchLog

_STEP = 0.25
"""Octaves: the first step from the start, by the names that the methods have for it."""


@dataclass(frozen=True, slots=True, eq=False)
class LapqResult:
    """What the search found.

    Attributes:
        quantizer: prepared, on a copy of the model, with the scales of least loss: `quantizer.model`.
        params: scales and zero points by name in Distiller's convention (of channels, lists).
        loss: with these.
        initial_loss: at the start.
        norm: the p of the norm at the start, where `init_method` "quadratic" chose it.
        evaluations: how many there were in this run; those from the record are not among them.
    """

    quantizer: PostTrainLinearQuantizer
    params: dict[str, float | list[float]]
    loss: float
    initial_loss: float
    norm: float | None
    evaluations: int


def ptq_coordinate_search(
    quantizer: PostTrainLinearQuantizer,
    dummy_input: Any,
    eval_fn: EvalFn,
    test_fn: Callable[[nn.Module], Any] | None = None,
    method: str = "Powell",
    maxiter: int | None = None,
    maxfev: int | None = None,
    basinhopping: bool = False,
    basinhopping_niter: int = 100,
    init_mode: Any = ClipMode.NONE,
    init_method: str | None = None,
    search_clipping: bool = False,
    minimizer_kwargs: Mapping[str, Any] | None = None,
    log_path: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[nn.Module, dict[str, float | list[float]]]:
    """`coordinate_search` by Distiller's arguments; see `LapqSettings`.

    Returns:
        The quantized model, and its scales and zero points by name in Distiller's convention.

    Raises:
        QuantizationError: as `coordinate_search`.
    """
    settings = LapqSettings(
        method,
        maxiter,
        maxfev,
        basinhopping,
        basinhopping_niter,
        init_mode,
        init_method,
        search_clipping,
        {} if minimizer_kwargs is None else minimizer_kwargs,
    )
    result = coordinate_search(quantizer, dummy_input, eval_fn, settings, test_fn, log_path, progress)
    return result.quantizer.model, result.params


def coordinate_search(
    quantizer: PostTrainLinearQuantizer,
    dummy_input: Any,
    eval_fn: EvalFn,
    settings: LapqSettings | None = None,
    test_fn: Callable[[nn.Module], Any] | None = None,
    log_path: str | Path | None = None,
    progress: Progress | None = None,
) -> LapqResult:
    """The scales (or clipping values) of weights and outputs with which a model has the least loss.

    An evaluation re-rounds the weights whose scale is another one than in the evaluation before, and no more.
    The point of least loss is the result, wherever the method ends; NaN and infinity are never that.

    Args:
        quantizer: not prepared; it and its model stay as they are. Where activations are quantized and it has
            no statistics, they are collected by two runs of `eval_fn`.
        dummy_input: an input, or a tuple of them, to trace the model with.
        eval_fn: `eval_fn(model)` runs a model on the same data each time and returns its loss. It is called
            some hundreds of times for each iteration: keep the data few, and in memory.
        settings: default those of `LapqSettings`.
        test_fn: `test_fn(model)` is called with the best model so far at the end of each iteration, not of
            those that are replayed from the record.
        log_path: keeps every evaluated point, for `SearchLog`; a search that was killed goes on from there.
        progress: called after each point.

    Raises:
        QuantizationError: an argument is wrong, nothing can be searched, or the loss at the start is NaN.
        DistillerError: as the quantizer's `prepare_model`.
    """
    check_arguments(WHERE, quantizer, eval_fn)
    if test_fn is not None:
        check_function(WHERE, "test_fn", test_fn)
    settings = LapqSettings() if settings is None else settings
    log = SearchLog(log_path, "scales", {**identity_of(quantizer), **settings.identity()}, progress)
    quantizer = with_statistics(quantizer, eval_fn, log)
    prepared, norm = started(
        quantizer, dummy_input, settings, log, lambda ready: loss_of(ready.model, eval_fn, WHERE)
    )
    search = _Search(prepared, settings, log, lambda: loss_of(prepared.model, eval_fn, WHERE), test_fn)
    search.run()
    search.space.put(search.best_point)
    if not quantizer.save_fp_weights:
        _forget_float_weights(prepared)
    params = plain_params(prepared)
    return LapqResult(prepared, params, search.best, search.initial, norm, log.evaluations)


class _Enough(Exception):
    """All evaluations that there may be are done."""


class _Search:
    """The objective, the optimizer around it, and the best point so far."""

    def __init__(
        self,
        quantizer: PostTrainLinearQuantizer,
        settings: LapqSettings,
        log: SearchLog,
        evaluate: Callable[[], float],
        test_fn: Callable[[nn.Module], Any] | None,
    ) -> None:
        self.space = ScaleSpace(quantizer, settings.search_clipping)
        self._model = quantizer.model
        self._settings = settings
        self._log = log
        self._evaluate = evaluate
        self._test_fn = test_fn
        self._last = None if settings.maxfev is None else log.done + settings.maxfev
        log.expect(self._last)
        self._tested_at = log.evaluations
        self.best_point = np.zeros(len(self.space.names))
        self.best = self.initial = math.inf

    def run(self) -> None:
        """Minimise."""
        self.initial = self.best = self._loss_at(self.best_point)
        if not math.isfinite(self.initial):
            raise QuantizationError(
                f"{WHERE}: the loss is {self.initial} at the start; choose another init_mode, check the model"
            )
        self._minimise()

    def objective(self, x: np.ndarray) -> float:
        """The loss at a point, or a value above all losses where there is none."""
        above = 1e6 * max(1.0, abs(self.initial))
        if not np.abs(x).max() <= LARGEST:
            return above * (1 + float(np.nan_to_num(np.abs(x), posinf=1e6).clip(max=1e6).max()))
        x = nearest_point(x)
        loss = self._loss_at(x)
        if not math.isfinite(loss):
            return above
        if loss < self.best:
            self.best, self.best_point = loss, x
        return loss

    def _loss_at(self, x: np.ndarray) -> float:
        point = {"x": x.tolist()}

        def measure() -> float:
            self.space.put(x)
            return self._evaluate()

        if self._last is not None and self._log.done >= self._last and not self._log.was_met(point):
            raise _Enough
        return self._log.evaluated(point, measure)

    def _minimise(self) -> None:
        settings, start = self._settings, self.best_point
        given = dict(settings.minimizer_kwargs)
        options = {**_first_steps(settings.method, len(start)), **dict(given.pop("options", {}))}
        if settings.maxiter is not None:
            options["maxiter"] = settings.maxiter
        arguments = {
            **given,
            "method": settings.method,
            "options": options,
            "callback": self._after_iteration,
        }
        try:
            if settings.basinhopping:
                scipy.optimize.basinhopping(
                    self.objective,
                    start,
                    niter=settings.basinhopping_niter,
                    stepsize=2 * _STEP,
                    minimizer_kwargs=arguments,
                    seed=0,  # type: ignore[call-arg] - the same way again on resuming; newer scipy calls it rng
                )
            else:
                scipy.optimize.minimize(self.objective, start, **arguments)
        except _Enough:
            return

    def _after_iteration(self, *_: Any) -> None:
        if self._test_fn is not None and self._log.evaluations > self._tested_at:
            self._tested_at = self._log.evaluations
            self.space.put(self.best_point)
            self._test_fn(self._model)


def _first_steps(method: str, size: int) -> dict[str, Any]:
    """Options by which a method's first steps are of `_STEP`; scipy's defaults suit other units."""
    steps = _STEP * np.eye(size)
    return {
        "Powell": {"direc": steps},
        "Nelder-Mead": {"initial_simplex": np.vstack([np.zeros(size), steps])},
        "COBYLA": {"rhobeg": _STEP},
        "COBYQA": {"initial_tr_radius": _STEP},
    }.get(method, {})


def _forget_float_weights(quantizer: PostTrainLinearQuantizer) -> None:
    """Leave the model as it is without `save_fp_weights`."""
    quantizer.save_fp_weights = False
    for _, wrapper in quantizer.modules_processed.values():
        if isinstance(wrapper, QuantizedWeightWrapper):
            inner = wrapper.wrapped_module
            for name in [name for name, _ in inner.named_buffers(recurse=False) if name.startswith("float_")]:
                delattr(inner, name)
    quantizer.quantizer_metadata()["params"]["save_fp_weights"] = False
