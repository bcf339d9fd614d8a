"""What a quantization report says of one layer, and how the figures of a stream of tensors are gathered.

Knows nothing about models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LayerRow", "Levels", "RunningFigures", "TensorFigures"]

_HALF_A_STEP = 0.5 + 1e-3  # and what the rounding of floating-point numbers makes of it


@dataclass(frozen=True, slots=True)
class TensorFigures:
    """A tensor, or all tensors at one place of a model, in floating point and quantized.

    Attributes:
        bits: width it is quantized to; None where it is not, or its quantizer has none.
        min: the smallest value in floating point; None where nothing was seen. So `max`.
        grid_min: the smallest value that it can have quantized; of all channels, and of all batches where
            ranges are dynamic. None where there is no grid. So `grid_max`.
        scale_min: the smallest step of the grid, of all channels and batches; None alike. So `scale_max`.
        clipped: share of the values beyond an end of the grid, further than half a step; in [0, 1].
        sqnr_db: signal-to-quantization-noise ratio 10 log10(E[x^2] / E[(x - x_q)^2]), in dB; infinite where
            nothing is lost, None where nothing was seen.
    """

    bits: int | None = None
    min: float | None = None
    max: float | None = None
    grid_min: float | None = None
    grid_max: float | None = None
    scale_min: float | None = None
    scale_max: float | None = None
    clipped: float | None = None
    sqnr_db: float | None = None


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One quantized layer.

    Attributes:
        name: of the layer; "(input)" for a quantizer of the model's input.
        kind: its class in floating point, as Conv2d.
        weight: its weight; all None where it has none, or it is not quantized.
        input: its inputs that it quantizes itself, because no layer before it did, taken together.
        output: its output, for inputs in full precision: x is what the layer in floating point puts out, x_q
            what the quantized one does. Of both only what is read counts: where the quantizer is a ReLU as
            well, or the output is read by a ReLU6 or another function that is flat beyond two values, and
            the grid was laid between them, values beyond are as good as these two.
        error: mean squared difference of the model's outputs with only this layer quantized.
        error_share: `error` over the sum of all layers' errors; in [0, 1].
        top1: accuracy with only this layer quantized, in percent; None where it was not measured.
        loss: alike.
    """

    name: str
    kind: str
    weight: TensorFigures
    input: TensorFigures
    output: TensorFigures
    error: float
    error_share: float
    top1: float | None = None
    loss: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """The values of a grid, evenly spaced: `lowest`, `lowest + scale`, ..., `highest`.

    Attributes:
        scale: the step, in a shape that broadcasts with the values.
        lowest: alike.
        highest: alike.
    """

    scale: Tensor
    lowest: Tensor
    highest: Tensor

    @classmethod
    def of(cls, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Levels:
        """The real values of integers from `qmin` to `qmax`: (q - zero_point) * scale."""
        scale = scale.detach().double()
        return cls(scale, (qmin - zero_point) * scale, (qmax - zero_point) * scale)

    def beyond(self, x: Tensor) -> int:
        """How many values of x are further than half a step below `lowest` or above `highest`."""
        slack = _HALF_A_STEP * self.scale
        inside = x.clamp((self.lowest - slack).to(x.dtype), (self.highest + slack).to(x.dtype))
        return int((inside != x).sum())


class RunningFigures:
    """`TensorFigures` of tensors that come one after the other; nothing of them is kept."""

    def __init__(self) -> None:
        self._values = self._on_grid = self._beyond = 0
        self._signal = self._noise = 0.0
        self._range = self._grid = self._scale = (math.inf, -math.inf)

    def add(self, x: Tensor, quantized: Tensor, levels: Levels | None = None) -> None:
        """Take in a tensor.

        Args:
            x: real values in full precision.
            quantized: what became of them, in the shape of x.
            levels: those that they were rounded to; None where they are on no grid.
        """
        if not x.numel():
            return
        x = x.detach().double()
        self._values += x.numel()
        self._signal += float(x.square().sum())
        self._noise += float((x - quantized.detach()).square().sum())
        self._range = _widened(self._range, x, x)
        if levels is not None:
            self._on_grid += x.numel()
            self._beyond += levels.beyond(x)
            self._grid = _widened(self._grid, levels.lowest, levels.highest)
            self._scale = _widened(self._scale, levels.scale, levels.scale)

    def result(self, bits: int | None) -> TensorFigures:
        """The figures of what was taken in so far."""
        if not self._values:
            return TensorFigures(bits)
        figures = TensorFigures(bits, *self._range, sqnr_db=decibels(self._signal, self._noise))
        if not self._on_grid:
            return figures
        return TensorFigures(
            bits,
            *self._range,
            *self._grid,
            *self._scale,
            clipped=self._beyond / self._on_grid,
            sqnr_db=figures.sqnr_db,
        )


def decibels(signal: float, noise: float) -> float:
    """10 log10(signal / noise); infinite without noise, -infinite with noise alone."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _widened(ends: tuple[float, float], lows: Tensor, highs: Tensor) -> tuple[float, float]:
    """The smallest range that has both ends and all values in it; NaN where a value is."""
    low, high = float(torch.min(lows)), float(torch.max(highs))
    if math.isnan(low) or math.isnan(high):
        return math.nan, math.nan
    return min(ends[0], low), max(ends[1], high)
