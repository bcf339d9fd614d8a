"""What the mixture penalty of soft weight sharing costs, side by side with its plain expression.

Forward and backward of C for the 266,610 parameters of LeNet-300-100 and 16 components, with gradients of
all weights, means, log-precisions and mixing logits: by `mixture_penalty` (float32 weights and a float64
mixture, as SoftWeightSharing has them), and by the plain torch expression in float32. Gradients of both are
compared, and with those of the plain expression in float64. In two states of a training: at its beginning
(components of standard deviation 0.25) and later on (0.03, and zero at 0.01), in turn. Each call that counts
follows one of the same side, as in a training.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks.side_by_side import finish, medians, parse
from distiller.weight_sharing.mixture import mixture_penalty, plain_mixture_penalty

_WEIGHTS, _COMPONENTS = 266_610, 16
_TAU = 1e-6
_REPEATS = {True: 15, False: 101}
_BARS = {"milliseconds": 10.0, "gradients": 1e-5}
Expression = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_SIDES: tuple[tuple[str, Expression, torch.dtype], ...] = (
    ("mixture_penalty", mixture_penalty, torch.float64),
    ("plain", plain_mixture_penalty, torch.float32),
)


def begun() -> tuple[Tensor, ...]:
    """Weights, means, log-precisions and mixing logits as in the first step."""
    means = torch.cat((torch.zeros(1), torch.linspace(-1, 1, _COMPONENTS - 1)))
    weights = 0.31 * torch.randn(_WEIGHTS)
    weights[:5] = torch.tensor([-5.0, 5.0, -2.6, 1.8, 0.0])
    return weights, means, torch.full((_COMPONENTS,), 0.25).log() * -2, _logits()


def shared() -> tuple[Tensor, ...]:
    """The same when most weights have come to a component."""
    means = torch.cat((torch.zeros(1), torch.linspace(-0.9, 0.9, _COMPONENTS - 1)))
    stds = torch.full((_COMPONENTS,), 0.03)
    stds[0] = 0.01
    chosen = torch.where(torch.rand(_WEIGHTS) < 0.95, 0, torch.randint(1, _COMPONENTS, (_WEIGHTS,)))
    return means[chosen] + stds[chosen] * torch.randn(_WEIGHTS), means, stds.log() * -2, _logits()


def _logits() -> Tensor:
    return torch.tensor([0.99] + [0.01 / (_COMPONENTS - 1)] * (_COMPONENTS - 1)).log()


def step(
    expression: Expression,
    tensors: tuple[Tensor, ...],
    kind: torch.dtype = torch.float32,
    kind_of_mixture: torch.dtype = torch.float64,
) -> list[Tensor]:
    """A forward and backward pass; the gradients."""
    kinds = (kind, *[kind_of_mixture] * 3)
    leaves = [tensor.detach().to(kind).requires_grad_() for tensor, kind in zip(tensors, kinds, strict=True)]
    weights, means, log_precisions, logits = leaves
    (_TAU * expression(weights, means, log_precisions, logits.log_softmax(0))).backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def disagreement(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of two gradients, as a share of the largest element; the worst tensor's."""
    pairs = [(one.double(), other.double()) for one, other in zip(ours, theirs, strict=True)]
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


def main() -> None:
    args = parse(__doc__ or "")
    torch.manual_seed(0)
    figures: dict[str, float] = {}
    bars: dict[str, tuple[str, float]] = {}
    states = {"at the beginning": begun(), "later on": shared()}
    times = medians(
        {
            f"{name}, {side}": lambda tensors=tensors, expression=expression, kind=kind: step(
                expression, tensors, kind_of_mixture=kind
            )
            for name, tensors in states.items()
            for side, expression, kind in _SIDES
        },
        _REPEATS[args.quick],
        warm=True,
    )
    for name, tensors in states.items():
        ours = step(mixture_penalty, tensors)
        plain = step(plain_mixture_penalty, tensors, kind_of_mixture=torch.float32)
        exact = step(plain_mixture_penalty, tensors, torch.float64)
        found = {f"milliseconds, {side}": 1000 * times[f"{name}, {side}"] for side, _, _ in _SIDES}
        found["times faster"] = times[f"{name}, plain"] / times[f"{name}, mixture_penalty"]
        found["gradients against plain"] = disagreement(ours, plain)
        found["gradients against float64"] = disagreement(ours, exact)
        for key, value in found.items():
            print(f"{name}, {key}: {value:.3g}", flush=True)
        figures |= {f"{name}, {key}": value for key, value in found.items()}
        bars[f"{name}, milliseconds, mixture_penalty"] = ("at most", _BARS["milliseconds"])
        bars[f"{name}, gradients against plain"] = ("at most", _BARS["gradients"])
        bars[f"{name}, gradients against float64"] = ("at most", _BARS["gradients"])
    finish(figures, bars)


if __name__ == "__main__":
    main()
