"""The sensitivity at which `SensitivityPruner` begins with a level.

Knows nothing about sweeps or schedules.
"""

from __future__ import annotations

import math

from torch import Tensor

from distiller.errors import DistillerError
from distiller.pruning.criteria import refuse_nan, snap, standard_deviation, widened

__all__ = ["sensitivity_of_level"]

_DIGITS = 6  # significant


def sensitivity_of_level(weight: Tensor, level: float) -> float:
    """How many standard deviations prune a fraction of a weight.

        s = t / std(w),  t halfway between the floor(level n)-th smallest |w| and the next

    so that |w| > s std(w) keeps all but these. It is rounded to six digits where that changes nothing.

    Args:
        weight: dense, of any shape.
        level: the fraction, in [0, 1).

    Returns:
        s, 0 or more. Where magnitudes are equal at the threshold, all of them go.

    Raises:
        DistillerError: the weight holds NaN, or all its elements are alike.
    """
    refuse_nan(weight)
    deviation = standard_deviation(weight)
    if deviation == 0:
        raise DistillerError("a sensitivity is a multiple of the standard deviation, which is 0; take 'agp'")
    magnitudes = widened(weight).abs().flatten().double().sort().values
    count = int(snap(level * weight.numel()))
    if count == 0:
        return 0.0
    below = float(magnitudes[count - 1])
    above = float(magnitudes[count]) if count < weight.numel() else below
    exact = (below + above) / 2 / deviation
    rounded = float(f"{exact:.{_DIGITS}g}")
    is_between = below <= rounded * deviation < above
    return rounded if is_between else max(exact, math.nextafter(below / deviation, math.inf))
