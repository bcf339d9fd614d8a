"""The keys of `results.json`, with the types of their values."""

from __future__ import annotations

import json

import pytest

from compress_classifier import make_parser
from distiller.apputils.classifier_jobs import run_job
from distiller.apputils.experiment import create_run_folder
from distiller.apputils.image_classifier import Run
from distiller.export.latency import measure_latencies
from tests.apputils.conftest import DIGITS


def shape_of(value):
    """The value, with its leaves' types in their place."""
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape_of(item) for item in value[:1]]
    return type(value).__name__


@pytest.mark.usefixtures("global_settings_restored")
def test_the_keys_of_the_card_of_a_quantization(golden, tmp_path, monkeypatch):
    assert measure_latencies.__kwdefaults__ is not None
    monkeypatch.setitem(measure_latencies.__kwdefaults__, "min_time", 0.01)
    args = make_parser().parse_args([*DIGITS.split(), "-e", "--qe", "--qe-dynamic"])
    folder = create_run_folder(tmp_path)
    run_job(args, lambda: Run(folder))
    card = json.loads((folder.path / "results.json").read_text())
    golden("results_keys.json", json.dumps(shape_of(card), indent=2) + "\n")
