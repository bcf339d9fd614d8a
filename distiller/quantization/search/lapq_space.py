"""The scales or clipping values of a quantized model as one vector, for an optimizer.

    value_i = initial value_i * 2^x_i

x = 0 is the start, one unit an octave, and every x gives a positive scale. The scales of a weight's channels
are one component: they are varied together. Points are taken at steps of 1/256 octave, a quarter percent:
line searches end with many points nearer to each other than that, which then are evaluated once.
Knows nothing about losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distiller.errors import QuantizationError
from distiller.quantization.ptq_adjustable import AdjustableQuantizer

_STEPS = 256
LARGEST = 8.0
"""|x_i| of what is put; beyond, nothing of a layer would be left, or only noise."""


def nearest_point(x: np.ndarray) -> np.ndarray:
    """The point, (components,), at steps of 1/256 octave."""
    return np.round(x * _STEPS) / _STEPS + 0.0  # no -0.0, which would be a point of its own


class ScaleSpace:
    """What may be varied of a prepared quantizer.

    Args:
        quantizer: prepared, with the full-precision weights kept.
        search_clipping: vary clipping values, not scales.

    Attributes:
        names: of the components: `conv1.output_scale`, `fc.w_clipping`.

    Raises:
        QuantizationError: there is nothing that is fixed and could be varied.
    """

    def __init__(self, quantizer: AdjustableQuantizer, search_clipping: bool) -> None:
        self._quantizer = quantizer
        self._initial = {
            name: value.detach().clone()
            for name, value in quantizer.named_linear_quant_params(search_clipping, filter=True)
        }
        self.names = tuple(name for name, value in self._initial.items() if bool(value.any()))
        self._put: dict[str, list[float]] = {}
        if not self.names:
            raise QuantizationError(
                "nothing of the model has a fixed scale that could be searched: quantize weights, or "
                "activations with statistics"
            )

    def put(self, x: np.ndarray) -> None:
        """Let the model compute with the values of a point; only what is another than before is set.

        Args:
            x: (components,), within -+`LARGEST`.
        """
        exponents = dict(zip(self.names, x.tolist(), strict=True))
        by_grid: dict[str, dict[str, float]] = {}
        for name in self._initial:
            by_grid.setdefault(_grid_of(name), {})[name] = exponents.get(name, 0.0)
        changes: dict[str, float | Tensor] = {}
        for grid, wanted in by_grid.items():
            # Both ends of a range at once: what one end becomes by rounding must not depend on the way here.
            if self._put.get(grid) != list(wanted.values()):
                changes.update(
                    {name: self._initial[name] * 2.0**exponent for name, exponent in wanted.items()}
                )
                self._put[grid] = list(wanted.values())
        if changes:
            self._quantizer.update_linear_quant_params(changes)


def plain_params(quantizer: AdjustableQuantizer) -> dict[str, float | list[float]]:
    """Scales and zero points by name in Distiller's convention, numbers or, of channels, lists."""
    return {name: value.tolist() for name, value in quantizer.named_linear_quant_params()}


def put_ranges(quantizer: AdjustableQuantizer, ranges: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Lay fixed grids over other ranges.

    Args:
        quantizer: prepared.
        ranges: (lo, hi) by the name of a grid: `conv1.output`, `conv1.w`.
    """
    clipping = dict(quantizer.named_clipping())
    changes: dict[str, float | Tensor] = {}
    for grid, (lo, hi) in ranges.items():
        ends: dict[str, Any] = {"clipping": torch.maximum(lo.abs(), hi.abs()), "clip_min": lo, "clip_max": hi}
        changes.update({f"{grid}_{key}": end for key, end in ends.items() if f"{grid}_{key}" in clipping})
    quantizer.update_linear_quant_params(changes)


def _grid_of(name: str) -> str:
    """`conv1.output` of `conv1.output_clip_min`."""
    layer, _, value = name.rpartition(".")
    return f"{layer}.{value.partition('_')[0]}"
