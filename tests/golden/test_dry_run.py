"""The text of `--dry-run` for a schedule that is shipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress_classifier import make_parser
from distiller.apputils.classifier_jobs import dry_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.usefixtures("global_settings_restored")
def test_what_the_schedule_of_the_demo_touches_when(golden, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = "--arch lenet5 --dataset digits --epochs 20 --seed 0 --dry-run --compress schedules/agp/lenet5_digits.yaml"
    golden("dry_run.txt", dry_run(make_parser().parse_args(command.split())) + "\n")
