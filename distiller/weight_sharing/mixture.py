"""The Gaussian mixture penalty of soft weight sharing, with gradients in one sweep over the weights.

    C = -sum_i log S_i,    S_i = sum_j p_ij,    p_ij = pi_j N(w_i; mu_j, 1 / lambda_j)

With responsibilities r_ij = p_ij / S_i and distances d_ij = w_i - mu_j

    dC/dw_i          = sum_j r_ij lambda_j d_ij
    dC/dmu_j         = -lambda_j sum_i r_ij d_ij
    dC/dlog pi_j     = -sum_i r_ij
    dC/dlog lambda_j = sum_i r_ij (lambda_j d_ij^2 - 1) / 2

All of it is summed over one block of weights at a time, which stays in a core's cache.
Source: Nowlan and Hinton, Simplifying Neural Networks by Soft Weight-Sharing (1992); Ullrich, Meeds, Welling,
Soft Weight-Sharing for Neural Network Compression, ICLR 2017 (arXiv 1702.04008), equation 5.
Knows nothing about models, priors or training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["LOG_2PI", "Mixture", "log_terms", "mixture_moments", "mixture_penalty", "plain_mixture_penalty"]

LOG_2PI = math.log(2 * math.pi)
_HALF = -math.log2(math.e) / 2
_ELEMENTS = 384_000
"""Pairs of a weight and a component in a block: its four buffers have six megabytes, and stay in a cache."""
_ELEMENTS_ELSEWHERE = 2**24
_LEAST_EXPONENT = -110.0
"""Of 2: what is smaller counts as this, since arithmetic on denormal numbers is tens of times slower."""
_LEAST_DENSITY = 2.0**-50
"""A weight of less density is far from all components, and is done again in double precision."""
_FAR_ROWS = 16_384
_THREADS = 2
"""Which sweep over blocks of their own, and meet once at the end; more would wait for the interpreter."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """A mixture of Gaussians as plain values; component 0 is the one that stays at zero.

    Attributes:
        means: (components,), float64, `means[0]` is 0.
        precisions: (components,), above 0; 1 / variance.
        mixing: (components,), above 0; they need not sum to 1.
    """

    means: Tensor
    precisions: Tensor
    mixing: Tensor

    @property
    def stds(self) -> Tensor:
        """Standard deviations, (components,)."""
        return self.precisions.rsqrt()

    def __len__(self) -> int:
        return self.means.numel()

    def equals(self, other: Mixture) -> bool:
        """Whether all components are the same, to the bit."""
        return (
            torch.equal(self.means, other.means)
            and torch.equal(self.precisions, other.precisions)
            and torch.equal(self.mixing, other.mixing)
        )


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over the weights.

    Attributes:
        penalty: -sum_i log S_i, float64 scalar.
        weight_gradient: dC/dw, in the shape and type of the weights.
        shares: (components,), float64; sum_i r_ij.
        pulls: (components,); lambda_j sum_i r_ij d_ij.
        excesses: (components,); sum_i r_ij (lambda_j d_ij^2 - 1).
    """

    penalty: Tensor
    weight_gradient: Tensor
    shares: Tensor
    pulls: Tensor
    excesses: Tensor


def mixture_penalty(
    weights: Tensor, means: Tensor, log_precisions: Tensor, log_mixing: Tensor
) -> Tensor:  # -> ()
    """C = -sum_i log sum_j pi_j N(w_i; mu_j, 1 / lambda_j), which can be differentiated once.

    Float32 weights are summed in float32 blocks, and these in float64; a weight that is far from all
    components is done in float64.

    Args:
        weights: any shape, floating point.
        means: (components,).
        log_precisions: (components,), log lambda.
        log_mixing: (components,), log pi; what they sum to is not looked at.

    Returns:
        A scalar of the type of `weights` (float32 for half precision).

    Source: Ullrich, Meeds, Welling, arXiv 1702.04008, equation 5.
    """
    penalty = _MixturePenalty.apply(weights, means, log_precisions, log_mixing)
    assert isinstance(penalty, Tensor)
    return penalty


def plain_mixture_penalty(
    weights: Tensor, means: Tensor, log_precisions: Tensor, log_mixing: Tensor
) -> Tensor:  # -> ()
    """The same by the plain expression and autograd: slow, and of some gigabytes of memory for large models.

    Arguments as of `mixture_penalty`.
    """
    return -log_terms(weights, means, log_precisions, log_mixing).logsumexp(-1).sum()


def log_terms(values: Tensor, means: Tensor, log_precisions: Tensor, log_mixing: Tensor) -> Tensor:
    """log pi_j N(w_i; mu_j, 1 / lambda_j); arguments as of `mixture_penalty`, result (..., components)."""
    distances = values.unsqueeze(-1) - means
    constants = log_mixing + (log_precisions - LOG_2PI) / 2
    return constants - log_precisions.exp() / 2 * distances.square()


@torch.no_grad()
def mixture_moments(weights: Tensor, means: Tensor, log_precisions: Tensor, log_mixing: Tensor) -> Moments:
    """Penalty, gradient of the weights and sums of the components; arguments as of `mixture_penalty`."""
    kind = torch.promote_types(weights.dtype, torch.float32)
    values = weights.detach().reshape(-1).to(kind)
    mixture = _Constants.of(means, log_precisions, log_mixing)
    with _on_one_thread(values.device) as threads:
        logs, gradient, sums = _sweep(values, mixture.to(kind), min(threads, _THREADS))
        penalty = -logs.sum(dtype=torch.float64)
        if bool(penalty.isinf()):
            far = logs.isinf().nonzero().flatten()
            _repair(far, values, mixture, logs, gradient, sums)
            penalty = -logs.sum(dtype=torch.float64)
    return Moments(penalty, gradient.view(weights.shape).to(weights.dtype), *sums.unbind(0))


