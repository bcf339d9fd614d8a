"""What one pass needs of a tensor: exact sums, and a sample for what is known only after all data.

Knows nothing about streams or modules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distiller.data_loggers.tensor_sample import sample_of
from distiller.data_loggers.weighted_points import WeightedPoints, points_of

_PART = 1 << 18  # elements reduced at a time, so that intermediate results stay in the cache
_LEAST, _MOST = 1 << 12, 1 << 16  # how many elements are kept as a sample: most for a tensor
_SHARE = 64  # one in so many elements, up to _MOST, is looked at for the sum of |x - mean|
_NEWS = 0.25  # that moves the mean of the stream by this share of the mean absolute deviation
_FEW_POINTS, _POINTS = 1 << 8, 1 << 10  # that a sample is kept as: more for the largest sample
_DOUBT = 2e-3  # share of the mean absolute deviation that its standard error may be of
_SQUARABLE = (1e-12, 1e15)  # largest magnitudes whose squares add up in single precision
_FAR = 4.0  # standard deviations from zero to a mean,
_NARROW = 1e-3  # and mean absolute deviation beside such a mean, that single precision does justice to
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True, slots=True)
class Spread:
    """How the elements of a tensor lie around their mean.

    Attributes:
        mean: of all elements.
        squared: sum of (x - mean)^2.
        absolute: sum of |x - mean|.
        doubt: variance of `absolute`: 0 where it is of all elements, not of a sample.
        points: a sample of the elements.
        unsampled: `absolute`, less what it is of the points.
    """

    mean: float
    squared: float
    absolute: float
    doubt: float
    points: WeightedPoints
    unsampled: float


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """A tensor in a few numbers.

    Attributes:
        ranges: (3, samples), float64, on the host: minimum, maximum and sum of each sample.
        sums: min, max, sum of sample minima, of sample maxima, sum: as `observers.range_sums`.
        spread: None where an element is NaN or infinite.
    """

    ranges: np.ndarray
    sums: tuple[float, float, float, float, float]
    spread: Spread | None


class SoFar(NamedTuple):
    """A stream before a tensor: the mean, the sum of |x - mean of x's tensor|, and its variance."""

    mean: float
    absolute: float
    doubt: float


