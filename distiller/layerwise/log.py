"""The folder of a layer-wise sweep: every finished point on disk at once, and taken up again after a kill.

    layerwise.json   what is swept: techniques, fractions, bits, layers, fingerprint of the weights, images
    layerwise.csv    the points that are finished

Knows nothing about how a point is measured.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from distiller.atomic_file import remove_stale_parts, write_whole
from distiller.errors import SensitivityError
from distiller.layerwise.points import LayerwisePoint, csv_header, csv_line, parse_csv
from distiller.layerwise.sweep import SweepPlan
from distiller.sensitivity.point_file import (
    REMEDY,
    PointFile,
    decoded,
    read_settings,
    whole_lines,
    write_new_settings,
)
from distiller.sensitivity.write_errors import reporting_failed_writes

__all__ = ["CSV_NAME", "SETTINGS_NAME", "LayerwiseLog", "LayerwiseSettings", "read_points"]

CSV_NAME = "layerwise.csv"
SETTINGS_NAME = "layerwise.json"


@dataclass(frozen=True, slots=True)
class LayerwiseSettings:
    """What makes two sweeps the same sweep.

    Attributes:
        plan: techniques, fractions and bits.
        layers: names, in the order of the model.
        weights: the fingerprint of the dense model.
        test_images: a text that identifies them.
    """

    plan: SweepPlan
    layers: tuple[str, ...]
    weights: str
    test_images: str

    def to_plain(self) -> dict[str, Any]:
        """As in the file."""
        plain = asdict(self)
        return json.loads(json.dumps({**plain.pop("plan"), **plain}))


class LayerwiseLog:
    """The points of one sweep, on disk as soon as they are finished.

    Args:
        folder: made when it is missing.
        settings: of the sweep.

    Attributes:
        path: the CSV file.
        finished: the points by their key, those of an earlier run included.

    Raises:
        SensitivityError: the folder holds another sweep, a damaged one, or cannot be written.
    """

    def __init__(self, folder: str | Path, settings: LayerwiseSettings) -> None:
        self.settings = settings
        self.path = Path(folder) / CSV_NAME
        self.finished: dict[tuple[str, str, float], LayerwisePoint] = {}
        with reporting_failed_writes(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take_up_settings(self.path.with_name(SETTINGS_NAME))
            kept = self._take_up_points()
            remove_stale_parts(self.path.parent)  # of the run that goes on here
            self._file = PointFile(self.path, kept, csv_header())

    def append(self, point: LayerwisePoint) -> None:
        """Put one point on disk; it is safe when this returns."""
        self._file.append(csv_line(point))
        self.finished[point.key] = point

    def complete(self) -> list[LayerwisePoint]:
        """The points; the file is put into the order of the plan, however they came in."""
        points = [self.finished[key] for key in self.settings.plan.keys]
        self.close()
        with reporting_failed_writes(self.path):
            write_whole(self.path, "".join([csv_header(), *map(csv_line, points)]))
        return points

    def close(self) -> None:
        """Close the file; what was appended is there already."""
        self._file.close()

    def __enter__(self) -> LayerwiseLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take_up_settings(self, path: Path) -> None:
        if path.exists():
            _refuse_other_settings(self.settings.to_plain(), read_settings(path), path)
        else:
            write_new_settings(path, [self.path], self.settings.to_plain())

    def _take_up_points(self) -> int:
        """Fill `finished` from the file; returns the bytes to keep: all but a torn last line."""
        data = whole_lines(self.path)
        if not data:
            return 0
        planned = set(self.settings.plan.keys)
        for point in _parsed(data, self.path):
            if point.key not in planned:
                raise SensitivityError(
                    f"{self.path}: {point.technique} at {point.axis} {point.value:g} is no point of the "
                    f"sweep in {SETTINGS_NAME}; {REMEDY}"
                )
            self.finished[point.key] = point
        return len(data)


def read_points(folder: str | Path) -> list[LayerwisePoint]:
    """The points in the CSV of a folder; none where there is no such file.

    Raises:
        SensitivityError: the file cannot be read, or a line of it is wrong.
    """
    path = Path(folder) / CSV_NAME
    if not path.exists():
        return []
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SensitivityError(f"{path}: cannot be read, {error.strerror or error}") from error
    return _parsed(data, path)


def _parsed(data: bytes, path: Path) -> list[LayerwisePoint]:
    return parse_csv(decoded(data, path), str(path))


def _refuse_other_settings(asked: dict[str, Any], found: dict[str, Any], path: Path) -> None:
    differing = [key for key in (*asked, *found.keys() - asked.keys()) if found.get(key) != asked.get(key)]
    if differing:
        raise SensitivityError(
            f"{path}: the folder holds another sweep, it differs in {', '.join(differing)}; {REMEDY}"
        )
