"""Operations that make a last bit more or less of what they read into something else altogether.

Rounding, signs, comparisons and choices: behind them a network whose sums are taken in another order is
another network.
Knows nothing about who runs the operations.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from distiller.graph_trace import CREATED, aten_name

__all__ = ["discontinuous_operations"]

_JUMPING = {
    "angle", "atan2", "ceil", "copysign", "fix", "floor", "floor_divide", "fmod", "frac", "frexp",
    "hardshrink", "heaviside", "histc", "mode", "remainder", "round", "sgn", "sign", "threshold", "trunc",
}  # fmt: skip
"""Of floating-point numbers to floating-point numbers, by their names."""
_GRID_SAMPLERS = ("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
_NEAREST = 1
_COARSE = 2
"""Bytes of the floating-point types whose last bit is more than one that sums in another order change."""


def discontinuous_operations(nodes: Iterable[fx.Node], sources: Collection[fx.Node]) -> tuple[str, ...]:
    """The names of those that read what depends on `sources`, each once, in alphabetical order.

    An operation nobody knows, of a library other than torch's own, counts as one of them.

    Args:
        nodes: of an exported program, in the order of execution.
        sources: some of its inputs.
    """
    depending = set(sources)
    found = set()
    for node in nodes:
        is_size = isinstance(node.meta.get("val"), torch.SymInt)
        if is_size or aten_name(node) in CREATED or depending.isdisjoint(node.all_input_nodes):
            continue
        depending.add(node)
        if node.op == "call_function" and node.target is not operator.getitem and _is_discontinuous(node):
            found.add(aten_name(node))
    return tuple(sorted(found))


def _is_discontinuous(node: fx.Node) -> bool:
    name = aten_name(node)
    if getattr(node.target, "namespace", "") != "aten":
        return True
    read = [value.dtype for value in _tensors(node.all_input_nodes) if _is_continuous(value)]
    if not read:
        return False  # what it reads has jumped before, or never changes by a little
    given = list(_tensors(_read_results(node)))
    return (
        name in _JUMPING
        or "quantize" in name
        or node.kwargs.get("rounding_mode") is not None
        or bool(name in _GRID_SAMPLERS and node.args[2] == _NEAREST)
        or not all(_is_continuous(value) for value in given)
        or any(value.dtype.itemsize <= _COARSE < max(dtype.itemsize for dtype in read) for value in given)
    )


def _is_continuous(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _read_results(node: fx.Node) -> list[fx.Node]:
    """The operation itself; those of its results that somebody reads, where it has several."""
    return [node] if isinstance(node.meta.get("val"), Tensor) else list(node.users)


def _tensors(nodes: Iterable[fx.Node]) -> Iterator[Tensor]:
    for node in nodes:
        yield from (leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor))
