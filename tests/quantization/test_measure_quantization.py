"""The table of methods and widths: what is measured, and what the page says of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from docs import measure_quantization, quantization_page
from docs.measure_quantization import cells, post_training
from docs.quantization_page import (
    NETWORKS,
    POST_TRAINING,
    TRAINED,
    WIDTHS,
    Method,
    Network,
    bars,
    page,
    read_results,
)
from docs.schedule_headers import shipped

N = 10_000


def full(points: float = 0.0, **integers: int) -> dict:
    """Results in which everything loses so many points."""
    found = {
        cell.name: {"top1_correct": 9200 - (0 if cell.method == "fp32" else round(100 * points)), "n": N}
        for cell in cells()
    }
    for cell in found.values():
        cell.update(integers)
    return found


IN_INTEGERS = {"agreeing": 9990, "integer_correct": 9190, "integer_bytes": 29, "float_bytes": 100}


@pytest.fixture
def few_bits(monkeypatch):
    monkeypatch.setattr(quantization_page, "few_bits", lambda *_: {"top1_correct": 9000, "n": N})


def test_every_method_has_a_cell_at_every_width_for_both_networks():
    found = [cell.name for cell in cells()]
    assert (
        len(found) == len(set(found)) == len(NETWORKS) * (1 + len(WIDTHS) * len([*POST_TRAINING, *TRAINED]))
    )


def test_every_training_has_its_shipped_schedule_for_both_networks():
    stems = {schedule.path.stem for schedule in shipped()}
    for network in NETWORKS.values():
        assert {f"{network.stem}_{training.schedule}" for training in TRAINED.values()} <= stems


def test_bars_hold_where_nothing_is_lost(few_bits):
    found = bars(full(0.0, **IN_INTEGERS))
    assert len(found) == 2 * 9
    assert all(bar.holds for bar in found)


def test_all_cells_are_measured_and_every_bar_holds():
    results = read_results()
    assert [cell.name for cell in cells() if cell.name not in results] == []
    assert "not measured" not in page(results)
    assert [bar.text for bar in bars(results) if not bar.holds] == []


@pytest.mark.parametrize(("lost", "missed"), [(0.3, 0), (0.31, 1), (1.01, 3), (1.51, 6)])
def test_bars_are_missed_by_what_is_above_them(few_bits, lost, missed):
    assert sum(not bar.holds for bar in bars(full(lost, **IN_INTEGERS))) == 2 * missed


def test_integers_that_decide_otherwise_or_large_files_are_told(few_bits):
    found = bars(full(0.0, **{**IN_INTEGERS, "agreeing": 9949, "integer_bytes": 31}))
    assert [bar.text.partition(": ")[2] for bar in found if not bar.holds][:2] == [
        "onnxruntime decides as the simulation in at least 99.49 % of the images (at least 99.5 % asked for)",
        "integer files of at most 0.310 of the float32 file (0.30 allowed)",
    ]


def test_what_was_not_measured_is_missed_and_said_to_be():
    assert not any(bar.holds for bar in bars({}))
    assert "not measured" in page({})


def test_the_page_gives_counts_and_intervals():
    row = next(line for line in page(full(1.0)).splitlines() if line.startswith("| greedy clip search"))
    assert row == "| greedy clip search |" + " 91.00 % (9,100; 90.4-91.5) |" * 4


def test_the_committed_page_is_that_of_the_committed_results():
    assert quantization_page.PAGE.read_text(encoding="utf-8") == page(read_results())


@pytest.mark.parametrize(
    "steps", [{}, {"cross_layer_equalization": True, "bias_correction": True}, {"mixed_precision": {}}]
)
def test_a_network_is_quantized_and_tested_in_integers_too(monkeypatch, steps):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    ).eval()
    images = torch.rand(64, 1, 8, 8)
    with torch.no_grad():
        labels = net(images).argmax(1)
    monkeypatch.setitem(NETWORKS, "tiny", Network("Tiny", "tiny", ("0", "5")))
    monkeypatch.setattr(measure_quantization, "say", lambda _: None)

    def loss(model):
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model(images), labels))

    loader = [(images, labels)]
    dense = SimpleNamespace(
        compressor=SimpleNamespace(model=net, data=SimpleNamespace(test=loader)),
        dummy_input=images[:1],
        calibration=[images],
        loss=loss,
        stats=None,
        float_bytes=5000,
    )
    found = post_training(dense, "tiny", Method("any", steps=steps, in_integers=True), "W8A8")  # type: ignore[arg-type]
    assert found["n"] == 64
    assert found["agreeing"] >= 63
    assert found["top1_correct"] >= 60
    assert found["integer_bytes"] > 0
    assert found["float_bytes"] == 5000
    assert (dense.stats is None) == ("cross_layer_equalization" in steps)
