"""The range of least error of a tensor that is to be quantized: its full range, shrunk.

    e(share) = mean |x - Q(x; share * lo, share * hi)|^p                 0 < share <= 1

A small p forgives the clipping of few large values, a large one does not. Rounding makes e jagged: it is
minimised over a fine geometric grid of shares, each channel by itself, or by a method of scipy.optimize.
Knows nothing about layers.

Source: Nahshan et al., "Loss aware post-training quantization", arXiv 1911.07190, section 3.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from distiller.errors import QuantizationError
from distiller.quantization import affine
from distiller.quantization.activation_quant import QuantSettings
from distiller.quantization.clipping import ClipMode
from distiller.quantization.ptq_settings import parse_clip

RangeError: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(values, quantized values), both (rows, n) -> the error: of each row, or one in all."""

InitMode: TypeAlias = ClipMode | float | RangeError
"""How a range is chosen: a clip mode, the p of a norm, or an error of one's own."""

_COARSE = 2.0 ** (-torch.arange(21) / 4)  # 1 to 1/32
_FINE = 2.0 ** (torch.arange(-7, 8) / 32)
_NORM = re.compile(r"[Ll](\d+(?:\.\d+)?)")


def parse_init(value: Any, where: str) -> InitMode:
    """A clip mode by name or member, a norm as `L2` or `L2.5`, or a function.

    Raises:
        QuantizationError: none of these.
    """
    if isinstance(value, str) and (norm := _NORM.fullmatch(value)):
        p = float(norm[1])
        if p <= 0:
            raise QuantizationError(f"{where}: a norm is of p > 0, got {value!r}")
        return p
    if callable(value):
        return value  # type: ignore[return-value]
    try:
        return parse_clip(value, where)
    except QuantizationError as error:
        raise QuantizationError(f"{error}; norms (L1, L2, L2.5, ...) and functions are taken, too") from error


def init_name(mode: InitMode) -> str:
    """`LAPLACE`, `L2`, or the name of a function."""
    if isinstance(mode, ClipMode):
        return mode.name
    return f"L{mode:g}" if isinstance(mode, float) else getattr(mode, "__qualname__", type(mode).__name__)


def norm_error(p: float) -> RangeError:
    """Mean |x - q|^p of each row."""
    return lambda x, q: (x - q).abs().pow(p).mean(-1)


def best_share(
    values: Tensor,
    lo: Tensor,
    hi: Tensor,
    settings: QuantSettings,
    error: RangeError,
    method: str | None = None,
) -> Tensor:
    """How much of a range to keep.

    Args:
        values: (n,); with a range for each channel (channels, n).
        lo: lower ends, scalar or (channels,).
        hi: upper ends, alike.
        settings: width and mode.
        error: what is to be small; one that is of all rows together gives all channels the same share.
        method: of `scipy.optimize.minimize`, which varies log2 of one share for all channels from 0 on;
            None: the grid, at steps of 1/32 octave, from 1 down to 1/37.

    Returns:
        0 to 1 (more, where a method of scipy finds that), in the shape of `lo`.
    """
    rows = values if lo.dim() else values.unsqueeze(0)
    lo, hi, shape = lo.reshape(-1), hi.reshape(-1), lo.shape

    def errors(share: Tensor) -> Tensor:
        found = error(rows, _rounded(rows, lo * share, hi * share, settings))
        return torch.as_tensor(found).detach().expand(len(rows))

    if method is not None:
        # Beyond 64 octaves float32 has no scales.
        found = minimize(lambda x: float(errors(_power(x)).mean()), np.zeros(1), method=method)
        return _power(np.atleast_1d(found.x)).expand(shape)
    best = torch.ones_like(lo)
    for steps in (_COARSE, _FINE):
        around = best
        lowest = errors(best)
        for step in steps.tolist():
            share = (around * step).clamp(max=1)
            found = errors(share)
            is_lower = found < lowest
            best, lowest = torch.where(is_lower, share, best), torch.where(is_lower, found, lowest)
    return best.reshape(shape)


def _power(x: np.ndarray) -> Tensor:
    return torch.tensor(2.0 ** float(np.clip(x[0], -64, 64)))


def _rounded(rows: Tensor, lo: Tensor, hi: Tensor, settings: QuantSettings) -> Tensor:
    scale, zero_point = affine.scale_and_zero_point(lo, hi, settings.num_bits, settings.quant_mode)
    return affine.fake_quantize(rows, scale, zero_point, *settings.qrange, axis=0)
