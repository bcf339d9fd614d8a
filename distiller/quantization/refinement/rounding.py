"""Which weights to round up and which down, learned from what a layer reads (AdaRound).

    W' = s (clamp(floor(W / s) + h(V) + z, qmin, qmax) - z)       h(V) = clamp(1.2 sigmoid(V) - 0.1, 0, 1)
    minimise over V   E |f(W' x' + b) - f(W x)|^2 + lambda sum (1 - |2 h(V) - 1|^beta)

f is the ReLU behind the layer, if it is part of it. The second term pulls h to 0 or 1, late and ever more
closely: beta goes from 20 to 2. The first one of each output channel is taken relative to that of rounding
to nearest, times the fan-in; so lambda means the same for layers of any size and range of outputs.
Knows nothing about models and layers: a layer is a matrix product here.

Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv 2004.10568,
section 3. The relative first term is ours.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from distiller.quantization.refinement.adaround_settings import AdaRoundSettings

ZETA, GAMMA = 1.1, -0.1
MOST_TRIED = 10
"""Weights of one output of which all roundings are tried."""
_TINY = 1e-38


@dataclass(frozen=True)
class RoundingProblem:
    """A layer's weight, and what it reads and is to put out.

    Attributes:
        weight: (groups, outputs, fan-in), in full precision.
        scale: of its grid, broadcasting with it: scalar or (groups, outputs, 1).
        zero_point: the same shape, integers.
        qmin: the smallest integer.
        qmax: the largest.
        inputs: x', (groups, samples, fan-in).
        targets: W x + b in full precision, (groups, samples, outputs).
        bias: (groups, 1, outputs).
        relu: whether f is the ReLU rather than the identity.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int
    inputs: Tensor
    targets: Tensor
    bias: Tensor
    relu: bool

    @cached_property
    def below(self) -> Tensor:
        """The weight in units of its scale, rounded down."""
        return torch.floor(self.weight * (1 / self.scale))

    @cached_property
    def is_free(self) -> Tensor:
        """Where a weight is not 0, and rounding it up rather than down makes a difference."""
        levels = self.below + self.zero_point
        return (self.weight != 0) & (levels >= self.qmin) & (levels < self.qmax)


def rounded(problem: RoundingProblem, up: Tensor) -> Tensor:
    """The weight on its grid, each value rounded up by `up`, 0 to 1."""
    p = problem
    levels = p.below + up + p.zero_point
    return (levels.clamp(p.qmin, p.qmax) - p.zero_point) * p.scale


def nearest(problem: RoundingProblem) -> Tensor:
    """1 where rounding to nearest (half to even) goes up, else 0."""
    return torch.round(problem.weight * (1 / problem.scale)) - problem.below


