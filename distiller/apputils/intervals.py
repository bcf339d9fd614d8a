"""How far a measured rate can be trusted. Numbers in, numbers out."""

from __future__ import annotations

import math
from statistics import NormalDist

from distiller.errors import UsageError


def wilson_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval in which the true success rate lies with the given confidence.

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), with p = k/n.

    Args:
        k: successes, 0 to n.
        n: trials, at least 1.
        confidence: in (0, 1).

    Returns:
        Lower and upper end, 0..1.

    Raises:
        UsageError: an argument is out of range.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.
    """
    if not (n >= 1 and 0 <= k <= n and 0 < confidence < 1):
        raise UsageError(
            f"interval: wants 0 <= k <= n, n >= 1 and 0 < confidence < 1, got k={k}, n={n}, {confidence=}"
        )
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = k / n
    centre = p + z * z / (2 * n)
    half_width = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half_width) / scale), min(1.0, (centre + half_width) / scale)
