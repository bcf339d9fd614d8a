"""AdaRound: weights rounded up or down so that each layer's output stays what it was.

Layer by layer in the order of execution: the layer reads what the layers before it, rounded already, put out,
and is to put out what it does in full precision.
Knows nothing about how a layer's rounding is found.

Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distiller.errors import QuantizationError, UsageError
from distiller.evaluation_mode import evaluating
from distiller.names import unwrap
from distiller.quantization.refinement.adaround_settings import AdaRoundSettings
from distiller.quantization.refinement.capture import (
    Batches,
    call_counts,
    count_inputs,
    each_batch,
    inputs_of,
    outputs_of,
)
from distiller.quantization.refinement.float_twin import LayerPair, layer_pairs
from distiller.quantization.refinement.layer_rows import (
    as_matrices,
    as_weight,
    draw_positions,
    input_rows,
    output_rows,
    positions_in,
)
from distiller.quantization.refinement.quantized_layer import (
    bias_as_matrices,
    layer_state,
    restore_layer,
    round_to_nearest,
    set_weight,
)
from distiller.quantization.refinement.rescaling import rescale_layer
from distiller.quantization.refinement.rounding import (
    MOST_TRIED,
    RoundingProblem,
    best_rounding,
    better_rows,
    learned_rounding,
    losses,
    nearest,
    rounded,
)
from distiller.quantization.refinement.weight_scales import best_scale

_MOST_BYTES = 2**28  # of a layer's samples
_SAMPLES_FOR_SCALES = 1024


@dataclass(frozen=True, slots=True)
class LayerRounding:
    """What became of one layer.

    Attributes:
        name: the layer.
        loss_before: mean squared difference of its outputs (behind the ReLU that is part of it) from those in
            full precision, over the samples, with the weight that it had.
        loss_after: with the weight that it has now; never more.
        changed: the fraction of its weights that are not rounded to nearest.
    """

    name: str
    loss_before: float
    loss_after: float
    changed: float


@dataclass(frozen=True, slots=True)
class AdaRoundReport:
    """What became of all layers.

    Attributes:
        layers: in the order of execution.
        skipped: why others were left as they are, by name.
        state: of all layers, for `adaround(resume_from=...)`: tensors and plain data, to be saved by
            torch.save.
    """

    layers: tuple[LayerRounding, ...]
    skipped: Mapping[str, str]
    state: dict[str, Any]


def adaround(
    float_model: nn.Module,
    quantized_model: nn.Module,
    batches: Batches,
    settings: AdaRoundSettings | None = None,
    *,
    resume_from: Mapping[str, Any] | None = None,
    on_layer: Callable[[AdaRoundReport, int], None] | None = None,
) -> AdaRoundReport:
    """Round the weights of a quantized model anew.

    A layer costs `settings.iterations` steps on samples of what it reads, and a run of both models over all
    batches that ends with the layer: for L layers (L + 1) / 2 whole runs of each, on average. Kept in memory
    are the samples of one layer, 256 MB at most. The output of no layer gets worse by it on these samples:
    of each channel the rounding to nearest is kept where that is better, and the whole layer where another
    scale is no gain. What an accumulator that saturates does to it is not looked at.

    Args:
        float_model: in full precision, batch norms folded: `float_twin`.
        quantized_model: the same, prepared by `PostTrainLinearQuantizer`; changed in place.
        batches: inputs; some hundred images do.
        settings: default `AdaRoundSettings()`.
        resume_from: `state` of the report on an earlier run that was stopped, with the same models, batches
            and settings; the layers in it are not done again, and the result is the same.
        on_layer: called after each layer with the report so far and the number of layers in all.

    Returns:
        The report.

    Raises:
        QuantizationError: the models are not twins, or a layer's output is not finite.
        UsageError: there are no batches, or `resume_from` is of other settings or of another model.
    """
    settings = settings or AdaRoundSettings()
    pairs = layer_pairs(float_model, quantized_model)
    with torch.inference_mode(False), evaluating(float_model), evaluating(quantized_model):
        calls = call_counts(
            float_model, {n: pair.float_layer for n, pair in pairs.items()}, next(each_batch(batches))
        )
        count = count_inputs(batches)
        skipped = {name: "the model does not call it" for name in pairs if name not in calls}
        finished = _finished(resume_from, settings, {name: pairs[name] for name in calls})
        report = AdaRoundReport((), skipped, {"settings": settings.as_plain(), "layers": {}})
        for name, number in calls.items():
            pair = pairs[name]
            if name in finished:
                entry = dict(finished[name])
                set_weight(pair.wrapper, entry["weight"], entry["scale"], entry["zero_point"])
            else:
                generator = torch.Generator().manual_seed(zlib.crc32(f"{settings.seed} {name}".encode()))
                wanted = max(1, _most_samples(pair, settings) // (count * number))
                inputs, targets = _samples(
                    (unwrap(float_model), unwrap(quantized_model)), pair, number, batches, wanted, generator
                )
                entry = _round_layer(pair, inputs, targets, settings, generator)
            report.state["layers"][name] = entry
            done = LayerRounding(name, entry["loss_before"], entry["loss_after"], entry["changed"])
            report = dataclasses.replace(report, layers=(*report.layers, done))
            if on_layer is not None and name not in finished:
                on_layer(report, len(calls))
    return report


def _finished(
    resume_from: Mapping[str, Any] | None, settings: AdaRoundSettings, pairs: Mapping[str, LayerPair]
) -> Mapping[str, Mapping[str, Any]]:
    """The layers of an earlier run."""
    if resume_from is None:
        return {}
    if not {"settings", "layers"} <= set(resume_from):
        raise UsageError(
            "resume_from: must be the state of a report of adaround, with 'settings' and 'layers'"
        )
    then, now = resume_from["settings"], settings.as_plain()
    for name, value in now.items():
        if then.get(name) != value:
            raise UsageError(
                f"resume_from: was made with {name}={then.get(name)!r}, now it is {value!r}; "
                "use the same settings, or begin anew"
            )
    for name, entry in resume_from["layers"].items():
        weight = pairs[name].layer.weight if name in pairs else None
        if weight is None or entry["weight"].shape != weight.shape:
            raise UsageError(f"resume_from: is of another model, its layer '{name}' is not in this one")
    return resume_from["layers"]


def _most_samples(pair: LayerPair, settings: AdaRoundSettings) -> int:
    weight: Tensor = pair.float_layer.weight  # type: ignore[assignment]
    groups, outputs, fan_in = as_matrices(weight, pair.float_layer).shape
    return min(settings.samples, _MOST_BYTES // (4 * groups * (fan_in + outputs)))


def _samples(
    models: tuple[nn.Module, nn.Module],
    pair: LayerPair,
    calls: int,
    batches: Batches,
    wanted: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """What the quantized layer reads, and what the other puts out for the same batches."""
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    for arguments in each_batch(batches):
        outputs = outputs_of(models[0], pair.float_layer, calls, arguments)
        for x, output in zip(inputs_of(models[1], pair.layer, calls, arguments), outputs, strict=True):
            batch = 1 if output.dim() == 1 else output.shape[0]
            positions = draw_positions(batch, positions_in(pair.layer, output), wanted, generator)
            positions = positions.to(output.device)
            inputs.append(input_rows(pair.layer, x, positions).float())
            targets.append(output_rows(pair.layer, output, positions).float())
    return torch.cat(inputs, dim=1), torch.cat(targets, dim=1)


def _round_layer(
    pair: LayerPair, inputs: Tensor, targets: Tensor, settings: AdaRoundSettings, generator: torch.Generator
) -> dict[str, Any]:
    """Round one layer; its entry in the state."""
    wrapper, layer = pair.wrapper, pair.layer
    before = layer_state(wrapper)
    problem = _problem(pair, inputs, targets)
    loss_before = float(losses(problem, as_matrices(before.weight, layer).float()).mean())
    if not math.isfinite(loss_before):
        raise QuantizationError(f"{pair.name}: its outputs for the batches are not finite; check the inputs")
    if settings.scales == "weights":
        rescale_layer(pair)
    elif settings.scales == "outputs":
        _rescale_by_outputs(pair, problem)
    problem = _problem(pair, inputs, targets)
    to_nearest = rounded(problem, nearest(problem))
    if problem.weight.shape[2] <= MOST_TRIED:
        up = best_rounding(problem)
    else:
        up = learned_rounding(problem, settings, generator)
    best = better_rows(problem, to_nearest, rounded(problem, up))
    loss_after = float(losses(problem, best).mean())
    if loss_after < loss_before:
        weight = as_weight(best, layer).to(before.weight.dtype)
        set_weight(wrapper, weight, wrapper.weight_scale, wrapper.weight_zero_point)
    else:
        loss_after = loss_before
        restore_layer(wrapper, before)
    now, problem = layer_state(wrapper), _problem(pair, inputs, targets)
    nearest_now = rounded(problem, nearest(problem)).to(now.weight.dtype)
    return {
        "weight": now.weight,
        "scale": now.scale,
        "zero_point": now.zero_point,
        "loss_before": loss_before,
        "loss_after": loss_after,
        "changed": float((as_matrices(now.weight, layer) != nearest_now).float().mean()),
    }


def _rescale_by_outputs(pair: LayerPair, problem: RoundingProblem) -> None:
    """Give the weight the scale at which rounding to nearest keeps the outputs best."""
    settings, step = pair.wrapper.wts_quant_settings, -(-problem.inputs.shape[1] // _SAMPLES_FOR_SCALES)
    some = dataclasses.replace(problem, inputs=problem.inputs[:, ::step], targets=problem.targets[:, ::step])
    outputs = problem.weight.shape[:2]

    def error_of(scale: Tensor, zero_point: Tensor) -> Tensor:
        shape = (*outputs, 1) if settings.per_channel else (1, 1, 1)
        trial = dataclasses.replace(some, scale=scale.reshape(shape), zero_point=zero_point.reshape(shape))
        errors = losses(trial, rounded(trial, nearest(trial))).flatten()
        return errors if settings.per_channel else errors.sum(0, keepdim=True)

    rows = problem.weight.flatten(0, 1) if settings.per_channel else problem.weight.reshape(1, -1)
    found = best_scale(rows, settings.num_bits, settings.quant_mode, error_of)
    scale, zero_point = (value.reshape(pair.wrapper.weight_scale.shape) for value in found)
    round_to_nearest(pair.wrapper, pair.float_layer.weight, scale, zero_point)  # type: ignore[arg-type]


def _problem(pair: LayerPair, inputs: Tensor, targets: Tensor) -> RoundingProblem:
    """The layer with the scale and the bias that it has now."""
    wrapper, layer = pair.wrapper, pair.float_layer
    weight = as_matrices(layer.weight.detach().float(), layer)  # type: ignore[union-attr]
    scale, zero_point = wrapper.weight_scale.float(), wrapper.weight_zero_point
    if wrapper.wts_quant_settings.per_channel:
        scale, zero_point = (value.reshape(*weight.shape[:2], 1) for value in (scale, zero_point))
    bias = bias_as_matrices(wrapper.wrapped_module, weight)
    qmin, qmax = wrapper.wts_quant_settings.qrange
    return RoundingProblem(weight, scale, zero_point, qmin, qmax, inputs, targets, bias, pair.has_relu)
