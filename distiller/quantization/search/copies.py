"""Quantized copies of a model whose quantizer is not prepared yet: that one, and its model, stay as they are.

Knows nothing about what is searched.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from torch import nn

from distiller.data_loggers.quant_stats import collect_quant_stats
from distiller.errors import QuantizationError
from distiller.evaluation_mode import evaluating
from distiller.names import canonical_state_dict, named_modules, unwrap
from distiller.observation import unobserved
from distiller.quantization.post_train import PostTrainLinearQuantizer
from distiller.quantization.ptq_build import kind_of
from distiller.quantization.ptq_settings import OVERRIDE_KEYS
from distiller.quantization.ptq_wrapper import RangeLinearQuantWrapper
from distiller.quantization.quantizer import BITS_KEYS
from distiller.quantization.search.search_log import SearchLog

EvalFn: TypeAlias = Callable[[nn.Module], float]
"""Runs a model on the same data each time and returns its loss: the lower, the better."""


def check_arguments(where: str, quantizer: Any, eval_fn: Any) -> None:
    """Refuse a quantizer that is none, or prepared already, and an `eval_fn` that is no function.

    Raises:
        QuantizationError: naming the argument.
    """
    if not isinstance(quantizer, PostTrainLinearQuantizer):
        raise QuantizationError(
            f"{where}: quantizer: must be a PostTrainLinearQuantizer, got {type(quantizer).__name__}"
        )
    if quantizer.is_prepared:
        raise QuantizationError(
            f"{where}: quantizer: its model is prepared already; give one whose prepare_model was not called"
        )
    check_function(where, "eval_fn", eval_fn)


def check_function(where: str, argument: str, value: Any) -> None:
    """Refuse what cannot be called.

    Raises:
        QuantizationError: naming the argument.
    """
    if not callable(value):
        raise QuantizationError(
            f"{where}: {argument}: must be a function of the model, got {type(value).__name__}"
        )


def loss_of(model: nn.Module, eval_fn: EvalFn, where: str) -> float:
    """What `eval_fn` returns, as a number; without gradients.

    Raises:
        QuantizationError: it returned something else.
    """
    with torch.no_grad():
        value: Any = eval_fn(model)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise QuantizationError(
            f"{where}: eval_fn: must return a number, the loss, got {type(value).__name__}"
        ) from error


def prepared_copy(
    quantizer: PostTrainLinearQuantizer, dummy_input: Any, *, is_quiet: bool = True, **changes: Any
) -> PostTrainLinearQuantizer:
    """A quantizer with other settings, prepared, on a copy of the model.

    Args:
        quantizer: not prepared; not changed.
        dummy_input: for `prepare_model`.
        is_quiet: without the warnings of preparing, which the last copy gives.
        changes: settings other than those of `quantizer`.

    Raises:
        DistillerError: as the constructor and `prepare_model`.
    """
    with unobserved(quantizer.model):
        model = copy.deepcopy(quantizer.model)
    with warnings.catch_warnings() if is_quiet else nullcontext():
        if is_quiet:
            warnings.simplefilter("ignore")
        prepared = type(quantizer)(model, **{**quantizer.settings(), **changes})
        prepared.prepare_model(dummy_input)
    return prepared


def with_statistics(
    quantizer: PostTrainLinearQuantizer, test_fn: Callable[[nn.Module], Any], log: SearchLog
) -> PostTrainLinearQuantizer:
    """The quantizer, or one like it with statistics, where activations are quantized and it has none.

    Args:
        quantizer: not prepared; not changed.
        test_fn: runs the model; called twice, and not again when the search is resumed.
        log: of the search.
    """
    if not lacks_statistics(quantizer):
        return quantizer
    settings = quantizer.settings()
    with unobserved(quantizer.model):
        model = copy.deepcopy(quantizer.model)

    def collect() -> dict[str, Any]:
        with evaluating(model):
            return collect_quant_stats(model, lambda model: test_fn(model))

    found = log.remembered({"statistics": "of activations"}, collect)
    stats = {
        name: {**entry, "inputs": {int(index): stats for index, stats in entry["inputs"].items()}}
        for name, entry in found.items()
    }
    return type(quantizer)(model, **{**settings, "model_activation_stats": stats})


def lacks_statistics(quantizer: PostTrainLinearQuantizer) -> bool:
    """Whether activations are to be quantized, and there are no statistics that fix their ranges."""
    settings = quantizer.settings()
    widths = [settings["bits_activations"], *(bits.acts for bits in quantizer.module_qbits_map.values())]
    return settings["model_activation_stats"] is None and any(widths)


def identity_of(quantizer: PostTrainLinearQuantizer) -> dict[str, Any]:
    """The model and the settings, short enough for the first line of a search's record."""
    settings = quantizer.settings()
    stats = settings.pop("model_activation_stats")
    text = json.dumps(stats, sort_keys=True).encode()
    return {
        "model": digest_of(quantizer.model),
        "statistics": None if stats is None else hashlib.sha256(text).hexdigest()[:16],
        "quantizer": settings,
    }


def digest_of(model: nn.Module) -> str:
    """16 hexadecimal digits that are of a model's parameters and buffers, names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(canonical_state_dict(model).items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def explicit_overrides(quantizer: PostTrainLinearQuantizer) -> dict[str, dict[str, Any]]:
    """The overrides of a prepared quantizer with the names of layers in the place of patterns.

    A ReLU that a layer does the work of, and a module that stays on the grid of what it reads, have none:
    so they follow that layer, whatever is overridden there.

    Returns:
        Plain data. Given to an equal quantizer they make the same model, also with changes to single layers'.
    """
    given, now = quantizer.settings()["overrides"], dict(named_modules(unwrap(quantizer.model)))
    found: dict[str, dict[str, Any]] = {}
    for name, key in quantizer.override_keys.items():
        layer, module = quantizer.layers.get(name), now.get(name)
        is_absorbed = isinstance(module, nn.Identity) and not given[key].get("make_identity")
        follows = isinstance(module, RangeLinearQuantWrapper) and module.keeps_grid
        if layer is None or is_absorbed or follows:
            continue
        accepted = (*BITS_KEYS, *OVERRIDE_KEYS[kind_of(layer)])
        found[name] = {setting: value for setting, value in given[key].items() if setting in accepted}
    return found


def changed(
    overrides: Mapping[str, Mapping[str, Any]], changes: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Overrides by layer with some settings replaced or added."""
    return {name: {**overrides.get(name, {}), **changes.get(name, {})} for name in {**overrides, **changes}}
