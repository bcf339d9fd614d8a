"""The record of a search: every point that was evaluated, with its value, in a file that outlives it.

    log = SearchLog("search.jsonl", "clipping", {"model": ..., "bits": 4}, progress=show)
    loss = log.evaluated({"conv1": "AVG"}, lambda: eval_fn(model))

The file is of JSON lines: what search it is, then a line for each point, written as soon as its value is
known. A search that is run again with the same settings finds its values there and evaluates only the rest:
if its next point follows from the values so far, it goes the same way.
Knows nothing about what is searched.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from distiller.atomic_file import write_whole
from distiller.errors import QuantizationError

_NOTHING = object()
_REMEDY = "give another file, or remove this one to begin anew"


@dataclass(frozen=True, slots=True)
class SearchProgress:
    """Where a search stands after a point.

    Attributes:
        point: what was evaluated.
        value: its loss (of a sensitivity, that); NaN and infinity are told as they came.
        best: the lowest finite value so far; infinite while there is none.
        done: points so far, those from the file among them.
        left: about how many there are still to be; None where that is not known.
        is_replayed: the value is from the file.
    """

    point: Mapping[str, Any]
    value: float
    best: float
    done: int
    left: int | None
    is_replayed: bool


Progress: TypeAlias = Callable[[SearchProgress], None]


class SearchLog:
    """Values by point, in memory and in a file.

    Args:
        path: the file; it is made, or gone on with. None keeps no file.
        search: what kind of search it is.
        settings: all that gives its points their meaning; what JSON can hold.
        progress: called after each new point, and each that is met again in the file.

    Attributes:
        evaluations: points that were evaluated by this object, not read from the file.

    Raises:
        QuantizationError: the file is of another search or of none, is damaged, or cannot be read or written.
    """

    def __init__(
        self,
        path: str | Path | None,
        search: str,
        settings: Mapping[str, Any],
        progress: Progress | None = None,
    ) -> None:
        self._path = None if path is None else Path(path)
        self._progress = progress
        self._values: dict[str, float] = {}
        self._notes: dict[str, Any] = {}
        self._met: set[str] = set()
        self._best = math.inf
        self._expected: int | None = None
        self.evaluations = 0
        if self._path is not None:
            self._open(self._path, {"search": search, "settings": json.loads(_text(settings))})

    @property
    def done(self) -> int:
        """Points that this object was asked for, those from the file among them."""
        return len(self._met)

    def expect(self, points: int | None) -> None:
        """Tell how many points there are to be in all, for the progress; None: not known."""
        self._expected = points

    def evaluated(self, point: Mapping[str, Any], evaluate: Callable[[], float]) -> float:
        """The value of a point: recorded, or evaluated now and recorded.

        Args:
            point: plain data; equal ones are one point.
            evaluate: returns the value; called at most once for each point, in all runs of the search.
        """
        key = _text(point)
        is_replayed = key in self._values
        if not is_replayed:
            value = float(evaluate())
            self._append({"point": point, "value": value if math.isfinite(value) else repr(value)})
            self._values[key] = value
            self.evaluations += 1
        if key not in self._met:
            self._met.add(key)
            self._tell(point, self._values[key], is_replayed)
        return self._values[key]

    def has(self, point: Mapping[str, Any]) -> bool:
        """Whether the value of a point is known."""
        return _text(point) in self._values

    def was_met(self, point: Mapping[str, Any]) -> bool:
        """Whether this object was asked for a point before."""
        return _text(point) in self._met

    def remembered(self, note: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """What else took evaluations to find out, as calibrated ranges: recorded, or made now and recorded.

        Args:
            note: what it is, plain data.
            make: returns plain data; called at most once, in all runs of the search.
        """
        key = _text(note)
        if key not in self._notes:
            content = json.loads(_text(make()))
            self._append({"note": note, "content": content})
            self._notes[key] = content
        return self._notes[key]

    def _tell(self, point: Mapping[str, Any], value: float, is_replayed: bool) -> None:
        if math.isfinite(value):
            self._best = min(self._best, value)
        if self._progress is not None:
            left = None if self._expected is None else max(0, self._expected - self.done)
            self._progress(SearchProgress(point, value, self._best, self.done, left, is_replayed))

    def _open(self, path: Path, header: dict[str, Any]) -> None:
        try:
            content = path.read_bytes() if path.exists() else b""
            if not content:
                write_whole(path, _text(header) + "\n")
                return
            lines = _read(path, content)
            _refuse_other(path, lines[0], header)
            whole = content.rfind(b"\n") + 1
            if whole < len(content):  # the process was killed while it wrote its last line
                os.truncate(path, whole)
        except OSError as error:
            raise QuantizationError(
                f"{path}: cannot hold the record of a search, {error.strerror or error}"
            ) from error
        for line in lines[1:]:
            if "point" in line:
                self._values[_text(line["point"])] = float(line["value"])
            else:
                self._notes[_text(line["note"])] = line["content"]

    def _append(self, line: Mapping[str, Any]) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("ab") as file:
                file.write(_text(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise QuantizationError(f"{self._path}: cannot be written, {error.strerror or error}") from error


def check_search_log(path: Path) -> None:
    """See to it that a file is the record of a search, whichever; it stays as it is.

    Raises:
        QuantizationError: it is none, is damaged, or cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise QuantizationError(f"{path}: cannot be read, {error.strerror or error}") from error
    if content:  # a process that was killed may have left it empty
        _read(path, content)


