"""Files of activation statistics: read, and checked against a model.

Distiller's files are of the same form; `quant_stats` describes it and writes it.
Knows nothing about how statistics are collected or used.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from distiller.errors import ScheduleError, StatsError, require
from distiller.names import strip_wrappers
from distiller.schedule_yaml import parse_document

_REQUIRED = ("min", "max", "avg_min", "avg_max", "mean", "std")
_OPTIONAL = ("b", "total_numel")
_SHOWN = 3
_LARGEST = 1e36  # of what ranges in 32 bits can be computed from

Stats = dict[str, dict[str, Any]]


def load_stats(path_or_dict: str | Path | Mapping[str, Any]) -> Stats:
    """Statistics as `QuantCalibrationStatsCollector.save` or Distiller wrote them.

    Args:
        path_or_dict: a YAML file, or its content (which is copied). A file may lack `b`, as older
            ones of Distiller do, and `shape` and `total_numel`.

    Returns:
        `{layer: {"inputs": {index: record}, "output": record}}`, canonical layer names, in the
        order of the file; `inputs` is there even if empty.

    Raises:
        StatsError: naming the file, layer and key of the first thing that is wrong.
    """
    if isinstance(path_or_dict, Mapping):
        where, content = "activation statistics", path_or_dict
    else:
        require(path_or_dict, (str, os.PathLike), "activation statistics", "a YAML file or its content")
        where, content = str(path_or_dict), _read_yaml(Path(path_or_dict))
    if not content:
        raise StatsError(f"{where}: is empty; activation statistics wanted")
    if not isinstance(content, Mapping):
        raise StatsError(f"{where}: layers by name wanted, got {_shown(content)}")
    stats: Stats = {}
    for layer, entry in content.items():
        name = strip_wrappers(str(layer))
        if name in stats:
            raise StatsError(f"{where}: '{layer}': is there twice, with and without 'module.'; remove one")
        stats[name] = _layer(entry, f"{where}: {layer}")
    return stats


def check_stats(
    stats: Mapping[str, Any], model_module_names: Collection[str], source: str = "activation statistics"
) -> None:
    """See to it that statistics are of a model with these modules.

    Args:
        stats: from `load_stats`.
        model_module_names: canonical names of the model's modules.
        source: the file they are from, named in the error.

    Raises:
        StatsError: naming the first layers that the model does not have.
    """
    missing = [layer for layer in stats if layer not in model_module_names]
    if missing:
        first = ", ".join(f"'{layer}'" for layer in missing[:_SHOWN])
        more = ", ..." if len(missing) > _SHOWN else ""
        raise StatsError(
            f"{source}: {len(missing)} of {len(stats)} layers are not in the model ({first}{more}); "
            "the statistics are of another model, collect them from this one"
        )


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StatsError(f"{path}: cannot be read, {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise StatsError(f"{path}: is no text file; activation statistics in YAML wanted") from error
    except ValueError as error:  # a NUL in the name
        raise StatsError(f"{path}: cannot be read, {error}") from error
    try:
        return parse_document(text, str(path), "activation statistics wanted").data
    except ScheduleError as error:
        first = error.faults[0]
        place = f"{first.path}: " if first.path else ""
        raise StatsError(f"{path}:{first.line}: {place}{first.text}") from error


def _layer(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or "output" not in entry:
        raise StatsError(f"{where}: 'inputs' and 'output' wanted, got {_shown(entry)}")
    inputs = {} if entry.get("inputs") is None else entry["inputs"]
    if not isinstance(inputs, Mapping):
        raise StatsError(f"{where}.inputs: records by index wanted, got {_shown(inputs)}")
    for index in inputs:
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
            raise StatsError(f"{where}.inputs: an index (0, 1, ...) wanted, got {_shown(index)}")
    return {
        "inputs": {index: _stats(value, f"{where}.inputs[{index}]") for index, value in inputs.items()},
        "output": _stats(entry["output"], f"{where}.output"),
    }


def _stats(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise StatsError(f"{where}: {', '.join(_REQUIRED)} wanted, got {_shown(entry)}")
    record = dict(entry)
    for key in _REQUIRED:
        if key not in record:
            raise StatsError(f"{where}.{key}: is missing; collect the statistics again")
    for key in (*_REQUIRED, *_OPTIONAL):
        if key in record:
            record[key] = _number(record[key], f"{where}.{key}")
    if record["min"] > record["max"]:
        raise StatsError(f"{where}.min: larger than max, got {record['min']} and {record['max']}")
    for key in ("std", "b"):
        if record.get(key, 0) < 0:
            raise StatsError(f"{where}.{key}: is negative, got {record[key]}")
    return record


def _number(value: Any, where: str) -> int | float:
    if isinstance(value, str):  # YAML takes 1e-05 for text
        try:
            value = float(value)
        except ValueError:
            value = repr(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
        raise StatsError(f"{where}: a finite number wanted, got {value}")
    if abs(value) > _LARGEST:
        raise StatsError(f"{where}: a number of at most {_LARGEST:g} wanted, got {value:g}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
