"""The folder of a sweep: every finished point on disk at once, and taken up again after a kill.

    sensitivity.json   what is swept: axis, levels, parameters, fingerprint of the weights, number of images
    sensitivity.csv    the points that are finished

Knows nothing about how a point is measured.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from distiller.atomic_file import remove_stale_parts
from distiller.errors import SensitivityError
from distiller.names import canonical_state_dict
from distiller.sensitivity.curves import Curves, Score, SensitivityPoint
from distiller.sensitivity.point_file import (
    REMEDY,
    PointFile,
    decoded,
    read_settings,
    whole_lines,
    write_new_settings,
)
from distiller.sensitivity.report import csv_header, csv_line, parse_csv, sensitivities_to_csv
from distiller.sensitivity.write_errors import reporting_failed_writes

CSV_NAME = "sensitivity.csv"
SETTINGS_NAME = "sensitivity.json"


@dataclass(frozen=True, slots=True)
class SweepSettings:
    """What makes two sweeps the same sweep.

    Attributes:
        axis: the name of the axis.
        levels: the levels, ascending or not, in the order of the file.
        parameters: the canonical names of the parameters, in the order of the file.
        weights: the `weights_fingerprint` of the dense model.
        test_images: the images that every point is measured on: how many, or a text that identifies them.
    """

    axis: str
    levels: tuple[float, ...]
    parameters: tuple[str, ...]
    weights: str
    test_images: int | str


class SensitivityLog:
    """The points of one sweep, on disk as soon as they are finished.

        with SensitivityLog(folder, settings) as log:
            for point in sensitivity_points(..., finished=log.finished):
                log.append(point)
            curves = log.complete()

    Attributes:
        path: the CSV file.
        finished: scores by (parameter, level), those of an earlier run included.

    Raises:
        SensitivityError: the folder holds another sweep, a damaged one, or cannot be written.
    """

    def __init__(self, folder: str | Path, settings: SweepSettings) -> None:
        self.settings = settings
        self.path = Path(folder) / CSV_NAME
        self.finished: dict[tuple[str, float], Score] = {}
        with reporting_failed_writes(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take_up_settings(self.path.with_name(SETTINGS_NAME))
            kept = self._take_up_points()
            remove_stale_parts(self.path.parent)  # of the run that goes on here
            self._file = PointFile(self.path, kept, csv_header())

    def append(self, point: SensitivityPoint) -> None:
        """Put one point on disk; it is safe when this returns."""
        self._file.append(csv_line(point))
        self.finished[point.parameter, point.level] = point.score

    def complete(self) -> Curves:
        """The curves; the file is put into the order of the settings, however the points came in."""
        curves: Curves = OrderedDict(
            (name, OrderedDict((level, self.finished[name, level]) for level in self.settings.levels))
            for name in self.settings.parameters
        )
        self.close()
        sensitivities_to_csv(curves, self.path)
        return curves

    def close(self) -> None:
        """Close the file; what was appended is there already."""
        self._file.close()

    def __enter__(self) -> SensitivityLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take_up_settings(self, path: Path) -> None:
        if path.exists():
            _refuse_other_settings(self.settings, read_settings(path), path)
        else:
            write_new_settings(path, self.path, asdict(self.settings))

    def _take_up_points(self) -> int:
        """Fill `finished` from the file; returns the bytes to keep: all but a torn last line."""
        data = whole_lines(self.path)
        if not data:
            return 0
        curves = parse_csv(decoded(data, self.path), str(self.path))
        for name, points in curves.items():
            for level, score in points.items():
                if name not in self.settings.parameters or level not in self.settings.levels:
                    raise SensitivityError(
                        f"{self.path}: '{name}' at {level!r} is no point of the sweep in {SETTINGS_NAME}; "
                        f"{REMEDY}"
                    )
                self.finished[name, level] = score
        return len(data)


def weights_fingerprint(model: nn.Module) -> str:
    """A SHA-256 of the parameters and buffers: their canonical names, types, shapes and bits."""
    digest = hashlib.sha256()
    for name, value in sorted(canonical_state_dict(model).items()):
        if isinstance(value, Tensor):  # a module's own extra state may be anything
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _refuse_other_settings(asked: SweepSettings, found: Mapping[str, Any], path: Path) -> None:
    wanted = json.loads(json.dumps(asdict(asked)))
    differing = [key for key in (*wanted, *found.keys() - wanted.keys()) if found.get(key) != wanted.get(key)]
    if differing:
        faults = "; ".join(f"{key}: {_difference(found.get(key), wanted.get(key))}" for key in differing)
        raise SensitivityError(f"{path}: the folder holds another sweep, {faults}; {REMEDY}")


def _difference(found: Any, asked: Any) -> str:
    if isinstance(found, list) and isinstance(asked, list):
        only_found = [item for item in found if item not in asked]
        only_asked = [item for item in asked if item not in found]
        if not only_found and not only_asked:
            return "in another order"
        parts = ((only_found, "only there"), (only_asked, "only asked for now"))
        return " and ".join(f"{_some(items)} {where}" for items, where in parts if items)
    return f"{_short(found)} there, {_short(asked)} asked for now"


def _some(items: list[Any]) -> str:
    shown = ", ".join(str(item) for item in items[:3])
    return shown if len(items) <= 3 else f"{shown} and {len(items) - 3} more"


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
