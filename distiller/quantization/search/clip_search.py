"""Greedy search of clip modes: layer by layer the one of least loss, in the order in which the layers run.

    start with every layer at the mode of the settings
    for each layer: evaluate the model with each other mode there; keep the best

What was chosen for earlier layers stays, later ones are still at the mode they started with: the loss can
only fall. One model is prepared for each mode, to read its grids off; a candidate costs one evaluation.
Knows nothing about data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from distiller.errors import QuantizationError
from distiller.quantization.clipping import ClipMode
from distiller.quantization.post_train import PostTrainLinearQuantizer
from distiller.quantization.ptq_settings import parse_clip
from distiller.quantization.search.copies import (
    EvalFn,
    changed,
    check_function,
    explicit_overrides,
    identity_of,
    loss_of,
    prepared_copy,
    with_statistics,
)
from distiller.quantization.search.grids import LayerGrids, Layers, grids_of, put_grids, quantized_layers
from distiller.quantization.search.search_log import Progress, SearchLog

_WHERE = "ptq_greedy_search"
CLIP_MODES = ("NONE", "AVG", "GAUSS", "LAPLACE")
"""Those that Distiller's search chooses from."""


def ptq_greedy_search(
    model: nn.Module,
    dummy_input: Any,
    eval_fn: EvalFn,
    calib_eval_fn: EvalFn | None = None,
    recurrent: bool = False,
    act_stats: str | Path | Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    clip_modes: Sequence[str | ClipMode] = CLIP_MODES,
    log_path: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
    """Quantize a model with the clip mode for each layer that a greedy search finds.

    A layer's mode is that of its output and of those of its inputs that nobody quantized before; with
    `also_clip_weights` in the settings that of its weight, too. Layers that the settings' overrides give a
    `clip_acts` keep it. At most 1 + (modes - 1) * layers evaluations: of modes that come to the same grids
    one is tried.

    Args:
        model: in floating point; not changed.
        dummy_input: an input, or a tuple of them, to trace the model with.
        eval_fn: `eval_fn(model)` runs a model on the same data each time and returns its loss; NaN loses.
        calib_eval_fn: runs the model to collect statistics, without `act_stats`; default `eval_fn`.
        recurrent: accepted for Distiller's callers; layers are taken in the order of their first calls, which
            those of recurrent networks have as well.
        act_stats: statistics of activations, a file or its content.
        settings: arguments of `PostTrainLinearQuantizer` by name; default its defaults. `clip_acts` is where
            the search starts.
        clip_modes: the modes to choose from, the one of the settings besides.
        log_path: keeps every evaluated point, for `SearchLog`; a search that was killed goes on from there.
        progress: called after each point.

    Returns:
        The quantized model, and the overrides that make it, by layer: plain data for YAML.

    Raises:
        QuantizationError: an argument is wrong, or nothing of the model is quantized.
        StatsError: the statistics cannot be read, are of another model, or lack what a clip mode needs.

    Source: Distiller's ptq_greedy_search; its argument `args` is `settings` here:
        `PostTrainLinearQuantizer.from_args(model, args).settings()`.
    """
    check_function(_WHERE, "eval_fn", eval_fn)
    modes = parse_modes(clip_modes)
    quantizer = _quantizer(model, settings, act_stats)
    identity = {**identity_of(quantizer), "clip_modes": [mode.name for mode in modes]}
    log = SearchLog(log_path, "clip modes", identity, progress)
    quantizer = with_statistics(quantizer, calib_eval_fn or eval_fn, log)

    working = prepared_copy(quantizer, dummy_input, save_fp_weights=True)
    layers = quantized_layers(working.model, dummy_input)
    start = working.default_settings.clip_acts
    candidates = _candidates(quantizer, dummy_input, layers, [mode for mode in modes if mode is not start])
    log.expect(1 + sum(len(others) for others in candidates.values()))
    chosen = _search(layers, candidates, log, lambda: loss_of(working.model, eval_fn, _WHERE))

    clips = {name: {"clip_acts": chosen.get(name, start.name)} for name in candidates}
    overrides = changed(explicit_overrides(working), clips)
    result = prepared_copy(quantizer, dummy_input, is_quiet=False, overrides=overrides)
    return result.model, overrides


def _search(
    layers: Layers, candidates: Mapping[str, Mapping[str, LayerGrids]], log: SearchLog, evaluate: Any
) -> dict[str, str]:
    """The modes of the layers that go over to another one than the first; leaves the layers with these."""

    def loss(clips: Mapping[str, str], name: str, grids: LayerGrids) -> float:
        def measure() -> float:
            put_grids(layers, name, grids)
            return evaluate()

        return log.evaluated({"clip_acts": clips}, measure)

    chosen: dict[str, str] = {}
    best = log.evaluated({"clip_acts": {}}, evaluate)
    for name, others in candidates.items():
        kept, mode = grids_of(layers[name]), None
        for candidate, grids in others.items():
            found = loss({**chosen, name: candidate}, name, grids)
            if found < best or (best != best and found == found):  # anything is better than NaN
                best, kept, mode = found, grids, candidate
        put_grids(layers, name, kept)
        if mode is not None:
            chosen[name] = mode
    return chosen


def _candidates(
    quantizer: PostTrainLinearQuantizer, dummy_input: Any, layers: Layers, modes: Sequence[ClipMode]
) -> dict[str, dict[str, LayerGrids]]:
    """By layer and mode the grids that neither the modes before nor the present one come to.

    Layers whose mode is given are left out.
    """
    found: dict[str, dict[str, LayerGrids]] = {
        name: {}
        for name, layer in layers.items()
        if _is_free(quantizer, name) and grids_of(layer).activations
    }
    for mode in modes:
        others = prepared_copy(quantizer, dummy_input, clip_acts=mode)
        of_mode = quantized_layers(others.model, dummy_input)
        for name, known in found.items():
            grids = grids_of(of_mode[name])
            if not any(grids.is_like(other) for other in (grids_of(layers[name]), *known.values())):
                known[mode.name] = grids
    return found


def _is_free(quantizer: PostTrainLinearQuantizer, name: str) -> bool:
    return "clip_acts" not in quantizer.overrides.get(quantizer.override_keys.get(name, ""), {})


def _quantizer(
    model: nn.Module, settings: Mapping[str, Any] | None, act_stats: str | Path | Mapping[str, Any] | None
) -> PostTrainLinearQuantizer:
    if settings is not None and not isinstance(settings, Mapping):
        raise QuantizationError(
            f"{_WHERE}: settings: must map arguments of PostTrainLinearQuantizer to values, "
            f"got {type(settings).__name__}"
        )
    arguments = dict(settings or {})
    if act_stats is not None:
        if arguments.get("model_activation_stats") is not None:
            raise QuantizationError(
                f"{_WHERE}: act_stats: the settings have model_activation_stats, too; leave one of them out"
            )
        arguments["model_activation_stats"] = act_stats
    try:
        return PostTrainLinearQuantizer(model, **arguments)
    except TypeError as error:
        raise QuantizationError(f"{_WHERE}: settings: {error}") from error


def parse_modes(clip_modes: Any) -> list[ClipMode]:
    """The modes of a list, each once.

    Raises:
        QuantizationError: it is no list of clip modes.
    """
    if isinstance(clip_modes, str) or not isinstance(clip_modes, Sequence) or not clip_modes:
        raise QuantizationError(
            f"{_WHERE}: clip_modes: must be a list of some of {', '.join(CLIP_MODES)}, got {clip_modes!r}"
        )
    return list(dict.fromkeys(parse_clip(mode, f"{_WHERE}: clip_modes") for mode in clip_modes))
