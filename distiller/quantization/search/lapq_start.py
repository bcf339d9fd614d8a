"""Where the loss-aware search of scales starts: ranges by clip modes, or of least error of the values.

The values of activations are those of the model in floating point; one evaluation shows all of them, and a
sample of each is kept. What was found is in the record of the search, so that it is found once.
Knows nothing about the search itself.

Source: Nahshan et al., "Loss aware post-training quantization", arXiv 1911.07190, sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distiller.quantization.activation_quant import ActivationQuantizer, QuantSettings
from distiller.quantization.clipping import ClipMode
from distiller.quantization.post_train import PostTrainLinearQuantizer
from distiller.quantization.ptq_weights import filters_first
from distiller.quantization.ptq_wrapper import RangeLinearQuantWrapper
from distiller.quantization.search.copies import changed, explicit_overrides, prepared_copy
from distiller.quantization.search.float_run import in_float, sampled_inputs
from distiller.quantization.search.grids import Layers, quantized_layers
from distiller.quantization.search.lapq_settings import QUADRATIC, LapqSettings
from distiller.quantization.search.lapq_space import put_ranges
from distiller.quantization.search.lp_ranges import InitMode, RangeError, best_share, init_name, norm_error
from distiller.quantization.search.search_log import SearchLog

NORMS = (2.0, 2.5, 3.0, 3.5, 4.0)
"""The p between which the parabola is laid."""


def started(
    quantizer: PostTrainLinearQuantizer,
    dummy_input: Any,
    settings: LapqSettings,
    log: SearchLog,
    evaluate: Callable[[PostTrainLinearQuantizer], float],
) -> tuple[PostTrainLinearQuantizer, float | None]:
    """The prepared copy of a quantizer at the start of the search, and the p of its norm if that was chosen.

    Args:
        quantizer: not prepared; not changed. Outputs to which its overrides give a `clip_acts` keep that.
        dummy_input: for `prepare_model`.
        settings: `init_mode` and `init_method`.
        log: of the search.
        evaluate: the loss of a prepared quantizer's model.
    """
    modes = settings.modes(())
    everywhere = modes[""] if isinstance(modes[""], ClipMode) else ClipMode.NONE
    changes: dict[str, Any] = {"save_fp_weights": True, "clip_acts": everywhere}
    prepared = prepared_copy(quantizer, dummy_input, is_quiet=False, **changes)
    layers = quantized_layers(prepared.model, dummy_input)
    modes = settings.modes(tuple(layers))
    clips = {
        name: {"clip_acts": mode.name} for name, mode in modes.items() if name and isinstance(mode, ClipMode)
    }
    if clips:
        overrides = changed(explicit_overrides(prepared), clips)
        prepared = prepared_copy(quantizer, dummy_input, **changes, overrides=overrides)
        layers = quantized_layers(prepared.model, dummy_input)
    ranges = _Ranges(prepared, layers, settings, log, lambda: evaluate(prepared))
    if settings.init_method == QUADRATIC:
        return prepared, ranges.lay_by_parabola()
    by_error = {name: modes.get(name, modes[""]) for name in layers}
    ranges.lay({name: mode for name, mode in by_error.items() if not isinstance(mode, ClipMode)})
    return prepared, None


class _Ranges:
    """The full ranges of a prepared model's grids, and those of least error."""

    def __init__(
        self,
        quantizer: PostTrainLinearQuantizer,
        layers: Layers,
        settings: LapqSettings,
        log: SearchLog,
        evaluate: Callable[[], float],
    ) -> None:
        self._quantizer = quantizer
        asked = settings.modes(())
        self._layers = layers
        self._method = None if settings.init_method == QUADRATIC else settings.init_method
        self._log = log
        self._evaluate = evaluate
        self._samples: dict[str, Tensor] | None = None
        self._full = {
            f"{name}.{prefix}": (grid.settings, *grid.settings.ends(grid.scale, grid.zero_point))
            for name, layer in self._layers.items()
            for prefix, grid in layer.adjustable_grids().items()
            if prefix == "w" or not (layer.keeps_grid or _has_own_clip(quantizer, name, asked))
        }

    def lay(self, modes: Mapping[str, InitMode]) -> None:
        """Give layers the ranges of least error, as each wants it measured."""
        for mode in dict.fromkeys(modes.values()):
            self._put(mode, [name for name, wanted in modes.items() if wanted == mode])

    def lay_by_parabola(self) -> float:
        """Give all layers the ranges of the norm of least loss; returns its p.

        A parabola through the losses at `NORMS` has its minimum there, or else the best of them is taken.
        """
        losses = {p: self._loss_at(p) for p in NORMS}
        known = [(p, loss) for p, loss in losses.items() if np.isfinite(loss)]
        if len(known) >= 3:
            a, b, _ = np.polyfit(*zip(*known, strict=True), deg=2)
            vertex = float(round(-b / (2 * a), 3)) if a > 0 else NORMS[0]
            if a > 0 and NORMS[0] < vertex < NORMS[-1]:
                losses[vertex] = self._loss_at(vertex)
        best = min(losses, key=lambda p: losses[p] if np.isfinite(losses[p]) else np.inf)
        self._put(best, list(self._layers))
        return best

    def _loss_at(self, p: float) -> float:
        def measure() -> float:
            self._put(p, list(self._layers))
            return self._evaluate()

        return self._log.evaluated({"norm": p}, measure)

    def _put(self, mode: InitMode, names: list[str]) -> None:
        grids = [grid for grid in self._full if grid.rpartition(".")[0] in names]
        note = {"shares": init_name(mode), "of": grids}
        shares = self._log.remembered(note, lambda: self._shares(mode, grids))
        ranges = {}
        for grid, share in shares.items():
            _, lo, hi = self._full[grid]
            factor = torch.tensor(share, dtype=lo.dtype, device=lo.device)
            ranges[grid] = (lo * factor, hi * factor)
        put_ranges(self._quantizer, ranges)

    def _shares(self, mode: InitMode, grids: list[str]) -> dict[str, Any]:
        """By grid how much of its full range to keep; those whose values were not seen are left out."""
        assert not isinstance(mode, ClipMode)
        error = norm_error(mode) if isinstance(mode, int | float) else mode
        return {grid: share for grid in grids if (share := self._share(grid, error)) is not None}

    def _share(self, grid: str, error: RangeError) -> Any:
        settings, lo, hi = self._full[grid]
        name, _, prefix = grid.rpartition(".")
        values = (
            _float_weight(self._layers[name], settings) if prefix == "w" else self._activations().get(name)
        )
        if values is None or not values.numel():
            return None
        values = values.to(lo.device, lo.dtype)
        return best_share(values, lo, hi, settings, error, self._method).tolist()

    def _activations(self) -> dict[str, Tensor]:
        """By layer a sample of what the output's quantizer is given, the model being in floating point."""
        if self._samples is None:
            quantizers: dict[str, ActivationQuantizer] = {
                name: layer.output_quant
                for name, layer in self._layers.items()
                if f"{name}.output" in self._full and layer.output_quant is not None
            }
            with in_float(self._layers):
                self._samples = sampled_inputs(quantizers, self._evaluate)
        return self._samples


def _has_own_clip(quantizer: PostTrainLinearQuantizer, name: str, asked: Collection[str]) -> bool:
    """Whether the overrides give the layer a `clip_acts`, and not the start that was asked for."""
    given = quantizer.overrides.get(quantizer.override_keys.get(name, ""), {})
    return "clip_acts" in given and name not in asked


def _float_weight(layer: RangeLinearQuantWrapper, settings: QuantSettings) -> Tensor:
    """The full-precision weight, (values,) or, with a range for each channel, (channels, values)."""
    weight: Tensor = layer.wrapped_module.float_weight  # type: ignore[assignment]
    return (
        filters_first(weight, layer.wrapped_module).flatten(1) if settings.per_channel else weight.flatten()
    )
