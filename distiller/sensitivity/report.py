"""Sensitivity curves as CSV: one row per point, `parameter,sparsity,top1,top5,loss`.

Numbers are written in full, so that reading back gives the same floats; the files of the
archived Distiller are read too.
Knows nothing about models or sweeps.
"""

from __future__ import annotations

import csv
import io
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path

from distiller.atomic_file import write_whole
from distiller.errors import Location, SensitivityError
from distiller.names import strip_wrappers
from distiller.sensitivity.curves import Curves, Score, SensitivityPoint, clean_level
from distiller.sensitivity.write_errors import reporting_failed_writes

COLUMNS = ("parameter", "sparsity", "top1", "top5", "loss")


def sensitivities_to_csv(
    sensitivities: Mapping[str, Mapping[float, tuple[float, float, float]]], fname: str | Path
) -> Path:
    """Write `{parameter: {sparsity: (top1, top5, loss)}}`, one row per point in the given order.

    Args:
        sensitivities: what `perform_sensitivity_analysis` returns.
        fname: the file; written whole or not at all.

    Returns:
        The path of the file.

    Raises:
        SensitivityError: the file cannot be written.
    """
    path = Path(fname)
    rows = [
        csv_line(SensitivityPoint(name, level, Score(*score)))
        for name, points in sensitivities.items()
        for level, score in points.items()
    ]
    with reporting_failed_writes(path):
        write_whole(path, "".join([csv_header(), *rows]))
    return path


def sensitivities_from_csv(fname: str | Path) -> Curves:
    """Read what `sensitivities_to_csv`, or the archived Distiller, wrote.

    Names come back canonical (no `module.`) and sparsities without float noise.

    Raises:
        SensitivityError: the file cannot be read, or a line of it is wrong; says which.
    """
    path = Path(fname)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SensitivityError(f"{path}: cannot be read, {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SensitivityError(f"{path}: not a CSV file, got binary data") from error
    return parse_csv(text, str(path))


def parse_csv(text: str, file: str) -> Curves:
    """The curves in the text of a CSV file; `file` is its name in messages.

    Raises:
        SensitivityError: a line is wrong.
    """
    curves: Curves = OrderedDict()
    for point, where in _points(text, file):
        points = curves.setdefault(point.parameter, OrderedDict())
        if point.level in points:
            raise SensitivityError(
                f"{where}: '{point.parameter}' at sparsity {point.level!r} is there twice; remove one"
            )
        points[point.level] = point.score
    return curves


def csv_header() -> str:
    """The first line."""
    return _line(COLUMNS)


def csv_line(point: SensitivityPoint) -> str:
    """The line of one point."""
    numbers = (clean_level(point.level), *(float(value) for value in point.score))
    return _line((point.parameter, *(repr(number) for number in numbers)))


def _points(text: str, file: str) -> Iterator[tuple[SensitivityPoint, Location]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if tuple(header) != COLUMNS:
            raise SensitivityError(
                f"{Location(file, 1)}: the columns must be {','.join(COLUMNS)}, got {_shown(header)}"
            )
        for fields in reader:
            where = Location(file, reader.line_num)
            yield _point(fields, where), where
    except csv.Error as error:
        raise SensitivityError(f"{Location(file, reader.line_num)}: {error}") from error


def _point(fields: list[str], where: Location) -> SensitivityPoint:
    if len(fields) != len(COLUMNS):
        raise SensitivityError(f"{where}: {len(COLUMNS)} columns expected, got {_shown(fields)}")
    name = strip_wrappers(fields[0])
    if not name:
        raise SensitivityError(f"{where}: parameter: a name expected, got {_shown(fields[:1])}")
    level, *score = (
        _number(column, text, where) for column, text in zip(COLUMNS[1:], fields[1:], strict=True)
    )
    if not 0 <= level <= 1:
        raise SensitivityError(f"{where}: sparsity: a fraction 0..1 expected, got '{fields[1]}'")
    return SensitivityPoint(name, clean_level(level), Score(*score))


def _number(column: str, text: str, where: Location) -> float:
    try:
        return float(text)
    except ValueError:
        raise SensitivityError(f"{where}: {column}: a number expected, got '{text}'") from None


def _shown(fields: list[str]) -> str:
    text = ",".join(fields)
    return f"'{text}'" if len(text) <= 80 else f"'{text[:77]}...'"


def _line(fields: tuple[str, ...]) -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerow(fields)
    return buffer.getvalue()
