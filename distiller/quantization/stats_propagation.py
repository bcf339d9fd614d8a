"""Statistics where they are needed: carried over folded batch norms, narrowed to what is read of them.

A layer that only ReLUs read need not represent negative values; before a saturating function
values far out make no difference. Operations that only select values, such as splitting, max
pooling and views, are looked through. Works on the graph and the statistics alone.
Knows nothing about quantized layers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from distiller.graph import AdjacencyMap, AdjacentsEntry

Stats = dict[str, dict[str, Any]]
Limits = tuple[float, float]

# What each operation can tell apart (D: tanh and sigmoid are flat beyond, to 8 bits).
_READ_RANGE: dict[str, Limits] = {"Relu": (0.0, math.inf), "Tanh": (-4.0, 4.0), "Sigmoid": (-6.0, 6.0)}
_SELECTING = frozenset(
    ("Expand", "Flatten", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
)


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


class ReadRange(NamedTuple):
    """What the readers of a layer's output can tell apart.

    Attributes:
        lo: values below are as good as this one to all of them.
        hi: values above are.
        direct: modules that read the output itself, and nothing but it.
        indirect: modules that read it behind operations that select values.
    """

    lo: float
    hi: float
    direct: tuple[str, ...]
    indirect: tuple[str, ...]


def sole_readers(adjacency: AdjacencyMap, folded: Mapping[str, Sequence[str]]) -> dict[str, Reader]:
    """For each layer that is read by calls of one module, or by one operation, alone: that reader.

    Args:
        adjacency: the graph, as before folding.
        folded: layer -> the modules that were folded into it, in order.
    """
    found: dict[str, Reader] = {}
    for name, results in _results(adjacency, folded).items():
        following = [adjacency[other.name] for last in results for other in last.successors]
        is_read_once = all(len(last.successors) == 1 and not last.is_output for last in results)
        modules = {entry.module_name for entry in following}
        if not is_read_once or len(modules) != 1 or (None in modules and len(following) > 1):
            continue
        module_name = following[0].module_name
        is_dedicated = module_name is not None and _reads_only(module_name, results, adjacency)
        found[name] = Reader(following[0].op_meta.type, module_name, is_dedicated)
    return found


def read_ranges(
    adjacency: AdjacencyMap, folded: Mapping[str, Sequence[str]], modules: Mapping[str, nn.Module]
) -> dict[str, ReadRange]:
    """For each layer all of whose readers leave a part of its range alone: what they can tell apart.

    ReLU: from 0 on; ReLU6: [0, 6]; tanh: [-4, 4]; sigmoid: [-6, 6]; of several readers the range
    that contains all of theirs.

    Args:
        adjacency: the graph, as before folding.
        folded: layer -> the modules that were folded into it, in order.
        modules: the model's layers by name.
    """
    found: dict[str, ReadRange] = {}
    for name, results in _results(adjacency, folded).items():
        ends = [end for last in results for end in _ends(last, adjacency)]
        limits = [_limits(end, modules) for end in ends]
        known = [each for each in limits if each is not None]
        if not known or len(known) < len(limits):
            continue
        nearest = _module_names(adjacency[other.name] for last in results for other in last.successors)
        found[name] = ReadRange(
            min(lo for lo, _ in known),
            max(hi for _, hi in known),
            tuple(other for other in nearest if _reads_only(other, results, adjacency)),
            tuple(other for other in _module_names(ends) if other not in nearest),
        )
    return found


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


def propagate_stats(stats: Mapping[str, Any], ranges: Mapping[str, ReadRange]) -> Stats:
    """Narrow the output statistics of layers to what their readers can tell apart.

    Concerns min, max, avg_min and avg_max. The input statistics of modules that read nothing else
    follow: they are those of the layer's output, or of parts of it, and then narrowed alike.

    Args:
        stats: by layer, as in `fold_stats`.
        ranges: `read_ranges`, of the layers that are to be narrowed.
    """
    result: Stats = copy.deepcopy(dict(stats))
    for name, read in ranges.items():
        if name not in result:
            continue
        _narrow(result[name]["output"], read.lo, read.hi)
        for reader in read.direct:
            inputs = result.get(reader, {}).get("inputs", {})
            if 0 in inputs:
                inputs[0] = copy.deepcopy(result[name]["output"])
        for reader in read.indirect:
            if 0 in (inputs := result.get(reader, {}).get("inputs", {})):
                _narrow(inputs[0], read.lo, read.hi)
    return result


def _results(adjacency: AdjacencyMap, folded: Mapping[str, Sequence[str]]) -> dict[str, list[AdjacentsEntry]]:
    """The operations whose results are a layer's, one for each call; of folded layers the last one."""
    gone = {name for names in folded.values() for name in names}
    found: dict[str, list[AdjacentsEntry]] = {}
    for entry in adjacency.values():
        name = entry.module_name
        if name is not None and name not in gone:
            last = adjacency.get(folded[name][-1], entry) if folded.get(name) else entry
            found.setdefault(name, []).append(last)
    return found


def _ends(entry: AdjacentsEntry, adjacency: AdjacencyMap) -> Iterator[AdjacentsEntry | None]:
    """What reads a result, seen through operations that select values; None where the model returns it."""
    if entry.is_output:
        yield None
    for other in entry.successors:
        following = adjacency[other.name]
        if following.op_meta.type in _SELECTING:
            yield from _ends(following, adjacency)
        else:
            yield following


def _limits(end: AdjacentsEntry | None, modules: Mapping[str, nn.Module]) -> Limits | None:
    """What an operation can tell apart; None: everything."""
    module = None if end is None else modules.get(end.module_name or "")
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one
        return module.min_val, module.max_val
    return None if end is None else _READ_RANGE.get(end.op_meta.type)


def _reads_only(module_name: str, results: Sequence[AdjacentsEntry], adjacency: AdjacencyMap) -> bool:
    """Whether all that a module ever reads are these results."""
    names = {last.op_meta.name for last in results}
    return all(
        [before.name in names for before in entry.predecessors] == [True]
        for entry in adjacency.values()
        if entry.module_name == module_name
    )


def _module_names(entries: Iterable[AdjacentsEntry | None]) -> dict[str, None]:
    """The modules called, each once, in order."""
    return {
        entry.module_name: None for entry in entries if entry is not None and entry.module_name is not None
    }


def _narrow(entry: dict[str, Any], lo: float, hi: float) -> None:
    for key in ("min", "max", "avg_min", "avg_max"):
        if key in entry:
            entry[key] = min(max(entry[key], lo), hi)
