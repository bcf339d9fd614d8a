"""One operation of a network's graph, and what the rules of many operations have in common.

Knows nothing about any operation in particular.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from distiller.channel_groups.ids import stretched
from distiller.channel_groups.network_ids import NetworkIds, State, Value


@dataclass(frozen=True, slots=True)
class Call:
    """One operation with the values that it reads.

    Attributes:
        net: the network's ids.
        name: of the aten operation, without overload or trailing underscore.
        where: the module in whose forward it stands, canonical.
        target: the operation.
        args: its arguments by name, with their defaults; tensors are values.
        shapes: of its results.
        operand_shapes: by name of argument: the shape of the tensor there.
        operands: the tensors that it reads, each with its shape.
        is_in_counting_norm: whether it stands in a norm that counts removed channels as zeros.
    """

    net: NetworkIds
    name: str
    where: str
    target: Any
    args: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    operand_shapes: dict[str, Any]
    operands: tuple[tuple[Value, tuple[int, ...]], ...]
    is_in_counting_norm: bool = False

    @property
    def told(self) -> str:
        """The operation in words."""
        return f"{self.name} in {self.where}" if self.where else self.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first result."""
        return self.shapes[0]

    @property
    def is_of_numbers(self) -> bool:
        """Whether it computes from constant whole numbers alone: indices, say, which have no channels."""
        return bool(self.operands) and all(
            isinstance(value, State) and not value.tensor.is_floating_point() for value, _ in self.operands
        )

    def compute(self) -> Any:
        """What it computes from constants."""
        return self.target(**pytree.tree_map(lambda v: v.tensor if isinstance(v, State) else v, self.args))

    def ids(self, name: str) -> Tensor | None:
        """The ids of an operand."""
        value = self.args[name]
        if isinstance(value, State):
            return self.net.of_elements(value)
        return value if isinstance(value, Tensor) else None

    def state(self, name: str) -> State | None:
        """A parameter or buffer that is read as it is."""
        value = self.args[name]
        return value if isinstance(value, State) else None


def opaque(call: Call, reason: str | None = None) -> Value:
    """Nothing that an operation reads or returns can be removed, since it is unknown or for a `reason`."""
    reason = reason or f"{call.told} does not say which of its channels belong to which"
    for value, _ in call.operands:
        for ids in pytree.tree_leaves(value):
            if isinstance(ids, Tensor):
                call.net.space.fix(ids, reason)
    results = tuple(fixed(call, shape, reason) for shape in call.shapes)
    return results[0] if len(results) == 1 else results


def with_computed_weight(call: Call) -> Value:
    """Nothing can be removed of a layer whose weight is no parameter."""
    remedy = "take the parametrization off first (torch.nn.utils.parametrize.remove_parametrizations)"
    return opaque(call, f"the weight of {call.told} is computed from other tensors; {remedy}")


def fixed(call: Call, shape: Sequence[int], reason: str) -> Tensor:
    """New ids, all the same, that cannot be removed."""
    ids = call.net.space.new(1)
    call.net.space.fix(ids, reason)
    return ids.reshape(()).expand(tuple(shape))


def elementwise(call: Call) -> Value:
    """What stands at the same place stands or falls together."""
    operands: list[Tensor] = []
    plain: list[tuple[int, ...]] = []
    for value, shape in call.operands:
        ids = call.net.of_elements(value) if isinstance(value, State) else value
        if isinstance(ids, Tensor):
            operands.append(ids)
        else:
            plain.append(shape)
    for ids in operands:
        for shape in plain:
            _fix_in_step(call, ids, shape)
    return united(call, operands)


def united(call: Call, operands: list[Tensor]) -> Tensor | None:
    """The ids of the result of an operation on elements that stand at the same place."""
    if not operands:
        return None
    shape, space = call.shape, call.net.space
    widest = max(operands, key=_count_strides)
    for ids in operands:
        if ids is widest:
            continue
        if _meets_all(ids, widest):  # a single channel that meets many is none of them: it stays
            space.fix(ids, f"{call.told} meets all channels of another operand with it")
        else:
            space.unite(ids.expand(shape), widest.expand(shape))
    result = widest.expand(shape)
    space.cut_as_slices(result)
    return result


def _count_strides(ids: Tensor) -> int:
    return sum(size > 1 and stride != 0 for size, stride in zip(ids.shape, ids.stride(), strict=True))


def _meets_all(ids: Tensor, other: Tensor) -> bool:
    shared = range(1, min(ids.dim(), other.dim()) + 1)
    return any(ids.shape[-dim] == 1 and other.shape[-dim] > 1 and other.stride(-dim) != 0 for dim in shared)


def _fix_in_step(call: Call, ids: Tensor, shape: tuple[int, ...]) -> None:
    """A tensor without channels that is as long as the ids differ: nothing can be cut out of it."""
    for dim in range(1, min(ids.dim(), len(shape)) + 1):
        if shape[-dim] > 1 and ids.shape[-dim] > 1 and ids.stride(-dim) != 0:
            call.net.space.keep_along(ids, [-dim], f"{call.told} is with a tensor of fixed size")


def over(call: Call, ids: Tensor | None, dims: Sequence[int], shape: Sequence[int]) -> Tensor | None:
    """The ids after an operation over dimensions along which nothing may be removed."""
    if ids is None:
        return None
    call.net.space.keep_along(ids, dims, f"{call.told} is over its channels")
    for dim in dims:
        ids = ids.narrow(dim, 0, 1)
    return ids.expand(tuple(shape))


def channel_vector(call: Call, ids: Tensor, dim: int) -> Tensor:
    """The ids along one dimension; nothing may be removed along the others."""
    others = [other for other in range(ids.dim()) if other != dim % ids.dim()]
    call.net.space.keep_along(ids, others, f"{call.told} mixes what lies along another dimension")
    for other in others:
        ids = ids.narrow(other, 0, 1)
    return ids.reshape(-1)


def lay(vector: Tensor, dim: int, shape: Sequence[int]) -> Tensor:
    """Ids: a vector along one dimension of a shape, the same along all others."""
    sizes = [1] * len(shape)
    sizes[dim] = len(vector)
    return vector.reshape(sizes).expand(tuple(shape))


def sliced(call: Call, ids: Tensor) -> Tensor:
    """Ids of a tensor that an operation returns."""
    ids = stretched(ids)
    call.net.space.cut_as_slices(ids)
    return ids


def volume(shape: Sequence[int]) -> int:
    """How many elements a tensor of this shape has."""
    return int(torch.Size(shape).numel())