def summary_of(
    x: Tensor,
    before: SoFar | None = None,
    rectified: TensorSummary | None = None,
    scratch: Tensor | None = None,
) -> TensorSummary:
    """Reduce a tensor.

    Args:
        x: (samples, ...), floating point of any precision, at least one element; a scalar is one sample.
        before: the stream so far, if any: where `x` hardly moves its mean a small sample will do.
        rectified: of the tensor whose ReLU `x` is, which says what the extremes of its samples are.
        scratch: from `new_scratch`, for one call after the other; None: made.

    Returns:
        The summary. Sums are made in single precision over a sample, of squares over 2^18 elements, and in
        double precision over those; all in double precision where that would not do, and for tensors of it.
    """
    rows = _rows(x.detach())
    looked_at = 0 if before is None else min(rows.numel() // _SHARE, _MOST)
    shift = 0.0 if before is None else math.modf(abs(before.absolute) * _GOLDEN)[0]
    ranges, squares, sample = _ranges(rows, rectified, looked_at, shift)
    minimum, maximum = float(ranges[0].min()), float(ranges[1].max())
    low_sum, high_sum, total = ranges.sum(1).tolist()
    if not all(map(math.isfinite, (minimum, maximum, total))):
        return TensorSummary(ranges, (minimum, maximum, low_sum, high_sum, total), None)
    flat = rows.reshape(-1)
    wanted = _sample_size(len(flat), total, before)
    if sample is None or len(sample) < min(wanted, len(flat)):
        sample = working_precision(sample_of(flat, wanted, shift))
    sums = _Sums(minimum, maximum, total, squares)
    mean, squared, absolute, doubt = _deviations(flat, sums, sample, before, scratch)
    kept = sample[:: max(len(sample) // wanted, 1)].cpu().numpy()
    points = points_of(kept, len(flat) / len(kept), _POINTS if wanted == _MOST else _FEW_POINTS)
    spread = Spread(mean, squared, absolute, doubt, points, absolute - points.deviation_sum(mean))
    return TensorSummary(ranges, (minimum, maximum, low_sum, high_sum, mean * len(flat)), spread)


def sums_agree(x: Tensor, summary: TensorSummary) -> bool:
    """Whether the samples of a tensor still have, bit for bit, the sums that its summary found."""
    sums = [working_precision(block).sum(1) for block in _blocks(_rows(x.detach()))]
    return np.array_equal(summary.ranges[2], _on_host(sums))


def new_scratch(device: torch.device) -> Tensor:
    """Memory for `summary_of` to work in: to allocate it for each tensor can cost as much as the sums."""
    return torch.empty(_PART, device=device)


def _rows(x: Tensor) -> Tensor:
    """(samples, elements): the elements of each sample in the order of memory where that needs no copy."""
    if x.dim() < 2:
        return x.reshape(-1, 1)
    if not x.is_contiguous():
        x = x.permute(0, *sorted(range(1, x.dim()), key=x.stride, reverse=True))
    return x.reshape(x.shape[0], -1)


def _ranges(
    rows: Tensor, rectified: TensorSummary | None, looked_at: int, shift: float
) -> tuple[np.ndarray, float, Tensor | None]:
    """(3, samples), float64: minimum, maximum and sum of each sample; the sum of all squares; a sample.

    The sample is of about `looked_at` elements, None if that is 0. Batches of one size are not all looked
    at in the same places: `shift` moves them.
    """
    found, squares, looks = [], [], []
    # What was written last may still be cached, and what is read last the next layer begins with.
    for block in reversed(_blocks(rows)):  # (some samples, elements)
        values = working_precision(block)
        flat = values.reshape(-1)
        extremes = () if rectified else (values.amin(1), values.amax(1))
        found.append(torch.stack([*extremes, values.sum(1)]))
        squares += [_squared(part) for part in _cut(flat, _PART)]
        if looked_at:  # while it is in the cache
            looks.append(sample_of(flat, -(-looked_at * flat.numel() // rows.numel()), shift))
    ranges = _on_host(found[::-1])
    if rectified:
        ranges = np.concatenate([np.maximum(rectified.ranges[:2], 0.0), ranges])
    return ranges, math.fsum(map(float, squares)), torch.cat(looks[::-1]) if looks else None


def _squared(x: Tensor) -> Any:
    """The sum of squares, a scalar, on the device of `x`; numpy's is the faster one on the host."""
    if x.device.type != "cpu":
        return torch.dot(x, x)
    with np.errstate(over="ignore"):  # as torch, which says infinity and no more
        return np.dot(x.numpy(), x.numpy())


def _blocks(rows: Tensor) -> Sequence[Tensor]:
    """Some samples at a time; one sample, however large it is, stays whole."""
    return _cut(rows, max(1, _PART // rows.shape[1]))


def _on_host(parts: Sequence[Tensor]) -> np.ndarray:
    return (torch.cat(list(parts), -1) if len(parts) > 1 else parts[0]).double().cpu().numpy()


def working_precision(x: Tensor) -> Tensor:
    """The tensor in single precision, or in double where it is that."""
    return x if x.dtype == torch.float64 else x.float()


def _cut(x: Tensor, length: int) -> Sequence[Tensor]:
    return x.split(length) if len(x) > length else (x,)


def _sample_size(count: int, total: float, before: SoFar | None) -> int:
    """How many of a tensor's elements to keep: many where the stream is new, or the tensor moves its mean."""
    if before is None:
        return _MOST
    moved = abs(total - before.mean * count)
    return int(max(min(moved / (_NEWS * before.absolute or 1e-300), 1.0) * _MOST, _LEAST))


class _Sums(NamedTuple):
    minimum: float
    maximum: float
    total: float
    squares: float


def _deviations(
    flat: Tensor, sums: _Sums, sample: Tensor, before: SoFar | None, scratch: Tensor | None
) -> tuple[float, float, float, float]:
    """The mean m, the sums of (x - m)^2 and of |x - m|, and the variance of the latter.

    In single precision, where that will do, the first sum is that of x^2, less n m^2, and the second
    2 (sum of max(x, m)) - (sum of x) - n m: fewer looks at the memory than subtracting m takes. It is n / k
    times that over the sample, of size k, where the variance n^2 (std^2 - b^2) / k of that is little for the
    stream.
    """
    count, mean = len(flat), sums.total / len(flat)
    if sums.minimum == sums.maximum:
        return sums.minimum, 0.0, 0.0, 0.0
    if flat.dtype == torch.float64 or not _SQUARABLE[0] < max(-sums.minimum, sums.maximum) < _SQUARABLE[1]:
        return _exact_deviations(flat)
    squared = sums.squares - mean * sums.total
    if squared * _FAR**2 <= mean * sums.total:
        return _exact_deviations(flat)
    centre = float(np.float32(mean))  # as single precision has it
    if before is not None and len(sample) < count:
        absolute = (sample - centre).abs_().sum().item() * count / len(sample)
        doubt = max(count * squared - absolute**2, 0.0) / len(sample)
        if before.doubt + doubt <= (_DOUBT * (before.absolute + absolute)) ** 2:
            return mean, squared, absolute, doubt
    room = scratch
    if room is None or room.device != flat.device:
        room = torch.empty(min(_PART, count), device=flat.device)
    larger = 0.0
    for part in _cut(flat, _PART):
        larger += torch.clamp_min(part.float(), centre, out=room[: len(part)]).sum().item()
    absolute = 2 * larger - sums.total - count * centre
    if absolute <= _NARROW * abs(sums.total):
        return _exact_deviations(flat)
    return mean, squared, absolute, 0.0


def _exact_deviations(flat: Tensor) -> tuple[float, float, float, float]:
    """As `_deviations`, in double precision."""
    mean = sum(part.sum(dtype=torch.float64).item() for part in _cut(flat, _PART)) / len(flat)
    squared = absolute = 0.0
    for part in _cut(flat, _PART):
        deviations = part.double() - mean
        squared += torch.linalg.vector_norm(deviations).item() ** 2
        absolute += deviations.abs_().sum().item()
    return mean, squared, absolute, 0.0
