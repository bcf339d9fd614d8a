"""Which range of real numbers to quantize: all of it, or less at the price of clipping the tails.

A narrower range has finer steps; what lies outside saturates. Each mode reads the range off
statistics: min, max, avg_min, avg_max (means of the samples' extremes), mean, std (population)
and b = mean |x - mean|, as `acts_quantization_stats.yaml` has them.
Knows nothing about integers, layers or files.

Source of GAUSS and LAPLACE: Banner et al., "Post training 4-bit quantization of convolutional
networks for rapid-deployment" (ACIQ), arXiv 1810.05723, section 3.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from distiller.errors import QuantizationError, StatsError

STATISTICS = ("min", "max", "avg_min", "avg_max", "mean", "std", "b")


class ClipMode(enum.Enum):
    """How a range is chosen.

    Attributes:
        NONE: [min, max].
        AVG: [avg_min, avg_max].
        N_STD: mean -+ n standard deviations, never beyond [min, max].
        GAUSS: of least mean squared error if the values were normally distributed.
        LAPLACE: the same for a Laplace distribution.
    """

    NONE = 0
    AVG = 1
    N_STD = 2
    GAUSS = 3
    LAPLACE = 4


# Clipping values alpha in units of std (Gauss) and b (Laplace), by number of bits, as Distiller has them.
_GAUSS = {1: 1.24, 2: 1.71, 3: 2.15, 4: 2.55, 5: 2.93, 6: 3.28, 7: 3.61, 8: 3.92, 9: 4.2}
_LAPLACE = {1: 1.86, 2: 2.83, 3: 3.89, 4: 5.03, 5: 6.2, 6: 7.41, 7: 8.64, 8: 9.89, 9: 11.16}


def clipped_range(
    stats: Mapping[str, Any],
    clip: ClipMode,
    num_bits: int,
    symmetric: bool,
    n_stds: float | None = None,
    half_range: bool = False,
    where: str = "statistics",
) -> tuple[Tensor, Tensor]:
    """The range to quantize.

    GAUSS and LAPLACE, with alpha from `optimal_alpha` in units of std or b: symmetric -+(|mean| + alpha);
    asymmetric from lo = max(avg_min, mean - alpha) to lo + 2 alpha (lo + alpha with `half_range`).

    Args:
        stats: numbers or tensors (one value per channel) by name.
        clip: the mode.
        num_bits: width that the range is quantized to.
        symmetric: whether the range is to be symmetric about 0.
        n_stds: for N_STD, > 0.
        half_range: the values pass a ReLU: nothing below 0 counts.
        where: what the statistics are of, for messages.

    Returns:
        (lo, hi), in float64 where the statistics are numbers.

    Raises:
        StatsError: a statistic that the mode needs is missing.
        QuantizationError: N_STD without `n_stds`.
    """

    def get(key: str) -> Tensor:
        value = stats.get(key)
        if value is None:
            raise StatsError(_missing(where, key, clip))
        return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)

    if clip is ClipMode.NONE:
        lo, hi = get("min"), get("max")
    elif clip is ClipMode.AVG:
        lo, hi = get("avg_min"), get("avg_max")
    elif clip is ClipMode.N_STD:
        reach = check_n_stds(clip, n_stds, where) * get("std")
        lo = torch.maximum(get("min"), get("mean") - reach)
        hi = torch.minimum(get("max"), get("mean") + reach)
    else:
        alpha = optimal_alpha(clip, num_bits, half_range) * get("std" if clip is ClipMode.GAUSS else "b")
        if symmetric:
            hi = get("mean").abs() + alpha
            lo = -hi
        else:
            lo = torch.maximum(get("avg_min"), get("mean") - alpha)
            lo = lo.clamp(min=0) if half_range else lo
            hi = lo + (alpha if half_range else 2 * alpha)
    return (lo.clamp(min=0), hi.clamp(min=0)) if half_range else (lo, hi)


@cache
def optimal_alpha(clip: ClipMode, num_bits: int, half_range: bool = False) -> float:
    """The clipping value of least mean squared error, in standard deviations (GAUSS) or b (LAPLACE).

    Up to 8 bits Distiller's tables. Beyond, which they do not cover, the root of the error's derivative:
    Laplace alpha * exp(alpha) = 3 * 4^M; Gauss alpha / (3 * 4^M) = 2 phi(alpha) -
    alpha * erfc(alpha / sqrt 2), phi being the normal density. Half a range has the values of one bit more.

    Args:
        clip: GAUSS or LAPLACE.
        num_bits: M, at least 1.
        half_range: whether only one half of the distribution is kept.
    """
    from scipy.optimize import brentq  # a second of import, which only more than 8 bits need
    from scipy.special import erfc, lambertw

    bits = num_bits + int(half_range)
    table = _GAUSS if clip is ClipMode.GAUSS else _LAPLACE
    if bits in table:
        return table[bits]
    if clip is ClipMode.LAPLACE:
        return float(lambertw(3 * 4.0**bits).real)

    def error_slope(alpha: float) -> float:
        density = math.exp(-alpha * alpha / 2) / math.sqrt(2 * math.pi)
        return alpha * float(erfc(alpha / math.sqrt(2))) - 2 * density + alpha / (3 * 4.0**bits)

    return cast(float, brentq(error_slope, 0.5, 20.0))


def tensor_stats(x: Tensor, clip: ClipMode, per_row: bool = False) -> dict[str, Tensor]:
    """The statistics that `clip` needs, of a tensor itself.

    Args:
        x: (rows, ...): samples of an activation, filters of a weight.
        clip: the mode they are for.
        per_row: one value for each row, shape (rows,), rather than one in all; a row is then a sample.
    """
    rows = x.reshape(x.shape[0], -1) if x.dim() > 1 or per_row else x.reshape(1, -1)
    values = rows if per_row else rows.reshape(1, -1)
    stats = {"min": values.amin(1), "max": values.amax(1)}
    if clip in (ClipMode.AVG, ClipMode.GAUSS, ClipMode.LAPLACE):
        stats["avg_min"] = stats["min"] if per_row else rows.amin(1).mean(0, keepdim=True)
        stats["avg_max"] = stats["max"] if per_row else rows.amax(1).mean(0, keepdim=True)
    if clip in (ClipMode.N_STD, ClipMode.GAUSS, ClipMode.LAPLACE):
        stats["mean"] = values.mean(1)
        centred = values - stats["mean"].unsqueeze(1)
        stats["std"] = centred.square().mean(1).sqrt()
        stats["b"] = centred.abs().mean(1)
    return stats if per_row else {key: value.squeeze(0) for key, value in stats.items()}


def check_n_stds(clip: ClipMode, n_stds: float | None, where: str) -> float:
    """`n_stds`, or 0 for modes that do not read it.

    Raises:
        QuantizationError: N_STD without a positive number of standard deviations.
    """
    if clip is not ClipMode.N_STD:
        return 0.0
    if isinstance(n_stds, bool) or not isinstance(n_stds, int | float) or not 0 < n_stds < math.inf:
        raise QuantizationError(
            f"{where}: clip mode N_STD needs clip_n_stds, a number of standard deviations > 0, got {n_stds!r}"
        )
    return float(n_stds)


def _missing(where: str, key: str, clip: ClipMode) -> str:
    return (
        f"{where}: clip mode {clip.name} needs the statistic '{key}', which the file does not have; "
        "collect the statistics anew (--qe-calibration) or choose another clip mode"
    )
