"""The folder of a sweep: what is finished is on disk at once, and taken up again after a kill.

    sensitivity.json    what is swept, and how
    sensitivity.blocks  a line for each block of images that all points were run on
    sensitivity.csv     the points that are finished

Knows nothing about how a block is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from distiller.atomic_file import remove_stale_parts, write_whole
from distiller.errors import SensitivityError
from distiller.sensitivity.block_engine import BlockScores, EngineSettings
from distiller.sensitivity.block_line import HEADER, block_of_line, line_of_block
from distiller.sensitivity.curves import SensitivityPoint
from distiller.sensitivity.folder_lock import FolderLock
from distiller.sensitivity.point_file import (
    REMEDY,
    PointFile,
    decoded,
    read_settings,
    whole_lines,
    write_new_settings,
)
from distiller.sensitivity.report import points_from_csv, points_to_csv
from distiller.sensitivity.write_errors import reporting_failed_writes

CSV_NAME = "sensitivity.csv"
SETTINGS_NAME = "sensitivity.json"
BLOCKS_NAME = "sensitivity.blocks"
_VERSION = 3


@dataclass(frozen=True, slots=True)
class SweptAxis:
    """What is swept along one axis.

    Attributes:
        axis: its name.
        levels: the levels, the dense one first.
        parameters: what there is a curve of, in the order of the file.
    """

    axis: str
    levels: tuple[float, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SweepSettings:
    """What makes two sweeps the same sweep.

    Attributes:
        axes: what is swept.
        weights: the `weights_fingerprint` of the dense model.
        test_images: a text that identifies the images and their order.
        batch_size: images of a block.
        error: points that a drop is to be known to; None: all images are looked at.
        fast: whether arithmetic was allowed that may change rare decisions.
        context: settings of axes besides their levels.
        version: of the files.
    """

    axes: tuple[SweptAxis, ...]
    weights: str
    test_images: str
    batch_size: int
    error: float | None = None
    fast: bool = False
    context: Mapping[str, Any] | None = None
    version: int = _VERSION


class SweepFolder:
    """The files of one sweep.

    Attributes:
        path: the CSV file.
        blocks: what earlier runs left, by index.
        engine: how they ran blocks; None: not chosen yet.
        jobs: by how many processes the first of them did; None: likewise.

    Raises:
        SensitivityError: the folder holds another sweep, a damaged one, one that is running, or cannot be
            written.
    """

    def __init__(self, folder: str | Path, settings: SweepSettings) -> None:
        self.path = Path(folder) / CSV_NAME
        self.blocks: dict[int, BlockScores] = {}
        self.engine: EngineSettings | None = None
        self.jobs: int | None = None
        self._file: PointFile | None = None
        self._settings = json.loads(json.dumps(asdict(settings)))
        with reporting_failed_writes(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FolderLock(self.path.parent)
        try:
            with reporting_failed_writes(self.path):
                self._take_up_settings()
                self._kept = self._take_up_blocks()
                remove_stale_parts(self.path.parent)  # of the run that goes on here
        except BaseException:
            self._lock.release()
            raise

    def finished(self) -> list[SensitivityPoint] | None:
        """The points of a sweep that is over, None of one that is not, or that lost some of them.

        Raises:
            SensitivityError: the file is damaged.
        """
        if not self.path.exists() or self._blocks_path.exists():
            return None
        try:
            points = points_from_csv(self.path)
        except SensitivityError as error:
            raise SensitivityError(f"{error}; {REMEDY}") from error
        expected = _places(self._settings["axes"])
        return points if {(p.axis, p.parameter, p.level) for p in points} == set(expected) else None

    def choose(self, engine: EngineSettings, jobs: int) -> None:
        """Keep how blocks are run, and by how many processes, for runs that go on here."""
        self.engine, self.jobs = engine, jobs
        plain = asdict(engine)
        plain["whole"] = {str(place): reason for place, reason in engine.whole.items()}
        with reporting_failed_writes(self._settings_path):
            settings = {**self._settings, "engine": plain, "jobs": jobs}
            write_whole(self._settings_path, json.dumps(settings, indent=2) + "\n")

    def append(self, index: int, scores: BlockScores) -> None:
        """Put one block on disk; it is safe when this returns."""
        if self._file is None:
            with reporting_failed_writes(self._blocks_path):
                self._file = PointFile(self._blocks_path, self._kept, HEADER)
        self._file.append(line_of_block(index, scores))

    def write(self, points: Iterable[SensitivityPoint]) -> None:
        """Put the finished points on disk, all of them anew."""
        points_to_csv(points, self.path)

    def complete(self, points: Sequence[SensitivityPoint]) -> None:
        """Put all points on disk, and remove what only a sweep that is not over needs."""
        self.write(points)
        self._close_blocks()
        with reporting_failed_writes(self._blocks_path):
            self._blocks_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let other processes have the folder; what was appended is there already."""
        try:
            self._close_blocks()
        finally:
            self._lock.release()

    def _close_blocks(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> SweepFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _settings_path(self) -> Path:
        return self.path.with_name(SETTINGS_NAME)

    @property
    def _blocks_path(self) -> Path:
        return self.path.with_name(BLOCKS_NAME)

    def _take_up_settings(self) -> None:
        if not self._settings_path.exists():
            write_new_settings(self._settings_path, (self.path, self._blocks_path), self._settings)
            return
        found = read_settings(self._settings_path)
        engine, jobs = found.pop("engine", None), found.pop("jobs", None)
        _refuse_other_settings(self._settings, found, self._settings_path)
        if engine is not None:
            try:
                self.engine = _engine(engine, self._settings)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise SensitivityError(
                    f"{self._settings_path}: engine: not the settings of one, {error}; {REMEDY}"
                ) from error
        if jobs is not None and (type(jobs) is not int or jobs < 1):
            raise SensitivityError(
                f"{self._settings_path}: jobs: must be a number of processes, got {_short(jobs)}; {REMEDY}"
            )
        self.jobs = jobs

    def _take_up_blocks(self) -> int:
        """Fill `blocks` from the file; returns the bytes to keep: all but a torn last line."""
        data = whole_lines(self._blocks_path)
        for number, line in enumerate(decoded(data, self._blocks_path).split("\n")[1:-1], start=2):
            try:
                index, scores = block_of_line(line)
                if index in self.blocks:
                    raise ValueError(f"block {index} is there twice")
            except ValueError as error:
                raise SensitivityError(
                    f"{self._blocks_path}, line {number}: not a block of a sweep, {error}; {REMEDY}"
                ) from error
            self.blocks[index] = scores
        return len(data)


def missing_points(settings: Mapping[str, Any], points: Iterable[SensitivityPoint]) -> list[str]:
    """What a sweep of these settings has and its points have not, each in words.

    Raises:
        KeyError, TypeError: no sweep has such settings.
    """
    there = {(point.axis, point.parameter, point.level) for point in points}
    return [
        f"{parameter} at {level:g} along {axis}"
        for axis, parameter, level in _places(settings["axes"])
        if (axis, parameter, level) not in there
    ]


def _places(axes: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, float]]:
    return [
        (axis["axis"], parameter, level)
        for axis in axes
        for parameter in axis["parameters"]
        for level in axis["levels"]
    ]