def losses(problem: RoundingProblem, weight: Tensor) -> Tensor:
    """E |f(W' x' + b) - f(W x)|^2 of each output, (groups, outputs), for a weight W'."""
    p = problem
    total = torch.zeros(weight.shape[:2], dtype=torch.float64, device=weight.device)
    columns, chunk = weight.transpose(1, 2), max(1, 2**22 // weight.shape[:2].numel())
    for start in range(0, p.inputs.shape[1], chunk):
        some = slice(start, start + chunk)
        outputs, targets = torch.baddbmm(p.bias, p.inputs[:, some], columns), p.targets[:, some]
        if p.relu:
            outputs, targets = torch.relu(outputs), torch.relu(targets)
        total += (outputs - targets).double().square().sum(1)
    return total / p.inputs.shape[1]


def learned_rounding(
    problem: RoundingProblem, settings: AdaRoundSettings, generator: torch.Generator
) -> Tensor:
    """Which weights to round up, by gradient descent (Adam).

    A weight of 0 stays 0.

    Args:
        problem: the layer.
        settings: of the descent.
        generator: on the CPU; draws the samples of each step.

    Returns:
        1 where to round up, else 0; in the shape of the weight.
    """
    p = problem
    up = (p.weight * (1 / p.scale) - p.below).clamp(0.01, 0.99)
    at_nearest = losses(p, rounded(p, nearest(p))) * settings.batch_size
    shares = torch.where(at_nearest > 0, p.weight.shape[2] / at_nearest.clamp(min=_TINY), 0)
    shares = shares.to(p.weight.dtype).unsqueeze(1)
    warm = int(settings.warm_start * settings.iterations)
    with torch.inference_mode(False), torch.no_grad():
        logits = nn.Parameter(-torch.log((ZETA - GAMMA) / (up - GAMMA) - 1))
        optimizer = torch.optim.Adam([logits], lr=settings.learning_rate)
        for step in range(settings.iterations):
            chosen = torch.randint(p.inputs.shape[1], (settings.batch_size,), generator=generator)
            chosen = chosen.to(p.inputs.device)
            strength = settings.regularization if step >= warm else 0.0
            progress = (step - warm) / max(1, settings.iterations - 1 - warm)
            exponent = _annealed(progress, *settings.beta)
            logits.grad = objective_slope(p, logits, chosen, shares, strength, exponent)
            optimizer.step()
        return ((logits >= 0) & p.is_free).to(p.weight.dtype)


def best_rounding(problem: RoundingProblem) -> Tensor:
    """Which weights to round up, for the least loss of each output: all 2^fan-in ways are tried.

    A weight of 0 stays 0.

    Args:
        problem: a layer with at most `MOST_TRIED` weights for each output.

    Returns:
        1 where to round up, else 0; in the shape of the weight.
    """
    p = problem
    fan_in = p.weight.shape[2]
    assert fan_in <= MOST_TRIED, "it would take for ever"
    is_free = p.is_free.to(p.weight.dtype)
    best = nearest(p) * is_free
    least = losses(p, rounded(p, best))
    for ways in itertools.product((0.0, 1.0), repeat=fan_in):
        up = p.weight.new_tensor(ways) * is_free
        loss = losses(p, rounded(p, up))
        best = torch.where((loss < least).unsqueeze(-1), up, best)
        least = torch.minimum(loss, least)
    return best


def objective_slope(
    problem: RoundingProblem, logits: Tensor, chosen: Tensor, shares: Tensor, strength: float, exponent: float
) -> Tensor:
    """The gradient of what is minimised with respect to V, written out: twice as fast as by autograd.

        sum over outputs o of shares_o sum over samples |f(W' x' + b)_o - f(W x)_o|^2
        + strength sum (1 - |2 h(V) - 1|^exponent)

    Args:
        problem: the layer.
        logits: V, in the shape of the weight.
        chosen: indices of samples.
        shares: (groups, 1, outputs).
        strength: lambda.
        exponent: beta.

    Returns:
        The gradient, in the shape of V; 0 where either way leads to the same weight, or a weight is 0.
    """
    p = problem
    sigmoid = torch.sigmoid(logits)
    stretched = (ZETA - GAMMA) * sigmoid + GAMMA
    up = stretched.clamp(0, 1) * p.is_free
    inputs, targets = p.inputs[:, chosen], p.targets[:, chosen]
    outputs = torch.baddbmm(p.bias, inputs, rounded(p, up).transpose(1, 2))
    if p.relu:
        errors = (torch.relu(outputs) - torch.relu(targets)) * (outputs > 0)
    else:
        errors = outputs - targets
    slope = torch.bmm((2 * errors * shares).transpose(1, 2), inputs) * p.scale
    if strength:
        side = 2 * up - 1
        slope -= 2 * strength * exponent * side.abs().pow_(exponent - 1).mul_(side.sign())
    is_moving = p.is_free & (stretched > 0) & (stretched < 1)
    return slope.mul_(is_moving).mul_(ZETA - GAMMA).mul_(sigmoid).mul_(1 - sigmoid)


def better_rows(problem: RoundingProblem, first: Tensor, second: Tensor) -> Tensor:
    """Row by row (output by output) of two weights the one of less loss; the first where they are equal."""
    is_better = losses(problem, second) < losses(problem, first)
    return torch.where(is_better.unsqueeze(-1), second, first)


def _annealed(progress: float, start: float, end: float) -> float:
    """From start to end as half a cosine, for a progress of 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
