"""Batch norms folded into the convolutions before them, where the norms do not change.

    norm(conv(x, w) + b) = conv(x, w s) + (b - mean) s + beta,    s = gamma / sqrt(var + eps)

Equal but for rounding. Knows nothing about which parts are run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distiller.replay.layer_outputs import CONVOLUTIONS
from distiller.replay.memory_layout import is_channels_last, to_channels_last
from distiller.replay.program import Program, Step, Value

NORM = "_native_batch_norm_legit_no_training"


@dataclass(frozen=True, slots=True)
class Fold:
    """A convolution with the norm behind it.

    Attributes:
        steps: the indices of what it stands for: convolution, norm, and the norm's first result.
        sources: indices of the parameters and buffers that are in it.
        step: what is run instead; its result is the norm's.
        weight: the index of the convolution's.
        scale: (outputs, 1, ...), float64; what a weight is multiplied with.
    """

    steps: frozenset[int]
    sources: frozenset[int]
    step: Step
    weight: int
    scale: Tensor

    def scaled(self, weight: Tensor) -> Tensor:
        """A weight of the convolution as the fold's step takes it."""
        return _scaled(weight, self.scale)

    def with_open_weight(self) -> Step:
        """Its step, with the weight, which is to be `scaled`, as a value that it reads."""
        args = (self.step.args[0], Value(self.weight), *self.step.args[2:])
        return replace(self.step, args=args, reads=(*self.step.reads, self.weight))


def folded_norms(program: Program, state: Mapping[str, Tensor]) -> tuple[Fold, ...]:
    """Every convolution whose result a batch norm alone reads.

    Args:
        program: of the model.
        state: parameters and buffers by canonical name.
    """
    return tuple(_folds(program, state))


def _folds(program: Program, state: Mapping[str, Tensor]) -> Iterator[Fold]:
    by_index = {step.index: step for step in program.steps}
    for norm in program.steps:
        if norm.kind != NORM or not isinstance(norm.args[0], Value):
            continue
        convolution = by_index.get(norm.args[0].index)
        results = program.readers(norm.index)
        sources = [arg.index for arg in norm.args[1:5] if isinstance(arg, Value)]
        if (
            convolution is None
            or convolution.kind not in CONVOLUTIONS
            or len(program.readers(convolution.index)) != 1
            or len(results) != 1
            or results[0].args[1] != 0
            or any(index not in program.state for index in (*sources, *_weights(convolution)))
        ):
            continue
        scale, bias = _folded(program, state, convolution, norm)
        read, weight = convolution.args[:2]
        assert isinstance(read, Value)
        assert isinstance(weight, Value)
        folded = _scaled(state[program.state[weight.index]], scale)
        args = (read, folded, bias, *convolution.args[3:])
        yield Fold(
            steps=frozenset((convolution.index, norm.index, results[0].index)),
            sources=frozenset((*sources, *_weights(convolution))),
            step=replace(convolution, index=results[0].index, args=args, reads=(read.index,)),
            weight=weight.index,
            scale=scale,
        )


def _weights(convolution: Step) -> list[int]:
    return [arg.index for arg in convolution.args[1:3] if isinstance(arg, Value)]


def _folded(
    program: Program, state: Mapping[str, Tensor], convolution: Step, norm: Step
) -> tuple[Tensor, Tensor]:
    """The scale of the weight, in double precision, and the bias, in double precision until the end."""

    def tensor(arg: object, otherwise: float) -> Tensor:
        if isinstance(arg, Value):
            return state[program.state[arg.index]].double()
        return torch.tensor(otherwise, dtype=torch.float64)

    given = convolution.args[1]
    assert isinstance(given, Value)
    weight = state[program.state[given.index]]
    gamma, beta = tensor(norm.args[1], 1.0), tensor(norm.args[2], 0.0)
    mean, variance = tensor(norm.args[3], 0.0), tensor(norm.args[4], 1.0)
    scale = gamma.to(weight.device) / torch.sqrt(variance.to(weight.device) + norm.args[6])
    bias = tensor(convolution.args[2] if len(convolution.args) > 2 else None, 0.0).to(weight.device)
    shape = (-1, *[1] * (weight.dim() - 1))
    bias = (bias - mean.to(weight.device)) * scale + beta.to(weight.device)
    return scale.view(shape), bias.to(weight.dtype)


def _scaled(weight: Tensor, scale: Tensor) -> Tensor:
    scaled = (weight.double() * scale).to(weight.dtype)
    return to_channels_last(scaled) if is_channels_last(weight) else scaled.contiguous()
