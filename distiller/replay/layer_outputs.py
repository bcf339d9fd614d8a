"""What one layer gives for several weights, cheaper than by running it for each.

    a weight differs from the dense one in        | what is run
    rows (filters) that are zero                  | nothing: the dense output, these channels at the bias
    columns (channels) that are zero              | each column once for all weights: sums of parts
    anything else                                 | the layer

Rows are exact, bit for bit, but where the layer has a norm folded into it. Sums of parts are equal but for
the order of summation.
Knows nothing about what the weights are for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distiller.replay.memory_layout import is_channels_last, to_channels_last
from distiller.replay.program import Step, Value

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
LAYERS = (*CONVOLUTIONS, "linear")
_GROUPS_AT = 6


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One run of a convolution or linear layer with the dense weight.

    Attributes:
        step: the layer.
        value: the values that it reads, by index.
        weight: the dense weight, (outputs, inputs, ...).
        clean: what it gave.
    """

    step: Step
    value: Callable[[int], Tensor]
    weight: Tensor
    clean: Tensor

    @property
    def x(self) -> Tensor:
        """Its input."""
        return self.value(self._index(0))

    @property
    def bias(self) -> Tensor | None:
        """(outputs,), or None."""
        bias = self.step.args[2] if len(self.step.args) > 2 else None
        return self.value(bias.index) if isinstance(bias, Value) else bias

    @property
    def channel_dim(self) -> int:
        """Of its input and its output."""
        return 1 if self.step.kind in CONVOLUTIONS else -1

    @property
    def is_grouped(self) -> bool:
        """Whether an output reads only some of the inputs."""
        args = self.step.args
        return self.step.kind in CONVOLUTIONS and len(args) > _GROUPS_AT and args[_GROUPS_AT] != 1

    def run(self, weight: Tensor, x: Tensor | None = None, *, with_bias: bool = True) -> Tensor:
        """Run it with another weight, and another input."""
        given = {self._index(1): weight} | ({} if x is None else {self._index(0): x})
        step = self.step
        args = list(step.args)
        if not with_bias and len(args) > 2:
            args[2] = None
        step = Step(
            step.index, step.target, tuple(args), step.kwargs, step.reads, step.kind, step.module, step.shape
        )
        return step.run(lambda index: given[index] if index in given else self.value(index))

    def _index(self, position: int) -> int:
        arg = self.step.args[position]
        assert isinstance(arg, Value)
        return arg.index


def layer_outputs(call: LayerCall, weights: Sequence[Tensor], *, in_parts: bool) -> Iterator[Tensor]:
    """What the layer gives for each weight, one by one.

    Args:
        call: its run with the dense weight.
        weights: of the same shape.
        in_parts: whether outputs may be sums of parts, where that is cheaper.
    """
    rows = [_zeroed(call.weight, weight, 0) for weight in weights]
    without_rows = _without_rows if bool(call.clean.isfinite().all()) else _without_rows_of_any_value
    columns = [_zeroed(call.weight, weight, 1) for weight in weights] if in_parts else []
    if in_parts and not call.is_grouped and len(weights) > 2 and _are_nested(columns):
        yield from _sums_of_parts(call, columns)  # type: ignore[arg-type]
        return
    for weight, zeroed in zip(weights, rows, strict=True):
        yield call.run(weight) if zeroed is None else without_rows(call, zeroed)


def _zeroed(dense: Tensor, weight: Tensor, dim: int) -> Tensor | None:
    """Which slices along `dim` are zero, (n,) of bool; None when another one is not dense."""
    first, dense_first = weight.select(dim, 0), dense.select(dim, 0)
    if not torch.equal(first, dense_first) and bool(first.any()):
        return None  # as with most that are not meant to have zero slices: soon told
    is_dense = (weight == dense).movedim(dim, 0).flatten(1).all(1)
    is_zero = (weight == 0).movedim(dim, 0).flatten(1).all(1)
    return is_zero if bool((is_dense | is_zero).all()) else None


def _without_rows(call: LayerCall, zeroed: Tensor) -> Tensor:
    """The clean output, which is finite, with the bias in these channels."""
    kept, bias = _for_an_image(call, ~zeroed), _for_an_image(call, call.bias)
    return torch.addcmul(bias * (1 - kept), call.clean, kept)


def _without_rows_of_any_value(call: LayerCall, zeroed: Tensor) -> Tensor:
    return torch.where(_for_an_image(call, zeroed).bool(), _for_an_image(call, call.bias), call.clean)


def _for_an_image(call: LayerCall, values: Tensor | None) -> Tensor:
    """(1, ...), of the output's type: a value for each channel (default 0), laid out as the output of one
    image is; torch is slow along one short dimension."""
    image = torch.zeros_like(call.clean[:1])
    shape = [1] * image.dim()
    shape[call.channel_dim] = -1
    return image if values is None else image.copy_(values.view(shape))


def _are_nested(columns: Sequence[Tensor | None]) -> bool:
    """Whether each set of zero columns holds the next smaller one."""
    known = [zeroed for zeroed in columns if zeroed is not None]
    if len(known) < len(columns):
        return False
    ordered = sorted(known, key=lambda zeroed: int(zeroed.sum()))
    return all(bool((~small | large).all()) for small, large in itertools.pairwise(ordered))


def _sums_of_parts(call: LayerCall, columns: Sequence[Tensor]) -> Iterator[Tensor]:
    order = sorted(range(len(columns)), key=lambda i: int(columns[i].sum()), reverse=True)
    outputs: dict[int, Tensor] = {}
    total: Tensor | None = None
    there = torch.zeros_like(columns[0])  # columns that are in the sum
    for i in order:
        part = ~columns[i] & ~there
        there = there | part
        chosen = part.nonzero().flatten()
        if total is None or len(chosen):
            added = _part(call, chosen, with_bias=total is None)
            total = added if total is None else total + added
            outputs[i] = total
        else:
            outputs[i] = total.clone()  # what reads an output may write over it
    yield from (outputs[i] for i in range(len(columns)))


def _part(call: LayerCall, chosen: Tensor, *, with_bias: bool) -> Tensor:
    """The layer on some of its input channels."""
    weight, x = call.weight, call.x
    if not len(chosen):  # a convolution of no channel: as with one whose weight is zero
        return call.run(
            torch.zeros_like(weight[:, :1]), x.narrow(call.channel_dim, 0, 1), with_bias=with_bias
        )
    part = x.index_select(call.channel_dim, chosen)
    columns = weight.index_select(1, chosen)
    if is_channels_last(x):
        part, columns = to_channels_last(part), to_channels_last(columns)
    return call.run(columns, part, with_bias=with_bias)
