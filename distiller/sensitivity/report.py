"""The points of a sweep as CSV: one row each.

    parameter,sparsity,top1,top5,loss,axis,level,n,top1_correct,top5_correct,top1_low,top1_high,removed

The first five columns are Distiller's; its own files, which have no others, are read too. A field is empty
where a point does not have it: the sparsity of a number of bits, say. Numbers are written in full, so that
reading back gives the same floats.
Knows nothing about models or sweeps.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from distiller.atomic_file import write_whole
from distiller.errors import DistillerError, Location, SensitivityError, UsageError
from distiller.names import strip_wrappers
from distiller.sensitivity.axes import find_axis
from distiller.sensitivity.curves import Curves, Score, SensitivityPoint, clean_level, curves_by_axis
from distiller.sensitivity.write_errors import reporting_failed_writes

__all__ = [
    "COLUMNS",
    "DISTILLERS_COLUMNS",
    "parse_csv",
    "points_from_csv",
    "points_to_csv",
    "sensitivities_from_csv",
    "sensitivities_to_csv",
]

DISTILLERS_COLUMNS = ("parameter", "sparsity", "top1", "top5", "loss")
_COUNTS = ("n", "top1_correct", "top5_correct")
_INTERVAL = ("top1_low", "top1_high")
COLUMNS = (*DISTILLERS_COLUMNS, "axis", "level", *_COUNTS, *_INTERVAL, "removed")


def points_to_csv(points: Iterable[SensitivityPoint], path: str | Path) -> Path:
    """Write points, one row each in the given order.

    Args:
        points: of one axis or several.
        path: the file; written whole or not at all.

    Returns:
        The path of the file.

    Raises:
        UnknownNameError: a point of an unknown axis.
        SensitivityError: the file cannot be written.
    """
    return _write((COLUMNS, *map(_fields, points)), Path(path))


def points_from_csv(path: str | Path) -> list[SensitivityPoint]:
    """Read what `points_to_csv`, `sensitivities_to_csv` or the archived Distiller wrote.

    Names come back canonical (no `module.`) and levels without float noise. The axis of a file that does not
    say it is "".

    Raises:
        SensitivityError: the file cannot be read, or a line of it is wrong; says which.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SensitivityError(f"{path}: cannot be read, {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SensitivityError(f"{path}: not a CSV file, got binary data") from error
    return parse_csv(text, str(path))


def sensitivities_to_csv(
    sensitivities: Mapping[str, Mapping[float, tuple[float, float, float]]], fname: str | Path
) -> Path:
    """Write `{parameter: {sparsity: (top1, top5, loss)}}` in Distiller's five columns, in the given order.

    Args:
        sensitivities: what `perform_sensitivity_analysis` returns for an axis whose levels are fractions.
        fname: the file; written whole or not at all.

    Returns:
        The path of the file.

    Raises:
        UsageError: a level is no fraction.
        SensitivityError: the file cannot be written.
    """
    rows: list[Sequence[str]] = [DISTILLERS_COLUMNS]
    for name, curve in sensitivities.items():
        for level, score in curve.items():
            if not 0 <= level <= 1:
                raise UsageError(
                    f"sensitivities_to_csv: '{name}': the column is for a sparsity 0..1, got {level:g}; "
                    "write such levels with points_to_csv"
                )
            rows.append((name, repr(clean_level(level)), *map(_text, score)))
    return _write(rows, Path(fname))


def sensitivities_from_csv(fname: str | Path, axis: str | None = None) -> Curves:
    """The curves of one axis of a file, as `points_from_csv` reads it.

    Args:
        fname: the file.
        axis: the name of the axis; needed where the file has several.

    Returns:
        `{parameter: {level: (top1, top5, loss)}}`; empty where the file has no points.

    Raises:
        UnknownNameError: there is no such axis.
        SensitivityError: the file cannot be read, a line of it is wrong, or it does not have the one axis.
    """
    by_axis = curves_by_axis(points_from_csv(fname))
    found = ", ".join(by_axis)
    if axis is None:
        if len(by_axis) > 1:
            raise SensitivityError(f"{fname}: has the axes {found}; say which with 'axis'")
        return next(iter(by_axis.values()), Curves())
    name = find_axis(axis).name
    if name in by_axis:
        return by_axis[name]
    has = "does not say its axis; leave 'axis' out" if "" in by_axis else f"has {found or 'no points'}"
    raise SensitivityError(f"{fname}: axis '{name}' is not there, the file {has}")


def parse_csv(text: str, file: str) -> list[SensitivityPoint]:
    """The points in the text of a CSV file; `file` is its name in messages.

    Raises:
        SensitivityError: a line is wrong.
    """
    found: dict[tuple[str, str, float], SensitivityPoint] = {}
    for point, where in _points(text, file):
        key = (point.axis, point.parameter, point.level)
        if key in found:
            of = f" of axis {point.axis}" if point.axis else ""
            raise SensitivityError(
                f"{where}: '{point.parameter}' at level {point.level!r}{of} is there twice; remove one"
            )
        found[key] = point
    return list(found.values())


def _fields(point: SensitivityPoint) -> tuple[str, ...]:
    level = repr(clean_level(point.level))
    has_sparsity = not point.axis or find_axis(point.axis).is_sparsity
    counts = (point.n, point.top1_correct, point.top5_correct)
    return (
        point.parameter,
        level if has_sparsity else "",
        *map(_text, point.score),
        point.axis,
        level,
        *("" if count is None else str(int(count)) for count in counts),
        *("" if end is None else _text(end) for end in (point.top1_low, point.top1_high)),
        point.removed,
    )


def _text(number: float) -> str:
    return repr(float(number))


def _write(rows: Iterable[Sequence[str]], path: Path) -> Path:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    with reporting_failed_writes(path):
        write_whole(path, buffer.getvalue())
    return path


def _points(text: str, file: str) -> Iterator[tuple[SensitivityPoint, Location]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = tuple(next(reader, []))
        if header not in (COLUMNS, DISTILLERS_COLUMNS):
            raise SensitivityError(
                f"{Location(file, 1)}: the columns must be {','.join(COLUMNS)}, or the first five of them, "
                f"got {_shown(header)}"
            )
        for fields in reader:
            where = Location(file, reader.line_num)
            if len(fields) != len(header):
                raise SensitivityError(f"{where}: {len(header)} columns expected, got {_shown(fields)}")
            yield _point(dict(zip(header, fields, strict=True)), where), where
    except csv.Error as error:
        raise SensitivityError(f"{Location(file, reader.line_num)}: {error}") from error


def _point(row: Mapping[str, str], where: Location) -> SensitivityPoint:
    name = strip_wrappers(row["parameter"])
    if not name:
        raise SensitivityError(f"{where}: parameter: a name expected, got '{row['parameter']}'")
    axis = _axis(row.get("axis", ""), where)
    score = Score(_finite(row, "top1", where), _finite(row, "top5", where), _number(row, "loss", where))
    n, top1_correct, top5_correct = _counts(row, where)
    low, high = _interval(row, where)
    return SensitivityPoint(
        axis=axis,
        parameter=name,
        level=_level(row, axis, where),
        score=score,
        n=n,
        top1_correct=top1_correct,
        top5_correct=top5_correct,
        top1_low=low,
        top1_high=high,
        removed=row.get("removed", ""),
    )


def _axis(name: str, where: Location) -> str:
    try:
        return name and find_axis(name).name
    except DistillerError as error:
        raise SensitivityError(f"{where}: axis: {_reason(error)}") from error


def _level(row: Mapping[str, str], axis: str, where: Location) -> float:
    """The level; of a sparsity it is there twice, or, in Distiller's files, as the sparsity alone."""
    if "level" not in row:
        return _sparsity(row, where)
    level = clean_level(_number(row, "level", where))
    if not axis or find_axis(axis).is_sparsity:
        if _sparsity(row, where) != level:
            raise SensitivityError(
                f"{where}: sparsity: the level, '{row['level']}', expected, got '{row['sparsity']}'"
            )
    elif row["sparsity"]:
        raise SensitivityError(
            f"{where}: sparsity: nothing expected, as axis {axis} has none, got '{row['sparsity']}'"
        )
    if axis:
        try:
            find_axis(axis).check_level(level)
        except DistillerError as error:
            raise SensitivityError(f"{where}: level: {_reason(error)}") from error
    return level


def _sparsity(row: Mapping[str, str], where: Location) -> float:
    sparsity = _number(row, "sparsity", where)
    if not 0 <= sparsity <= 1:
        raise SensitivityError(f"{where}: sparsity: a fraction 0..1 expected, got '{row['sparsity']}'")
    return clean_level(sparsity)


def _counts(row: Mapping[str, str], where: Location) -> tuple[int, int, int] | tuple[None, None, None]:
    """Images, and how many of them are right by top-1 and by top-5."""
    if not _are_there(row, _COUNTS, where):
        return None, None, None
    n, top1, top5 = (_count(row, column, where) for column in _COUNTS)
    if not 0 <= top1 <= top5 <= n or n == 0:
        raise SensitivityError(
            f"{where}: 0 <= top1_correct <= top5_correct <= n and n > 0 expected, got {top1}, {top5} and {n}"
        )
    return n, top1, top5


def _interval(row: Mapping[str, str], where: Location) -> tuple[float, float] | tuple[None, None]:
    if not _are_there(row, _INTERVAL, where):
        return None, None
    low, high = (_finite(row, column, where) for column in _INTERVAL)
    if low > high:
        raise SensitivityError(
            f"{where}: top1_low <= top1_high expected, got {row['top1_low']} and {row['top1_high']}"
        )
    return low, high


def _are_there(row: Mapping[str, str], columns: Sequence[str], where: Location) -> bool:
    """Whether the fields that go together are filled: all or none."""
    texts = [row.get(column, "") for column in columns]
    if any(texts) and not all(texts):
        raise SensitivityError(f"{where}: {', '.join(columns)}: all or none expected, got {_shown(texts)}")
    return any(texts)


def _number(row: Mapping[str, str], column: str, where: Location) -> float:
    try:
        return float(row[column])
    except ValueError:
        raise SensitivityError(f"{where}: {column}: a number expected, got '{row[column]}'") from None


def _finite(row: Mapping[str, str], column: str, where: Location) -> float:
    number = _number(row, column, where)
    if not math.isfinite(number):
        raise SensitivityError(f"{where}: {column}: a finite number expected, got '{row[column]}'")
    return number


def _count(row: Mapping[str, str], column: str, where: Location) -> int:
    if not row[column].isdecimal():
        raise SensitivityError(f"{where}: {column}: a number of images expected, got '{row[column]}'")
    return int(row[column])


def _reason(error: DistillerError) -> str:
    return str(error).removeprefix("sensitivity: ")


def _shown(fields: Sequence[str]) -> str:
    text = ",".join(fields)
    return f"'{text}'" if len(text) <= 80 else f"'{text[:77]}...'"
