"""The points of a layer-wise sweep, and the CSV that holds them: one row for each technique and setting.

Numbers are written in full, so that reading back gives the same ones.
Knows nothing about models or how a point is measured.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from distiller.errors import Location, SensitivityError

__all__ = ["COLUMNS", "LayerwisePoint", "csv_header", "csv_line", "parse_csv"]


@dataclass(frozen=True, slots=True)
class LayerwisePoint:
    """What a network with all chosen layers compressed at one setting does, and takes.

    Attributes:
        technique: `prune`, `quant`, `kmeans`, `svd`, or several as `svd+prune+quant`.
        axis: `fraction` or `bits`: what `value` is.
        value: the setting.
        top1_correct: images whose label has the highest logit, of `n`.
        n: images.
        loss: mean over the images.
        stored_bytes: of all the network, the chosen layers in their smallest form, the rest as it is.
        dense_bytes: of all the network as it is.
        effective_bits: that are stored for each weight of the chosen layers.
        code_bits: log2 of the levels, mean over the weights that have a code; None: none has.
        predicted_bytes: of a pipeline, as `stored_bytes`, but the shares of its techniques multiplied,
            without positions and tables.
        latency_s: seconds for a mini-batch, median; the weights are dense, whatever could be stored.
        latency_q1_s: first quartile.
        latency_q3_s: third quartile.
        dense_latency_s: of the uncompressed network, measured in turns with this one.
        factored_latency_s: with layers that are really two where that is smaller, likewise; None: there
            are none.
        batch_size: images of a mini-batch.
        threads: that torch used.
        device: as torch writes it.
    """

    technique: str
    axis: str
    value: float
    top1_correct: int
    n: int
    loss: float
    stored_bytes: int
    dense_bytes: int
    effective_bits: float
    code_bits: float | None
    predicted_bytes: int | None
    latency_s: float | None
    latency_q1_s: float | None
    latency_q3_s: float | None
    dense_latency_s: float | None
    factored_latency_s: float | None
    batch_size: int | None
    threads: int | None
    device: str | None

    @property
    def key(self) -> tuple[str, str, float]:
        """Which point of a sweep it is."""
        return self.technique, self.axis, self.value

    @property
    def accuracy(self) -> float:
        """Top-1, 0 to 1."""
        return self.top1_correct / self.n

    @property
    def stored_share(self) -> float:
        """Stored bytes, as a share of the dense ones."""
        return self.stored_bytes / self.dense_bytes


COLUMNS = tuple(field.name for field in fields(LayerwisePoint))
"""The first line of the CSV."""

_KINDS = {field.name: str(field.type) for field in fields(LayerwisePoint)}


def csv_header() -> str:
    """The first line."""
    return _line(COLUMNS)


def csv_line(point: LayerwisePoint) -> str:
    """The line of a point."""
    values = (getattr(point, name) for name in COLUMNS)
    return _line(["" if value is None else value for value in values])


def parse_csv(text: str, file: str) -> list[LayerwisePoint]:
    """The points in the text of a CSV file; `file` is its name in messages.

    Raises:
        SensitivityError: a line is wrong, or a point is there twice.
    """
    found: dict[tuple[str, str, float], LayerwisePoint] = {}
    for point, where in _points(text, file):
        if point.key in found:
            raise SensitivityError(
                f"{where}: {point.technique} at {point.axis} {point.value:g} is there twice; remove one"
            )
        found[point.key] = point
    return list(found.values())


def _points(text: str, file: str) -> Iterator[tuple[LayerwisePoint, Location]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if tuple(header) != COLUMNS:
            raise SensitivityError(
                f"{Location(file, 1)}: not the points of a layer-wise sweep, the columns are "
                f"{','.join(header)}"
            )
        for values in reader:
            where = Location(file, reader.line_num)
            if len(values) != len(COLUMNS):
                raise SensitivityError(f"{where}: {len(COLUMNS)} columns expected, got {len(values)}")
            named = zip(COLUMNS, values, strict=True)
            point = LayerwisePoint(**{name: _value(name, value, where) for name, value in named})
            if point.n < 1 or point.dense_bytes < 1:
                raise SensitivityError(f"{where}: n and dense_bytes must be from 1")
            yield point, where
    except csv.Error as error:
        raise SensitivityError(f"{Location(file, reader.line_num)}: {error}") from error


def _value(name: str, text: str, where: Location) -> Any:
    kind, _, optional = _KINDS[name].partition(" | ")
    if text == "" and optional:
        return None
    if kind == "str":
        return text
    try:
        return int(text) if kind == "int" else float(text)
    except ValueError:
        raise SensitivityError(f"{where}: {name}: a number expected, got '{text}'") from None


def _line(values: Any) -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()
