"""Statistics of one stream of tensors, independent of how it is cut into batches.

In two passes: the first yields range and mean, the second, which needs the mean, std and b. A tensor
is reduced to a few numbers where it lies (`range_sums`, `deviation_sums`); streams add them
up in float64. Or in one pass, b within 1 % (`OnePassObserver`). Knows nothing about modules or files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distiller.data_loggers.tensor_summary import SoFar, TensorSummary, summary_of, working_precision
from distiller.data_loggers.weighted_points import WeightedPoints, merged

_PART = 1 << 18  # elements reduced at a time, so that intermediate results stay in the cache
_POINTS = 1 << 10  # that a stream's samples are merged into,
_KEPT = 1 << 14  # when they are more than so many


def range_sums(x: Tensor) -> Tensor:
    """What the first pass needs of a tensor: (min, max, sum of sample minima, of sample maxima, sum).

    Args:
        x: (samples, ...), floating point, at least one element; a scalar is one sample.

    Returns:
        (5,), float64, on the device of `x`.
    """
    x = x.detach()
    if x.dim() < 2:
        x = x.reshape(-1, 1)
    dims = tuple(range(1, x.dim()))
    low, high = x.amin(dims).double(), x.amax(dims).double()  # (samples,)
    total = working_precision(x).sum(dims).double().sum()
    return torch.stack([low.min(), high.max(), low.sum(), high.sum(), total])


def deviation_sums(x: Tensor, mean: float) -> Tensor:
    """What the second pass needs of a tensor: (sum of |x - mean|, sum of (x - mean)^2).

    Args:
        x: (samples, ...), floating point, at least one element.
        mean: the mean of the stream, from the first pass.

    Returns:
        (2,), float64, on the device of `x`.
    """
    sums = [torch.stack([d.abs().sum().double(), d.square().sum().double()]) for d in _deviations(x, mean)]
    return torch.stack(sums).sum(0)


@dataclass(slots=True)
class RangeObserver:
    """First pass over a stream: min, max, mean, and the means over samples of their minima and maxima.

    Attributes:
        numel: elements so far.
        samples: samples so far.
        shape: shape of the first tensor.
    """

    numel: int = 0
    samples: int = 0
    shape: tuple[int, ...] = ()
    minimum: float = math.inf
    maximum: float = -math.inf
    mean: float = 0.0
    _avg_min: float = 0.0
    _avg_max: float = 0.0

    def update(self, x: Tensor) -> None:
        """Take in one batch, shape (samples, ...)."""
        self.add(range_sums(x).tolist(), x.shape)

    def add(self, sums: Sequence[float], shape: Sequence[int]) -> None:
        """Take in the `range_sums` of one batch of the given shape."""
        low, high, low_sum, high_sum, total = sums
        numel, samples = math.prod(shape), shape[0] if shape else 1
        if not self.numel:
            self.shape = tuple(shape)
        self.numel += numel
        self.samples += samples
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self.mean = _merged(self.mean, total, numel, self.numel)
        self._avg_min = _merged(self._avg_min, low_sum, samples, self.samples)
        self._avg_max = _merged(self._avg_max, high_sum, samples, self.samples)

    @property
    def is_finite(self) -> bool:
        """Whether no value so far was NaN or infinite."""
        return not self.numel or all(map(math.isfinite, (self.mean, self.minimum, self.maximum)))

    def result(self) -> dict[str, float]:
        """min, max, avg_min, avg_max, mean.

        Where each sample is a single value, avg_min and avg_max are min and max: the mean
        over samples would be the mean of all values, a range of no width.
        """
        is_single = self.numel == self.samples
        return {
            "min": self.minimum,
            "max": self.maximum,
            "avg_min": self.minimum if is_single else self._avg_min,
            "avg_max": self.maximum if is_single else self._avg_max,
            "mean": self.mean,
        }


@dataclass(slots=True)
class DeviationObserver:
    """Second pass over a stream: std = sqrt(mean (x - mean)^2), b = mean |x - mean|.

    Attributes:
        mean: the mean of the stream, from the first pass.
        numel: elements so far.
    """

    mean: float
    numel: int = 0
    _variance: float = 0.0
    _b: float = 0.0

    def update(self, x: Tensor) -> None:
        """Take in one batch."""
        self.add(deviation_sums(x, self.mean).tolist(), x.shape)

    def add(self, sums: Sequence[float], shape: Sequence[int]) -> None:
        """Take in the `deviation_sums` of one batch of the given shape."""
        absolute, squared = sums
        numel = math.prod(shape)
        self.numel += numel
        self._b = _merged(self._b, absolute, numel, self.numel)
        self._variance = _merged(self._variance, squared, numel, self.numel)

    def result(self) -> dict[str, float]:
        """std (of the population) and b (the scale of a Laplace distribution)."""
        return {"std": math.sqrt(self._variance), "b": self._b}


@dataclass(slots=True)
class OnePassObserver:
    """One pass over a stream: what the two others find, all exact but b.

    b = mean |x - mean| needs the mean of all data, m. Of a tensor with mean c the sum S(c) = sum |x - c| is
    exact, or from a sample where its standard error is at most 0.2 % of the sum of all tensors so far.
    S(m) - S(c) is estimated from a sample of the elements, one at random from each of many stretches of equal
    length: 65536 (or all, if it has no more), down to 4096 for a tensor that moves the mean of the
    stream little. Heavy tails are in the sums: | |x - m| - |x - c| | is at most |m - c|. With 65536 of
    each the standard error is at most b / sqrt(2 * 65536), 0.3 %, whatever the data, for the means of parts
    of the data have at most b as their mean absolute deviation from m; in a stream whose tensors are alike
    it is far less.
    Samples are kept as few points (`weighted_points`): b is exact for a stream of up to 16384 elements in
    tensors of up to 256.

    Source: Chan et al. 1979, equation 2.1, for the variance.

    Attributes:
        ranges: min, max, mean, and the means over samples of their minima and maxima.
    """

    ranges: RangeObserver = field(default_factory=RangeObserver)
    _squared: float = 0.0  # sum of (x - m)^2
    _absolute: float = 0.0  # sum of |x - c|,
    _doubt: float = 0.0  # its variance,
    _unsampled: float = 0.0  # and less what it is of the samples
    _points: list[WeightedPoints] = field(default_factory=list)
    _kept: int = 0

    @property
    def numel(self) -> int:
        """Elements so far."""
        return self.ranges.numel

    @property
    def so_far(self) -> SoFar | None:
        """What `summary_of` the next batch wants to know."""
        return SoFar(self.ranges.mean, self._absolute, self._doubt) if self.numel else None

    def update(self, x: Tensor) -> None:
        """Take in one batch, shape (samples, ...)."""
        self.add(summary_of(x, self.so_far), x.shape)

    def add(self, summary: TensorSummary, shape: Sequence[int]) -> None:
        """Take in the `summary_of` one batch of the given shape."""
        before, mean, spread = self.numel, self.ranges.mean, summary.spread
        self.ranges.add(summary.sums, shape)
        if spread is None:  # from here on `ranges` is not finite, and neither is the result
            return
        apart = spread.mean - mean
        self._squared += spread.squared + apart * apart * before * (1 - before / self.numel)
        self._absolute += spread.absolute
        self._doubt += spread.doubt
        self._unsampled += spread.unsampled
        self._points.append(spread.points)
        self._kept += len(spread.points.values)
        if self._kept > _KEPT:
            self._points = [merged(tuple(self._points), _POINTS, self.ranges.mean)]
            self._kept = len(self._points[0].values)

    def result(self) -> dict[str, float]:
        """min, max, avg_min, avg_max, mean, std and b, as of `RangeObserver` and `DeviationObserver`."""
        found, numel = self.ranges.result(), max(self.numel, 1)
        sampled = sum(points.deviation_sum(found["mean"]) for points in self._points)
        std = math.sqrt(self._squared / numel)
        return {**found, "std": std, "b": min(max((sampled + self._unsampled) / numel, 0.0), std)}


def _merged(mean: float, batch_sum: float, batch_count: int, count: int) -> float:
    """Mean of `count` values, `batch_count` of them new (Chan et al. 1979, equation 2.1a)."""
    return mean + (batch_sum / batch_count - mean) * (batch_count / count)


def _deviations(x: Tensor, mean: float) -> Iterator[Tensor]:
    x = x.detach()
    if x.dim() == 0:
        x = x[None]
    rows = max(1, _PART * x.shape[0] // x.numel())
    for part in x.split(rows):
        yield working_precision(part) - mean