def _engine(found: Any, settings: Mapping[str, Any]) -> EngineSettings:
    """How blocks were run.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: no sweep of these settings ran them so.
    """
    whole = {int(place): str(reason) for place, reason in found["whole"].items()}
    engine = EngineSettings(found["chunk"], found["channels_last"], found["bfloat16"], whole)
    if type(engine.chunk) is not int or engine.chunk < 1:
        raise ValueError(f"chunk must be a number of images, at least 1, got {engine.chunk!r}")
    if type(engine.channels_last) is not bool or type(engine.bfloat16) is not bool:
        raise ValueError(f"channels_last and bfloat16 must be true or false, got {found}")
    if engine.bfloat16 and not settings["fast"]:
        raise ValueError("bfloat16 in a sweep that does not allow it")
    units = sum(len(axis["parameters"]) for axis in settings["axes"])
    if not all(0 <= place < units for place in whole):
        raise ValueError(f"whole must name places of {units} curves, got {sorted(whole)}")
    return engine


def _refuse_other_settings(asked: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    if found.get("version") != asked["version"]:
        raise SensitivityError(
            f"{path}: of another version of this program, which cannot be gone on with; {REMEDY}"
        )
    differing = [key for key in (*asked, *found.keys() - asked.keys()) if found.get(key) != asked.get(key)]
    if differing:
        faults = "; ".join(_difference(key, found.get(key), asked.get(key)) for key in differing)
        raise SensitivityError(f"{path}: the folder holds another sweep, {faults}; {REMEDY}")


def _difference(key: str, found: Any, asked: Any) -> str:
    if key == "axes" and isinstance(found, list):
        by_name = {axis.get("axis"): axis for axis in found if isinstance(axis, dict)}
        names = [axis["axis"] for axis in asked]
        if list(by_name) != names:
            return f"axes: {', '.join(map(str, by_name))} there, {', '.join(names)} asked for now"
        faults = [
            f"{part} of {axis['axis']}: {_lists(by_name[axis['axis']].get(part), axis[part])}"
            for axis in asked
            for part in ("levels", "parameters")
            if by_name[axis["axis"]].get(part) != axis[part]
        ]
        return "; ".join(faults)
    if key == "context" and isinstance(found, dict) and isinstance(asked, dict):
        parts = [
            part for part in (*asked, *found.keys() - asked.keys()) if found.get(part) != asked.get(part)
        ]
        return "; ".join(_difference(part, found.get(part), asked.get(part)) for part in parts)
    if key == "activation_ranges" and found and asked:
        return f"{key}: other ones there, which were measured on other images"
    return f"{key}: {_short(found)} there, {_short(asked)} asked for now"


def _lists(found: Any, asked: list[Any]) -> str:
    if not isinstance(found, list):
        return f"{_short(found)} there, {_some(asked)} asked for now"
    only_found = [item for item in found if item not in asked]
    only_asked = [item for item in asked if item not in found]
    if not only_found and not only_asked:
        return "in another order"
    parts = ((only_found, "only there"), (only_asked, "only asked for now"))
    return " and ".join(f"{_some(items)} {where}" for items, where in parts if items)


def _some(items: list[Any]) -> str:
    shown = ", ".join(str(item) for item in items[:3])
    return shown if len(items) <= 3 else f"{shown} and {len(items) - 3} more"


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