class _MixturePenalty(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, means: Tensor, log_precisions: Tensor, log_mixing: Tensor
    ) -> Tensor:
        found = mixture_moments(weights, means, log_precisions, log_mixing)
        ctx.save_for_backward(
            found.weight_gradient,
            (-found.pulls).to(means),
            (found.excesses / 2).to(log_precisions),
            (-found.shares).to(log_mixing),
        )
        return found.penalty.to(torch.promote_types(weights.dtype, torch.float32))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with _on_one_thread(grads[0].device):
            return tuple(
                saved * grads[0].to(saved) if needed else None
                for saved, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
            )


@dataclass(frozen=True, slots=True)
class _Constants:
    """p_ij = 2 ** (offsets_j + _HALF precisions_j d_ij^2), all (components, 1)."""

    means: Tensor
    precisions: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, means: Tensor, log_precisions: Tensor, log_mixing: Tensor) -> _Constants:
        means, log_precisions, log_mixing = (
            x.detach().double().unsqueeze(1) for x in (means, log_precisions, log_mixing)
        )
        offsets = (log_mixing + (log_precisions - LOG_2PI) / 2) * math.log2(math.e)
        return cls(means, log_precisions.exp(), offsets)

    def to(self, kind: torch.dtype) -> _Constants:
        return _Constants(self.means.to(kind), self.precisions.to(kind), self.offsets.to(kind))


def _sweep(values: Tensor, mixture: _Constants, threads: int) -> tuple[Tensor, Tensor, Tensor]:
    """log S (n,), infinite for what is far from all components; dC/dw (n,); sums (3, components).

    What is far has a gradient of 0 and is not in the sums. Blocks are the same for any number of threads, and
    so are the results.
    """
    count = mixture.means.numel()
    elements = _ELEMENTS if values.device.type == "cpu" else _ELEMENTS_ELSEWHERE
    number = max(1, math.ceil(values.numel() * count / elements))
    size = max(1, math.ceil(values.numel() / number))
    logs, gradient = torch.empty_like(values), torch.empty_like(values)
    blocks = list(zip(values.split(size), logs.split(size), gradient.split(size), strict=True))
    sums = values.new_zeros(len(blocks), 3, count)
    threads = max(1, min(threads, len(blocks)))

    @torch.no_grad()
    def run(first: int) -> None:
        room = values.new_empty(4, count, size)
        for index in range(first, len(blocks), threads):
            _sweep_block(*blocks[index], mixture, room[..., : len(blocks[index][0])], sums[index])

    with ThreadPoolExecutor(threads) as pool:  # starts no thread that has nothing to do
        others = [pool.submit(run, first) for first in range(1, threads)]
        run(0)
        for other in others:
            other.result()
    totals = sums.sum(0, dtype=torch.float64)
    totals[2].neg_()
    return logs, gradient, totals


def _sweep_block(
    block: Tensor, log: Tensor, slope: Tensor, mixture: _Constants, room: Tensor, sums: Tensor
) -> None:
    """`_sweep` of one block (n,): fill `log`, `slope` and `sums` (3, components), whose last row is negative.

    `room` (4, components, n) is written over.
    """
    share, pull, lack, distances = room.unbind(0)
    torch.sub(block, mixture.means, out=distances)
    torch.mul(distances, mixture.precisions, out=pull)
    torch.addcmul(mixture.offsets, distances, pull, value=_HALF, out=share)
    torch.exp2(share.clamp_min_(_LEAST_EXPONENT), out=share)
    density = torch.threshold_(share.sum(0), _LEAST_DENSITY, math.inf)
    torch.log(density, out=log)
    share.mul_(density.reciprocal())
    torch.sum(pull.mul_(share), 0, out=slope)
    # What of it cancels, cancels before it is summed. `sum` adds in a cascade: a running total would round
    # equal elements the same way again and again.
    torch.addcmul(share, pull, distances, value=-1, out=lack)
    torch.sum(room[:3], 2, out=sums)


def _repair(
    far: Tensor, values: Tensor, mixture: _Constants, logs: Tensor, gradient: Tensor, sums: Tensor
) -> None:
    """Put right what the sweep left out: the weights at the indices `far`, in double precision."""
    means, precisions, offsets = (x[:, 0] for x in (mixture.means, mixture.precisions, mixture.offsets))
    for rows in far.split(_FAR_ROWS):
        distances = values[rows].double().unsqueeze(1) - means
        pulls = precisions * distances
        exponents = offsets * math.log(2) - pulls * distances / 2
        total = exponents.logsumexp(1)
        shares = (exponents - total.unsqueeze(1)).exp()
        logs[rows] = total.to(logs.dtype)
        gradient[rows] = (shares * pulls).sum(1).to(gradient.dtype)
        excesses = shares * (pulls * distances - 1)
        sums += torch.stack((shares.sum(0), (shares * pulls).sum(0), excesses.sum(0)))


@contextmanager
def _on_one_thread(device: torch.device) -> Iterator[int]:
    """One thread for each operation; gives how many there were before.

    Blocks that fit into a cache are too small to be shared: threads would wait for each other at each
    operation, and on a busy machine for many times what it takes.
    """
    before = torch.get_num_threads() if device.type == "cpu" else 1
    if before == 1:
        yield 1
        return
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)
