"""When a point of a sweep is known well enough: its drop of accuracy, estimated from some of the test images.

The test images are looked at in one random order that was fixed before any result. Of the first `n` of
`total` it is known for how many only the dense model was right (`lost`), and for how many only the
compressed (`won`).

    drop = 100 (lost - won) / n        percentage points

is the estimate; the question is the same number at n = total. After each look (`looks`) a point whose
interval (`drop_interval`) lies within max(error, |drop| / 10) points of the estimate is known: it needs no
more images.

The promise is about the interval at the look at which a point stops: it covers the drop on all images with
a probability of at least 95 %, whatever that drop is. A point may stop at a lucky look; intervals of 95 %
would not keep the promise then, so each look has one of 97 % (LOOK_ALPHA). docs/sensitivity_statistics.md
says where that number is from.

Knows nothing about models, images or files.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri

from distiller.errors import UsageError

__all__ = ["LOOK_ALPHA", "Judgement", "StopRule", "check_error", "drop_interval", "is_known", "looks"]

LOOK_ALPHA = 0.03
"""One minus the confidence of the interval of each look."""

_SHARE_OF_DROP = 0.1
_FIRST_LOOK = 32
_ADDED_IMAGES = 0.25
_HALVINGS = 45
_ROUNDING = 1e-9

Floats = NDArray[np.float64]
Booleans = NDArray[np.bool_]


class Judgement(NamedTuple):
    """What is known of some points after a look, an array each, in percentage points.

    Attributes:
        drop: the estimate; positive where accuracy is lost.
        low: the lower end of the interval of the drop on all test images.
        high: the upper end.
        known: whether the point needs no more images.
    """

    drop: Floats
    low: Floats
    high: Floats
    known: Booleans


def check_error(error: float) -> None:
    """Refuse an error that no drop can be known to.

    Raises:
        UsageError: it is not above 0 and below 100 percentage points.
    """
    if not 0 < error < 100:
        raise UsageError(
            f"--sense-error: must be above 0 and below 100 percentage points, got {error:g}; "
            "0.5 is a usual value, without the flag every image is looked at"
        )


@dataclass(frozen=True)
class StopRule:
    """Says after each look which points are known.

    Args:
        total: the number of test images.
        block: images that are looked at together; looks come after whole blocks.
        error: how well a drop has to be known, in percentage points, above 0 and below 100.

    Attributes:
        looks: after how many images the points are judged; the last is `total`, where all are known.

    Raises:
        UsageError: `error` out of range.
    """

    total: int
    block: int
    error: float
    looks: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        check_error(self.error)
        object.__setattr__(self, "looks", looks(self.total, self.block))

    def judge(self, n: int, lost: ArrayLike, won: ArrayLike) -> Judgement:
        """Judge points by the first `n` images.

        Args:
            n: one of `looks`.
            lost: for each point, the images of these that only the dense model got right.
            won: the images that only the compressed model got right.
        """
        lost, won = np.asarray(lost, dtype=np.float64), np.asarray(won, dtype=np.float64)
        drop = 100 * ((lost - won) / n)
        low, high = drop_interval(n, self.total, lost, won)
        return Judgement(drop, low, high, is_known(low, high, drop, self.error))


def looks(total: int, block: int) -> tuple[int, ...]:
    """After how many images to look: after each block at first, later after a tenth more than was seen.

    Args:
        total: the number of test images, at least 1.
        block: images that are looked at together, at least 1.

    Returns:
        Ascending multiples of `block`, the first of 32 or more, and `total` at the end.
    """
    assert min(total, block) >= 1, (total, block)
    found = []
    n = -(-_FIRST_LOOK // block) * block
    while n < total:
        found.append(n)
        n += max(1, n // (10 * block)) * block
    return (*found, total)


def is_known(low: ArrayLike, high: ArrayLike, drop: ArrayLike, error: float) -> Booleans:
    """Whether both ends of an interval lie within max(error, |drop| / 10) of the estimate.

    Args:
        low: lower ends, in percentage points, as the others.
        high: upper ends.
        drop: estimates.
        error: above 0.
    """
    low, high, drop = (np.asarray(value, dtype=np.float64) for value in (low, high, drop))
    tolerance = np.maximum(error, _SHARE_OF_DROP * np.abs(drop))
    return np.maximum(high - drop, drop - low) <= tolerance * (1 + _ROUNDING)


def drop_interval(
    n: int, total: int, lost: ArrayLike, won: ArrayLike, alpha: float = LOOK_ALPHA
) -> tuple[Floats, Floats]:
    """The interval of the drop on all test images, from the first `n` of them.

    Tango's score interval of a paired difference, for drawing without replacement: all d with

        |d - (lost - won) / n| - 1 / (2 total) <= z sqrt(v(d) / n * (total - n) / (total - 1))

    as far as the images not seen yet allow. v(d) is the variance of one image's difference when the drop is
    d, with the rate of wins that is then the likeliest; for that rate a quarter of an image is added to
    each of the four cells (right or wrong, dense or compressed), because a few flips say little about
    how many there are. The 1 / (2 total) is half the step in which the drop on all images moves. At n =
    total both ends are the drop.

    Args:
        n: images seen, 1 to `total`.
        total: the number of test images.
        lost: images of the n that only the dense model got right; any shape.
        won: images of the n that only the compressed model got right; the same shape.
        alpha: one minus the confidence, in (0, 1).

    Returns:
        Lower and upper ends in percentage points, shaped like `lost`.

    Source: Tango, "Equivalence test and confidence interval for the difference in proportions for the
        paired-sample design", Statistics in Medicine 17, 1998; Cochran, "Sampling Techniques", 3rd edition,
        1977, chapter 2 (finite population correction); the quarters and the half step are our own.
    """
    lost, won = np.asarray(lost, dtype=np.float64), np.asarray(won, dtype=np.float64)
    assert 1 <= n <= total, (n, total)
    assert np.all((lost >= 0) & (won >= 0) & (lost + won <= n)), n
    z = float(-ndtri(alpha / 2))
    low = -_upper_end(n, total, won, lost, z)
    return 100 * low, 100 * _upper_end(n, total, lost, won, z)


def _upper_end(n: int, total: int, lost: Floats, won: Floats, z: float) -> Floats:
    """By halving between the estimate and the largest drop that is still possible, as a fraction."""
    estimate = (lost - won) / n
    most = (lost - won + (total - n)) / total
    unseen = (total - n) / max(total - 1, 1) / n
    low, high = estimate, most
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        excluded = middle - estimate - 0.5 / total > z * np.sqrt(_variance(n, lost, won, middle) * unseen)
        low, high = np.where(excluded, low, middle), np.where(excluded, middle, high)
    return high


def _variance(n: int, lost: Floats, won: Floats, drop: Floats) -> Floats:
    """Of one image's difference (1 lost, -1 won, 0 neither), if `drop` is its mean.

    The rate q of wins maximises the likelihood: 2 m q^2 + b q - c = 0.
    """
    m, lost, won = n + 4 * _ADDED_IMAGES, lost + _ADDED_IMAGES, won + _ADDED_IMAGES
    b = (2 * m - lost + won) * drop - lost - won
    c = won * drop * (1 - drop)
    q = (np.sqrt(np.maximum(b * b + 8 * m * c, 0)) - b) / (4 * m)
    return np.maximum(2 * q + drop * (1 - drop), 0)
