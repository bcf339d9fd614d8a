"""What one operation of an exported program does: its MACs, its kernel, its groups.

Knows nothing about modules, nor about which operation feeds which.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from distiller.macs import is_counted, macs_of_call


def aten_macs(node: fx.Node) -> int:
    """The multiply-accumulate operations that `distiller.macs` counts in one operation.

    It is done once more, on stand-ins without values, and taken apart into the products it is made
    of: attention, LSTMs, `einsum` and `linear` need no formula of their own.
    """
    operation = node.target
    if not isinstance(operation, torch._ops.OpOverload) or operation._schema.is_mutable:
        return 0  # what changes a tensor in place is no product, and would change the stand-in
    if not is_counted(operation.overloadpacket) and not operation._can_decompose():
        return 0
    arguments = fx.map_arg((node.args, node.kwargs), lambda read: read.meta.get("val"))
    stand_ins = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, FakeTensor)]
    if len(stand_ins) < 2:  # a product has two factors
        return 0
    with stand_ins[0].fake_mode:
        # Within autocast a product may read float and bfloat16; the count is the same.
        args, kwargs = pytree.tree_map_only(Tensor, _as_float, arguments)
        return macs_of_call(lambda: operation(*args, **kwargs))


def kernel_shape(node: fx.Node) -> tuple[int, ...]:
    """The kernel of a convolution or pooling, as (3, 3); empty for every other operation."""
    if group_count(node) is not None:
        return tuple(_argument(node, "weight").meta["val"].shape[2:])
    return tuple(_argument(node, "kernel_size") or ())


def group_count(node: fx.Node) -> int | None:
    """The groups of a convolution; None for every other operation."""
    return None if _argument(node, "weight") is None else _argument(node, "groups")


def _argument(node: fx.Node, name: str) -> Any:
    """What an operation is called with for the argument `name`, its default included; None if it has none."""
    schema = getattr(node.target, "_schema", None)
    for position, argument in enumerate(schema.arguments if schema else ()):
        if argument.name == name:
            given = node.args[position] if position < len(node.args) else node.kwargs.get(name)
            return argument.default_value if given is None else given
    return None


def _as_float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor
