"""Every statistics file that is shipped says how it was made, and fits its model."""

from __future__ import annotations

from pathlib import Path

import pytest

from distiller.data_loggers import check_stats, load_stats
from distiller.dataset_facts import infer_dataset
from distiller.models import create_model
from distiller.names import named_modules
from docs.schedule_headers import Shipped
from tests.schedules.test_shipped_schedules import flags

STATS = sorted((Path(__file__).resolve().parents[2] / "stats").glob("*.yaml"))


def test_there_are_statistics():
    assert STATS


@pytest.mark.parametrize("path", STATS, ids=lambda path: path.stem)
def test_statistics_fit_the_model_of_their_command(path):
    args = flags(Shipped(path, path.read_text(encoding="utf-8")))
    model = create_model(False, args.dataset or infer_dataset(args.arch), args.arch, parallel=False)
    stats = load_stats(path)
    check_stats(stats, [name for name, _ in named_modules(model)], str(path))
    assert all(
        {"min", "max", "avg_min", "avg_max", "mean", "std", "b"} <= set(entry["output"])
        for entry in stats.values()
    )
