"""The layer-wise sweep: all chosen layers compressed at one setting, measured, and dense again.

    for each technique:
        for each setting (fraction, or bits):
            weight of each layer <- compressed
            point <- evaluate(model), time([model, the dense one, the factored one])
            weight of each layer <- dense

Each layer is compressed on its own, from its dense weight, without fine-tuning; biases stay. What takes long
(a sort, a singular value decomposition) is done once for all settings of a technique.
Knows nothing about files or data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distiller.errors import DistillerError, UsageError
from distiller.evaluation_mode import buffers_kept, evaluating
from distiller.export.size import dense_bytes
from distiller.factorization.forms import default_form, refusal
from distiller.factorization.layers import factored
from distiller.layerwise.compressed_layer import CompressedWeight, WeightToCompress, read_pipeline
from distiller.layerwise.points import LayerwisePoint
from distiller.layerwise.stored_bytes import payload_bytes
from distiller.layerwise.timing import Timing
from distiller.names import canonical_state_dict, named_modules, resolve_all
from distiller.sensitivity.axes import sparsity_levels
from distiller.sensitivity.curves import clean_level

__all__ = ["Evaluate", "SweepPlan", "Time", "fraction_range", "layers_to_compress", "layerwise_points"]

Evaluate = Callable[[nn.Module], tuple[int, int, float]]
"""The model -> (images right, images, mean loss), always on the same images."""

Time = Callable[[Sequence[nn.Module]], Sequence[Timing | None]]
"""Models -> the latency of each, measured in turns."""

_WITH_BITS = ("quant", "kmeans")


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """What is swept.

    Attributes:
        techniques: names, or pipelines such as `svd+prune+quant`.
        fractions: 0 to 1.
        bits: with which `quant` and `kmeans` are measured, too; where they are among the techniques.
    """

    techniques: tuple[str, ...]
    fractions: tuple[float, ...]
    bits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        named = ["+".join(read_pipeline(text)) for text in self.techniques]
        if not named or len(set(named)) < len(named):
            raise UsageError(
                f"layerwise: each technique once, at least one, got '{','.join(self.techniques)}'"
            )
        object.__setattr__(self, "techniques", tuple(named))
        if self.bits and not set(named).intersection(_WITH_BITS):
            raise UsageError(
                f"layerwise: bits are of quant and kmeans, got '{','.join(named)}'; add one, or leave "
                "them out"
            )
        if any(not 0 <= fraction <= 1 for fraction in self.fractions) or not self.fractions:
            raise UsageError(f"layerwise: fractions must lie in 0..1, got {list(self.fractions)}")
        if any(not 1 <= width <= 16 for width in self.bits):
            raise UsageError(f"layerwise: bits must be 1 to 16, got {list(self.bits)}")

    @property
    def keys(self) -> list[tuple[str, str, float]]:
        """The points, (technique, axis, value), in their order."""
        return [key for technique in self.techniques for key in self._keys_of(technique)]

    def _keys_of(self, technique: str) -> list[tuple[str, str, float]]:
        found = [(technique, "fraction", clean_level(value)) for value in self.fractions]
        if technique in _WITH_BITS:
            found += [(technique, "bits", float(width)) for width in self.bits]
        return list(dict.fromkeys(found))


def fraction_range(start: float, stop: float, step: float) -> tuple[float, ...]:
    """start, start + step, ... and `stop` itself, without float noise.

    Args:
        start: the first, 0..1.
        stop: the last, `start`..1.
        step: 1e-6..1.

    Raises:
        UsageError: a number outside of its range.
    """
    if not 0 <= start <= stop <= 1 or not 1e-6 <= step <= 1:
        raise UsageError(
            "layerwise: fractions are given as START STOP STEP with 0 <= START <= STOP <= 1 and a step of "
            f"1e-6 to 1, as in '0 0.9 0.1', got {start:g} {stop:g} {step:g}"
        )
    return sparsity_levels(start, stop, step)


def layers_to_compress(model: nn.Module, patterns: Iterable[str] = ()) -> dict[str, nn.Parameter]:
    """The weights of the chosen layers, by the layer's name, in the order of the model.

    Args:
        model: the model.
        patterns: names or patterns of layers with a weight of two or more dimensions; none: the linear
            layers, which is what nn-compress-haiku compresses.

    Raises:
        UnknownNameError: a pattern that matches no such layer.
        UsageError: there is none.
    """
    found: dict[str, nn.Parameter] = {}
    is_linear: dict[str, bool] = {}
    for name, module in named_modules(model):
        weight: Any = getattr(module, "weight", None)
        is_new = isinstance(weight, nn.Parameter) and not any(weight is known for known in found.values())
        if is_new and weight.dim() >= 2:
            found[name], is_linear[name] = weight, isinstance(module, nn.Linear)
    asked = list(patterns)
    if asked:
        chosen = set(resolve_all(asked, list(found), "layer with a weight of two or more dimensions"))
        return {name: weight for name, weight in found.items() if name in chosen}
    linear = {name: weight for name, weight in found.items() if is_linear[name]}
    if not linear:
        hint = f"; name other layers, as {next(iter(found))}" if found else ""
        raise UsageError(f"layerwise: the model has no linear layer{hint}")
    return linear


def layerwise_points(
    model: nn.Module,
    layers: Mapping[str, nn.Parameter],
    plan: SweepPlan,
    evaluate: Evaluate,
    time: Time,
    finished: Collection[tuple[str, str, float]] = (),
) -> Iterator[LayerwisePoint]:
    """Measure and hand out, one by one, every point that is not `finished`.

    Args:
        model: the dense model; it is dense again, bit for bit, at every point handed out.
        layers: as from `layers_to_compress`.
        plan: what is swept.
        evaluate: called in evaluation mode.
        time: called with the model, a dense copy, and where there are factors a factored one.
        finished: keys of points that are there already.
    """
    todo = [key for key in plan.keys if key not in finished]
    dense = copy.deepcopy(model) if todo else model
    total_bytes = dense_bytes(canonical_state_dict(model))
    elements = sum(weight.numel() for weight in layers.values())
    layer_bytes = sum(weight.numel() * weight.element_size() for weight in layers.values())
    for technique in plan.techniques:
        weights: dict[str, WeightToCompress] = {}
        for key in todo:
            _, axis, value = key
            if key[0] != technique:
                continue
            weights = weights or _weights(layers)
            done = {name: _compressed(name, own, technique, axis, value) for name, own in weights.items()}
            with _in_place(layers, done):
                with evaluating(model), buffers_kept(model):
                    correct, n, loss = evaluate(model)
                with _factored(dense, done) as two:
                    timed = list(time([model, dense, *two]))
            latency, whole, *rest = timed
            stored = sum(each.stored_bytes for each in done.values())
            coded = sum(each.coded for each in done.values())
            yield LayerwisePoint(
                technique=technique,
                axis=axis,
                value=value,
                top1_correct=correct,
                n=n,
                loss=loss,
                stored_bytes=total_bytes - layer_bytes + stored,
                dense_bytes=total_bytes,
                effective_bits=8 * stored / elements,
                code_bits=sum(each.code_bits for each in done.values()) / coded if coded else None,
                predicted_bytes=_predicted(layers, technique, value, total_bytes - layer_bytes),
                latency_s=latency.median_s if latency else None,
                latency_q1_s=latency.q1_s if latency else None,
                latency_q3_s=latency.q3_s if latency else None,
                dense_latency_s=whole.median_s if whole else None,
                factored_latency_s=rest[0].median_s if rest and rest[0] else None,
                batch_size=latency.batch_size if latency else None,
                threads=latency.threads if latency else None,
                device=latency.device if latency else None,
            )


def _weights(layers: Mapping[str, nn.Parameter]) -> dict[str, WeightToCompress]:
    return {name: WeightToCompress(weight) for name, weight in layers.items()}


def _compressed(
    name: str, weight: WeightToCompress, technique: str, axis: str, value: float
) -> CompressedWeight:
    try:
        if axis == "bits":
            return weight.at_bits(technique, int(value))
        return weight.at_fraction(read_pipeline(technique), value)
    except DistillerError as error:
        raise DistillerError(f"{technique} of '{name}': {error}") from error


@contextmanager
def _in_place(layers: Mapping[str, nn.Parameter], done: Mapping[str, CompressedWeight]) -> Iterator[None]:
    """The layers with compressed weights while the context is open; bit for bit as before afterwards."""
    before = {name: weight.detach().clone() for name, weight in layers.items()}
    try:
        _copy(layers, {name: each.weight for name, each in done.items()})
        yield
    finally:
        _copy(layers, before)


def _copy(layers: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, weight in layers.items():
            weight.copy_(values[name])


@contextmanager
def _factored(dense: nn.Module, done: Mapping[str, CompressedWeight]) -> Iterator[list[nn.Module]]:
    """The dense copy with two layers in the place of each that is stored as factors; none where none is.

    The copy shares what is not factored, so that it takes no memory twice.
    """
    modules = dict(named_modules(dense))
    pairs = {
        name: each.factors
        for name, each in done.items()
        if each.factors is not None
        and each.factors[0].shape[1] > 0
        and name
        and refusal(modules[name], default_form(modules[name])) is None
    }
    if not pairs:
        yield []
        return
    shared = {id(tensor): tensor for tensor in (*dense.parameters(), *dense.buffers())}
    two = copy.deepcopy(dense, shared)  # what is in `shared` is not copied
    own = dict(named_modules(two))
    for name, (left, right) in pairs.items():
        whole = own[name]
        module: Any = factored(whole, default_form(whole), (left.shape[1],))
        with torch.no_grad():
            module.first.weight.copy_(right.view(module.first.weight.shape))
            module.second.weight.copy_(left.view(module.second.weight.shape))
        parent, _, attribute = name.rpartition(".")
        setattr(own[parent], attribute, module)
    yield [two]


def _predicted(
    layers: Mapping[str, nn.Parameter], technique: str, value: float, other_bytes: int
) -> int | None:
    steps = read_pipeline(technique)
    if len(steps) == 1:
        return None
    return other_bytes + sum(
        payload_bytes(weight.shape, steps, value, weight.element_size()) for weight in layers.values()
    )