def told_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first thing in which plain data differ, `'a.b' is 1 there, 2 here`; None when nothing does."""
    difference = _difference(old, new)
    if difference is None:
        return None
    where, there, here = difference
    return f"'{where}' is {_shown(there)} there, {_shown(here)} here"


def _read(path: Path, content: bytes) -> list[Any]:
    """The whole lines of a record: what search it is of, points and notes."""
    lines: list[Any] = []
    for number, text in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            line = json.loads(text)
            is_known = not lines or _is_entry(line)
        except ValueError as error:
            what = "is damaged" if lines else "is no record of a search"
            raise QuantizationError(f"{path}:{number}: {what}; {_REMEDY}") from error
        if not is_known:
            raise QuantizationError(f"{path}:{number}: is neither a point nor a note of a search; {_REMEDY}")
        lines.append(line)
    if not lines or not isinstance(lines[0], dict) or lines[0].keys() != {"search", "settings"}:
        raise QuantizationError(f"{path}: is no record of a search; {_REMEDY}")
    return lines


def _is_entry(line: Any) -> bool:
    """Whether a line is a point with its value, or a note; raises ValueError where the value is no number."""
    keys = line.keys() if isinstance(line, dict) else set()
    if keys == {"point", "value"}:
        float(line["value"] if isinstance(line["value"], str | int | float) else "no number")
    return keys in ({"point", "value"}, {"note", "content"})


def _text(value: Any) -> str:
    """JSON in one line, the same for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _refuse_other(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise a QuantizationError that names the first thing in which two searches differ."""
    if found["search"] != wanted["search"]:
        raise QuantizationError(
            f"{path}: is of a search of {found['search']}, this one is of {wanted['search']}; {_REMEDY}"
        )
    difference = told_difference(found["settings"], wanted["settings"])
    if difference is not None:
        raise QuantizationError(f"{path}: is of another search, {difference}; {_REMEDY}")


def _difference(old: Any, new: Any) -> tuple[str, Any, Any] | None:
    """(path, old, new) of the first thing that is not equal; None when all is."""
    if old == new:
        return None
    if not isinstance(old, dict) or not isinstance(new, dict):
        return "", old, new
    key = next(key for key in sorted({*old, *new}) if old.get(key, _NOTHING) != new.get(key, _NOTHING))
    inner = _difference(old.get(key, _NOTHING), new.get(key, _NOTHING)) or ("", None, None)
    return f"{key}.{inner[0]}".rstrip("."), inner[1], inner[2]


def _shown(value: Any) -> str:
    text = "not given" if value is _NOTHING else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
