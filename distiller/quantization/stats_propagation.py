"""Statistics where they are needed: carried over folded batch norms, narrowed to what the next layer reads.

A layer that only a ReLU reads need not represent negative values; before a saturating function
values far out make no difference. Works on the graph and the statistics alone.
Knows nothing about quantized layers.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from distiller.graph import AdjacencyMap

Stats = dict[str, dict[str, Any]]

# What each operation can tell apart (D: tanh and sigmoid are flat beyond, to 8 bits).
_READ_RANGE = {"Relu": (0.0, math.inf), "Tanh": (-4.0, 4.0), "Sigmoid": (-6.0, 6.0)}
_RELU6_RANGE = (0.0, 6.0)


@dataclass(frozen=True, slots=True)
class Reader:
    """The only reader of a layer's output.

    Attributes:
        type: kind of operation, as in the graph.
        module_name: the leaf module that it is a call of, None when functional.
        is_dedicated: whether that module is called nowhere else.
    """

    type: str
    module_name: str | None
    is_dedicated: bool


def sole_readers(adjacency: AdjacencyMap, folded: Mapping[str, Sequence[str]]) -> dict[str, Reader]:
    """For each layer that is called once and read by one operation alone, that operation.

    Args:
        adjacency: the graph, as before folding.
        folded: layer -> the modules that were folded into it, in order.
    """
    calls = Counter(entry.module_name for entry in adjacency.values() if entry.module_name is not None)
    gone = {name for names in folded.values() for name in names}
    readers: dict[str, Reader] = {}
    for name, entry in adjacency.items():
        if entry.module_name != name or calls[name] > 1 or name in gone:
            continue
        last = adjacency.get(folded[name][-1], entry) if folded.get(name) else entry
        if last.is_output or len(last.successors) != 1:
            continue
        following = adjacency[last.successors[0].name]
        module_name = following.module_name
        readers[name] = Reader(
            following.op_meta.type, module_name, module_name is not None and calls[module_name] == 1
        )
    return readers


def fold_stats(stats: Mapping[str, Any], folded: Mapping[str, Sequence[str]]) -> Stats:
    """Statistics after folding: a layer's output is that of the last module folded into it.

    Args:
        stats: by layer: `inputs` {index: entry} and `output` entry.
        folded: layer -> the modules that were folded into it, in order; their own statistics go.
    """
    result: Stats = copy.deepcopy(dict(stats))
    for name, gone in folded.items():
        if name in result and gone and gone[-1] in result:
            result[name]["output"] = copy.deepcopy(result[gone[-1]]["output"])
        for each in gone:
            result.pop(each, None)
    return result


def propagate_stats(
    stats: Mapping[str, Any], readers: Mapping[str, Reader], modules: Mapping[str, nn.Module]
) -> Stats:
    """Narrow the output statistics of layers to what their only reader can tell apart.

    ReLU: from 0 on; ReLU6: [0, 6]; tanh: [-4, 4]; sigmoid: [-6, 6]. Concerns min, max, avg_min and
    avg_max; the input statistics of the reader's module follow where it is called nowhere else.

    Args:
        stats: by layer, as in `fold_stats`.
        readers: `sole_readers`, of the layers that are to be narrowed.
        modules: the model's layers by name.
    """
    result: Stats = copy.deepcopy(dict(stats))
    for name, reader in readers.items():
        limits = _READ_RANGE.get(reader.type)
        if isinstance(modules.get(reader.module_name or ""), nn.ReLU6):
            limits = _RELU6_RANGE
        if limits is None or name not in result:
            continue
        _narrow(result[name]["output"], *limits)
        inputs = result.get(reader.module_name or "", {}).get("inputs", {})
        if reader.is_dedicated and 0 in inputs:
            inputs[0] = copy.deepcopy(result[name]["output"])
    return result


def _narrow(entry: dict[str, Any], lo: float, hi: float) -> None:
    for key in ("min", "max", "avg_min", "avg_max"):
        if key in entry:
            entry[key] = min(max(entry[key], lo), hi)
