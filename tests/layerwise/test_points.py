from __future__ import annotations

from dataclasses import replace

import pytest

from distiller.errors import SensitivityError
from distiller.layerwise.points import COLUMNS, LayerwisePoint, csv_header, csv_line, parse_csv

POINT = LayerwisePoint(
    technique="svd+prune", axis="fraction", value=0.1, top1_correct=62, n=100, loss=1 / 3, stored_bytes=25,
    dense_bytes=100, effective_bits=8.1, code_bits=None, predicted_bytes=24, latency_s=0.1, latency_q1_s=0.05,
    latency_q3_s=0.2, dense_latency_s=0.3, factored_latency_s=None, batch_size=64, threads=1, device="cpu",
)  # fmt: skip


def test_a_point_knows_its_accuracy_and_share():
    assert (POINT.accuracy, POINT.stored_share, POINT.key) == (0.62, 0.25, ("svd+prune", "fraction", 0.1))


def test_points_come_back_from_their_lines_to_the_last_bit():
    points = [
        POINT,
        replace(POINT, technique="quant", axis="bits", value=4.0, code_bits=4.0, predicted_bytes=None),
        replace(POINT, value=0.2, latency_s=None, batch_size=None, threads=None, device=None),
    ]
    assert parse_csv(csv_header() + "".join(map(csv_line, points)), "f") == points


def line(**changes: object) -> str:
    row = dict(zip(COLUMNS, csv_line(POINT).strip().split(","), strict=True)) | changes
    return csv_header() + ",".join(map(str, row.values())) + "\n"


@pytest.mark.parametrize(
    "text, told",
    [
        ("a,b\n", "f:1: not the points of a layer-wise sweep, the columns are a,b"),
        (csv_header() + "prune,fraction\n", "f:2: 19 columns expected, got 2"),
        (line(n="many"), "f:2: n: a number expected, got 'many'"),
        (line(n=""), "f:2: n: a number expected, got ''"),
        (line(latency_s="x"), "f:2: latency_s: a number expected, got 'x'"),
        (line(n=0), "f:2: n and dense_bytes must be from 1"),
        (csv_header() + 2 * csv_line(POINT), "f:3: svd+prune at fraction 0.1 is there twice; remove one"),
        (csv_header() + 'a,"b\n', "f:2: unexpected end of data"),
    ],
)
def test_a_wrong_line_is_told(text, told):
    with pytest.raises(SensitivityError) as error:
        parse_csv(text, "f")
    assert str(error.value) == told
