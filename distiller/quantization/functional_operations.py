"""Functional operations of a model that is to be quantized: made modules, or told of.

Quantizers replace modules. What a forward computes by itself stays in floating point, unless
`to_modules` makes modules of it, which statistics can name.
Knows nothing about settings.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection

from torch import nn

from distiller.data_loggers.stats_file import check_stats
from distiller.functional_modules import DecomposedAttention
from distiller.functional_modules.rewritten_class import is_rewritten
from distiller.graph import SummaryGraph, leaf_modules
from distiller.names import named_modules, owner, unwrap

# What a functional operation of these kinds returns is on the grid of what it was given.
_ON_GRID = frozenset(
    (
        "Cast",
        "ChannelShuffle",
        "Expand",
        "Flatten",
        "Flip",
        "Gather",
        "MaxPool",
        "Pad",
        "PixelShuffle",
        "PixelUnshuffle",
        "Relu",
        "Reshape",
        "Roll",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    )
)
_JOINED = ("Concat", "Stack")  # the same, if all that is joined is on one grid
_SHOWN = 5


def is_converted(model: nn.Module) -> bool:
    """Whether `to_modules` has made something of the model."""
    return any(is_rewritten(part) or isinstance(part, DecomposedAttention) for part in model.modules())


def awaited_layers(model: nn.Module, stats: Collection[str] | None, source: str) -> list[str]:
    """The layers of statistics that the model has not: functional operations, it seems, of which modules
    are to be made.

    Args:
        model: the model.
        stats: names of layers; None where there are no statistics.
        source: the file they are from, for messages.

    Raises:
        StatsError: the model has none of the layers, or its operations are modules already.
    """
    names = {name for name, _ in named_modules(unwrap(model))}
    if stats is not None and (is_converted(model) or not names.intersection(stats)):
        check_stats(dict.fromkeys(stats), names, source)
    return [name for name in stats or () if name not in names]


def without_statistics(model: nn.Module, stats: Collection[str]) -> set[str]:
    """The modules that stand for functional operations and that are not among the layers of statistics."""
    modules = dict(named_modules(unwrap(model)))
    return {
        name
        for name, layer in leaf_modules(unwrap(model)).items()
        if name not in stats and is_rewritten(modules[owner(name)]) and not list(layer.parameters())
    }


def warn_of_operations_in_float(graph: SummaryGraph, in_float: Collection[str], model: nn.Module) -> None:
    """Warn of functional operations whose results are on no grid, and go to layers.

    Args:
        graph: of the model.
        in_float: modules that stand for such, without statistics.
        model: the model.
    """
    functional = {op.name for op in graph.ops.values() if op.is_functional or op.module_name in in_float}
    before_a_layer: set[str] = set()
    for op in reversed(graph.ops.values()):
        if op.name in before_a_layer or op.name not in functional:
            before_a_layer.update(op.predecessors)
    grids: dict[str, str] = {}  # the layer on whose grid the operation's result is
    names: list[str] = []
    for op in graph.ops.values():
        sources = {grids.get(name, name) for name in op.predecessors}
        if op.name not in functional:
            grids[op.name] = op.module_name
        elif op.type in _ON_GRID or (op.type in _JOINED and len(sources) == 1):
            grids[op.name] = sources.pop() if len(sources) == 1 else op.name
        elif op.name in before_a_layer:
            names.append(op.name)
    if not names:
        return
    shown = ", ".join(f"'{name}'" for name in names[:_SHOWN])
    shown += f", ... {len(names)} in all" if len(names) > _SHOWN else ""
    if in_float:
        remedy = "collect the statistics of the model as it is now, with modules for them"
    elif is_converted(model):
        remedy = "distiller.functional_modules.to_modules makes no modules of them"
    else:
        remedy = (
            "make modules of them with distiller.functional_modules.to_modules(model, dummy_input), and "
            "collect statistics then"
        )
    warnings.warn(f"operations stay in floating point ({shown}): {remedy}", stacklevel=4)
