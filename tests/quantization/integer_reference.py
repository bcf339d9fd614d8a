"""What integer hardware computes, in numpy's int64, written from the formulas alone."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn

from distiller.quantization.activation_quant import ActivationQuantizer


def integers(real: Tensor, grid: ActivationQuantizer) -> np.ndarray:
    """The integers that values on a grid stand for."""
    q = real.detach().double().numpy() / grid.scale.double().item() + int(grid.zero_point)
    assert np.abs(q - np.rint(q)).max() < 1e-2
    return np.rint(q).astype(np.int64)


def convolution(x: np.ndarray, w: np.ndarray, layer: nn.Module) -> np.ndarray:
    """Accumulators of a 2-d convolution of integers, zero points already taken off."""
    (sh, sw), (ph, pw), (dh, dw) = layer.stride, layer.padding, layer.dilation  # type: ignore[misc]
    x = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    window = ((w.shape[2] - 1) * dh + 1, (w.shape[3] - 1) * dw + 1)
    windows = sliding_window_view(x, window, axis=(2, 3))[:, :, ::sh, ::sw, ::dh, ::dw]
    groups: int = layer.groups  # type: ignore[assignment]
    parts = [
        np.einsum("nchwij,ocij->nohw", part, filters)
        for part, filters in zip(np.split(windows, groups, 1), np.split(w, groups, 0), strict=True)
    ]
    return np.concatenate(parts, 1)


def requantized(
    accumulator: np.ndarray, scale: np.ndarray | float, output: ActivationQuantizer, has_relu: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Accumulators of a real scale as integers of the output's grid, and how far each was from a tie."""
    accumulator = np.maximum(accumulator, 0) if has_relu else accumulator
    exact = accumulator * (scale / output.scale.double().item())
    qmin, qmax = output.settings.qrange
    q = np.clip(np.rint(exact).astype(np.int64) + int(output.zero_point), qmin, qmax)
    return q, np.abs(np.abs(exact - np.trunc(exact)) - 0.5)


def assert_same_but_for_ties(simulated: np.ndarray, expected: np.ndarray, from_tie: np.ndarray) -> None:
    """Equal, but that rounding ties may go either way."""
    differ = simulated != expected
    assert np.abs(simulated - expected).max() <= 1
    assert (from_tie[differ] < 1e-3).all()
    assert differ.mean() < 0.02
