"""The JSON files of nn-compress-haiku: accuracy and latency of each technique against the fraction.

    accuracy-prune.json   {"fraction": [0.0, 0.1, ...], "accuracy": [0.62, ...]}      top-1, 0 to 1
    latency-prune.json    {"fraction": [0.0, 0.1, ...], "latency": [0.43, ...]}       seconds

Here a latency is the median of a mini-batch's after a warm-up; there it was the mean of whole test sets, the
first of which contains compilation.
Knows nothing about models or figures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distiller.atomic_file import write_whole
from distiller.errors import SensitivityError
from distiller.layerwise.points import LayerwisePoint
from distiller.sensitivity.write_errors import reporting_failed_writes

__all__ = ["METRICS", "read_source_files", "write_source_files"]

METRICS = ("accuracy", "latency")
"""What there is a file of, for each technique."""


def write_source_files(points: Sequence[LayerwisePoint], folder: str | Path) -> list[Path]:
    """Write the files of all points on the fraction axis; a latency file only where all have one.

    Returns:
        The paths, in the order of the techniques.

    Raises:
        SensitivityError: a file cannot be written.
    """
    written = []
    for technique in dict.fromkeys(point.technique for point in points):
        own = [point for point in points if point.technique == technique and point.axis == "fraction"]
        columns = {
            "accuracy": [point.accuracy for point in own],
            "latency": [point.latency_s for point in own],
        }
        for metric, values in columns.items():
            if own and None not in values:
                path = Path(folder) / f"{metric}-{technique}.json"
                content = {"fraction": [point.value for point in own], metric: values}
                with reporting_failed_writes(path):
                    write_whole(path, json.dumps(content) + "\n")
                written.append(path)
    return written


def read_source_files(folder: str | Path) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """What is in a folder's files: {metric: {technique: (fractions, values)}}, techniques by their names.

    Raises:
        SensitivityError: there is no such file, or one is not of the form.
    """
    found: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for metric in METRICS:
        paths = sorted(Path(folder).glob(f"{metric}-*.json"))
        found[metric] = {path.stem.removeprefix(f"{metric}-"): _read(path, metric) for path in paths}
    if not any(found.values()):
        raise SensitivityError(
            f"{folder}: no files accuracy-TECHNIQUE.json or latency-TECHNIQUE.json there; give the folder of "
            "a layer-wise sweep"
        )
    return found


def _read(path: Path, metric: str) -> tuple[list[float], list[float]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SensitivityError(f"{path}: cannot be read, {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # no JSON, or no text, or nested without end
        raise SensitivityError(f"{path}: not JSON, {error}") from error
    columns = [_numbers(content, key) for key in ("fraction", metric)]
    if None in columns or len(columns[0] or ()) != len(columns[1] or ()) or not columns[0]:
        raise SensitivityError(
            f"{path}: must hold two lists of numbers, 'fraction' and '{metric}', equally long and not empty"
        )
    return columns[0] or [], columns[1] or []


def _numbers(content: Any, key: str) -> list[float] | None:
    values = content.get(key) if isinstance(content, Mapping) else None
    if not isinstance(values, list):
        return None
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        return None
    return [float(value) for value in values]
