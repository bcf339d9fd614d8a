"""Mixed precision: a width for each layer, by what each width of each layer alone does to the model.

    for each layer and width: quantize only that of the model, measure
    for each budget: the widths of least sum of these sensitivities that keep within it (exact)
    quantize with these widths, measure

A sum over layers is a prediction: errors of several layers can add up to more, or cancel. The measured value
stands beside it.
Knows nothing about data.

Source: the sum of sensitivities under a budget as in Yao et al., "HAWQ-V3", arXiv 2011.10680, section 3.4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from distiller.errors import QuantizationError, did_you_mean
from distiller.quantization.affine import check_bits
from distiller.quantization.post_train import PostTrainLinearQuantizer
from distiller.quantization.ptq_weights import QuantizedWeightWrapper
from distiller.quantization.search.copies import (
    EvalFn,
    changed,
    check_arguments,
    explicit_overrides,
    identity_of,
    prepared_copy,
    with_statistics,
)
from distiller.quantization.search.distance import Distance, Metric
from distiller.quantization.search.float_run import in_float, with_weight
from distiller.quantization.search.grids import Layers, grids_of, own_quantizers, put_grids, quantized_layers
from distiller.quantization.search.layer_widths import (
    Budget,
    LayerPart,
    Parts,
    cost_of,
    overrides_for,
    parts_of,
    widths_by_layer,
)
from distiller.quantization.search.search_log import Progress, SearchLog
from distiller.quantization.search.width_budget import WEIGHT_WIDTHS
from distiller.quantization.search.width_choice import check_budget, choose_widths

_WHERE = "mixed_precision_search"
_BUDGETS = ("weight_bytes", "bit_operations")
_METRICS = ("loss", "kl")


@dataclass(frozen=True, slots=True)
class PrecisionPoint:
    """The best widths within one budget.

    Attributes:
        budget: the most that the widths may cost.
        cost: what they cost.
        predicted: the sum of the sensitivities.
        measured: of the model with all these widths, by the same metric.
        weights: the widths that were chosen, by layer.
        activations: alike; empty where they were not to be chosen.
        overrides: of `PostTrainLinearQuantizer`, in the place of those that the quantizer has: plain data.
    """

    budget: float
    cost: int
    predicted: float
    measured: float
    weights: dict[str, int]
    activations: dict[str, int]
    overrides: dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class MixedPrecisionResult:
    """What the search found.

    Attributes:
        points: one for each budget, ascending.
        weight_sensitivities: of each layer at each width; not finite where the model's loss is not.
        activation_sensitivities: alike; empty where widths of activations were not to be chosen.
        float_loss: of the model in floating point; NaN for the metric "kl", which needs no loss.
    """

    points: tuple[PrecisionPoint, ...]
    weight_sensitivities: dict[str, dict[int, float]]
    activation_sensitivities: dict[str, dict[int, float]]
    float_loss: float


def mixed_precision_search(
    quantizer: PostTrainLinearQuantizer,
    dummy_input: Any,
    eval_fn: EvalFn,
    budgets: Sequence[float],
    budget: Budget = "weight_bytes",
    weight_widths: Sequence[int] = WEIGHT_WIDTHS,
    activation_widths: Sequence[int] = (),
    metric: Metric = "loss",
    log_path: str | Path | None = None,
    progress: Progress | None = None,
) -> MixedPrecisionResult:
    """The width of each layer's weight, and activations, with the least sensitivity within each budget.

    One evaluation for each layer and width, one of the model in floating point, one for each budget. Widths
    that the overrides of the quantizer give to layers stay.

    Args:
        quantizer: not prepared; it and its model stay as they are. Where activations are quantized and it has
            no statistics, they are collected by two runs of `eval_fn`.
        dummy_input: an input, or a tuple of them, to trace the model with, and to count its operations for.
        eval_fn: `eval_fn(model)` runs a model on the same data each time and returns its loss.
        budgets: at least one; bytes or bit operations.
        budget: what the budgets limit: "weight_bytes", the weights as they are stored, without scales and
            biases; or "bit_operations", the sum of MACs * width * width of what is multiplied.
        weight_widths: to choose from, 2 to 16.
        activation_widths: alike; empty: activations keep the quantizer's widths. Only for "bit_operations".
        metric: of sensitivity: "loss", the increase of the loss over that in floating point; or "kl", the
            mean Kullback-Leibler divergence of the outputs' softmax from that in floating point, in nats.
        log_path: keeps every evaluated point, for `SearchLog`; a search that was killed goes on from there.
        progress: called after each point.

    Raises:
        QuantizationError: an argument is wrong, or a budget cannot be reached: names the smallest that can.
        DistillerError: as the quantizer's `prepare_model`.
    """
    check_arguments(_WHERE, quantizer, eval_fn)
    widths = checked_widths(budgets, budget, weight_widths, activation_widths, metric)
    identity = {**identity_of(quantizer), "metric": metric}
    log = SearchLog(log_path, "widths", identity, progress)
    quantizer = with_statistics(quantizer, eval_fn, log)
    prepared = prepared_copy(quantizer, dummy_input)
    overrides, layers = explicit_overrides(prepared), quantized_layers(prepared.model, dummy_input)
    parts = parts_of(prepared, layers, *widths)
    if not parts.free:
        raise QuantizationError(f"{_WHERE}: no quantized layer has a width that is left to choose")
    cost = cost_of(prepared.model, layers, parts, budget, dummy_input)
    for limit in budgets:
        check_budget(parts.free, cost, limit)
    log.expect((metric == "loss") + sum(map(len, parts.free.values())) + len(set(budgets)))

    distance = Distance(quantizer.model, eval_fn, metric, log, _WHERE)
    float_loss = distance.float_loss if metric == "loss" else math.nan
    sensitivities = _Sensitivities(quantizer, dummy_input, overrides, layers, log, distance).measured(parts)

    def whole(all_overrides: Mapping[str, Any]) -> float:
        return distance.of(prepared_copy(quantizer, dummy_input, overrides=all_overrides).model)

    points = []
    for limit in sorted(budgets):
        chosen = choose_widths(sensitivities, cost, limit)
        all_overrides = changed(overrides, overrides_for(chosen))
        points.append(
            PrecisionPoint(
                limit,
                cost.of(chosen),
                sum(sensitivities[part][width] for part, width in chosen.items()),
                log.evaluated({"widths": overrides_for(chosen)}, partial(whole, all_overrides)),
                widths_by_layer(chosen, "weights"),
                widths_by_layer(chosen, "activations"),
                all_overrides,
            )
        )
    by_what = {
        what: {part.layer: by_width for part, by_width in sensitivities.items() if part.what == what}
        for what in ("weights", "activations")
    }
    return MixedPrecisionResult(tuple(points), by_what["weights"], by_what["activations"], float_loss)


class _Sensitivities:
    """Measures one part at one width after the other, all else in floating point.

    What is measured is a copy of the model that computes in floating point between its quantizers, so that
    nothing saturates and no bias is rounded.
    """

    def __init__(
        self,
        quantizer: PostTrainLinearQuantizer,
        dummy_input: Any,
        overrides: Mapping[str, Mapping[str, Any]],
        layers: Layers,
        log: SearchLog,
        distance: Distance,
    ) -> None:
        self._quantizer = quantizer
        self._dummy_input = dummy_input
        self._overrides: dict[str, dict[str, Any]] = {}
        for name, given in {**{name: {} for name in layers}, **overrides}.items():
            is_integer = name in layers and not layers[name].is_fake
            self._overrides[name] = {**_without_integers(given), "fake": True} if is_integer else dict(given)
        self._overrides = {name: given for name, given in self._overrides.items() if given}
        self._log = log
        self._distance = distance
        self._working: tuple[PostTrainLinearQuantizer, Layers] | None = None

    def measured(self, parts: Parts) -> dict[LayerPart, dict[int, float]]:
        """The sensitivity of each free part at each of its widths."""
        found: dict[LayerPart, dict[int, float]] = {part: {} for part in parts.free}
        for what in ("weights", "activations"):
            of_kind = [part for part in parts.free if part.what == what]
            for width in dict.fromkeys(width for part in of_kind for width in parts.free[part]):
                others: Layers | None = None
                for part in of_kind:
                    point = {"layer": part.layer, part.what: width}
                    if others is None and not self._log.has(point):
                        others = self._prepared(dict.fromkeys(of_kind, width))[1]
                    found[part][width] = self._log.evaluated(point, partial(self._alone, part, others))
        return found

    def _alone(self, part: LayerPart, others: Layers | None) -> float:
        """The sensitivity of one part with the grid that it has among `others`."""
        assert others is not None
        if self._working is None:
            self._working = self._prepared({})
        quantizer, layers = self._working
        layer, other = layers[part.layer], others[part.layer]
        if part.what == "weights":
            assert isinstance(other, QuantizedWeightWrapper)
            weight: Any = other.wrapped_module.weight.detach()  # type: ignore[union-attr]
            with in_float(layers), with_weight(layer.wrapped_module, weight):
                return self._distance.of(quantizer.model)
        put_grids(layers, part.layer, replace(grids_of(other), weight=None))
        with in_float(layers, own_quantizers(layer).values()):
            return self._distance.of(quantizer.model)

    def _prepared(self, widths: Mapping[LayerPart, int]) -> tuple[PostTrainLinearQuantizer, Layers]:
        overrides = changed(self._overrides, overrides_for(widths))
        prepared = prepared_copy(
            self._quantizer, self._dummy_input, overrides=overrides, save_fp_weights=True
        )
        return prepared, quantized_layers(prepared.model, self._dummy_input)


def _without_integers(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a layer without those that mean nothing where it computes in floating point."""
    return {key: value for key, value in given.items() if key not in ("bits_bias", "scale_approx_mult_bits")}


