"""What is measured for the guide is what it says; its command lines are those of the program."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import compress_classifier
from distiller.apputils.usage import check_usage
from distiller.layerwise import SweepPlan, fraction_range
from distiller.layerwise.points import csv_header, csv_line
from docs import measure_layerwise
from docs.dense_networks import dense_results
from docs.measure_layerwise import (
    BITS,
    FRACTIONS,
    NETWORKS,
    PAGE,
    POINTS,
    TECHNIQUES,
    flags,
    keep,
    missing,
    page,
)
from docs.schedule_headers import shipped
from tests.layerwise.test_points import POINT


def parsed(words: list[str]):
    parser = compress_classifier.make_parser()
    args = parser.parse_args(words)
    check_usage(args)
    return args


def test_the_commands_of_the_guide_are_taken_and_sweep_what_they_say():
    (block,) = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for line in block.replace("\\\n", " ").splitlines() if line]
    train, sweep = (
        parsed(shlex.split(line.removeprefix("python compress_classifier.py "))) for line in lines
    )
    assert sweep.load_model_path == f"{train.output_dir}/latest_log_dir/checkpoint.pth.tar"
    assert SweepPlan(sweep.layerwise, fraction_range(*sweep.fractions), tuple(sweep.layerwise_bits))


def test_every_network_has_its_schedule_and_a_sweep_of_all_points():
    results = {schedule.results for schedule in shipped()}
    for arch in NETWORKS:
        assert dense_results(arch) in results
        args = parsed(flags(arch, Path("c")))
        plan = SweepPlan(args.layerwise, fraction_range(*args.fractions), tuple(args.layerwise_bits))
        assert plan == SweepPlan(TECHNIQUES, FRACTIONS, BITS)
        assert len(plan.keys) == POINTS


def test_the_guide_is_current():
    assert page(PAGE.read_text(encoding="utf-8")) == PAGE.read_text(encoding="utf-8")


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_layerwise, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(measure_layerwise, "IMAGES", tmp_path / "images")
    monkeypatch.setattr(measure_layerwise, "draw_layerwise", lambda folder, into: [])
    return tmp_path / "results"


def test_what_was_swept_is_kept_and_told_on_the_page(results, tmp_path):
    assert missing() == list(NETWORKS)
    arch, plan = next(iter(NETWORKS)), SweepPlan(TECHNIQUES, FRACTIONS, BITS)
    points = [replace(POINT, technique=name, axis=axis, value=value) for name, axis, value in plan.keys]
    (tmp_path / "layerwise.csv").write_text(csv_header() + "".join(map(csv_line, points)))
    keep(arch, tmp_path)
    assert {path.name for path in (results / arch).iterdir()} == {"layerwise.csv"} | {
        f"{metric}-{name}.json" for metric in ("accuracy", "latency") for name in TECHNIQUES
    }
    assert missing() == [other for other in NETWORKS if other != arch]
    text = page(PAGE.read_text(encoding="utf-8"))
    assert "| `svd` | fraction 0.9 | 62.00 % (52.2-70.9) | 25 (25.0 %) | 8.10 | 100.0 | 300.0 |  |" in text
    assert "| `quant` | 4 bits |" in text
    assert page(text) == text


def test_an_unfinished_sweep_is_missing_and_not_on_the_page(results):
    arch = next(iter(NETWORKS))
    (results / arch).mkdir(parents=True)
    (results / arch / "layerwise.csv").write_text(csv_header() + csv_line(POINT))
    assert arch in missing()
    assert "Measured on Fashion-MNIST" not in page(PAGE.read_text(encoding="utf-8"))