def checked_widths(
    budgets: Any, budget: Any, weight_widths: Any, activation_widths: Any, metric: Any
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The widths of weights and activations, each once, ascending; arguments as of `mixed_precision_search`.

    Raises:
        QuantizationError: an argument is wrong.
    """
    for name, value, known in (("budget", budget, _BUDGETS), ("metric", metric, _METRICS)):
        if value not in known:
            hint = did_you_mean(str(value), known)
            raise QuantizationError(
                f"{_WHERE}: {name}: must be one of {', '.join(known)}, got {value!r}{hint}"
            )
    if not isinstance(budgets, Sequence) or isinstance(budgets, str) or not budgets:
        raise QuantizationError(f"{_WHERE}: budgets: must be a list of at least one number, got {budgets!r}")
    for limit in budgets:
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
            raise QuantizationError(f"{_WHERE}: budgets: must be finite numbers > 0, got {limit!r}")
    widths: list[tuple[int, ...]] = []
    for name, given in (("weight_widths", weight_widths), ("activation_widths", activation_widths)):
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise QuantizationError(f"{_WHERE}: {name}: must be a list of widths, got {given!r}")
        for width in given:
            if check_bits(width, f"{_WHERE}: {name}") is None:
                raise QuantizationError(f"{_WHERE}: {name}: must be 2 to 16 bits, got {width!r}")
        widths.append(tuple(sorted(set(given))))
    if not any(widths):
        raise QuantizationError(
            f"{_WHERE}: weight_widths, activation_widths: are both empty; give one of them"
        )
    if widths[1] and budget == "weight_bytes":
        raise QuantizationError(
            f"{_WHERE}: activation_widths: a budget of weight_bytes does not limit them; leave them out, or "
            "give budget 'bit_operations'"
        )
    return widths[0], widths[1]
