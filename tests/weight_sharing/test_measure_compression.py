"""The study of compression rates: its trainings, its bars, and what its page says of their cards."""

from __future__ import annotations

import pytest

from compress_classifier import make_parser
from docs.measure_compression import PAGE, TITLES, bars, page, quantized_in, study


def card(correct: int = 8900, rate: float = 50.0, sparsity: float = 0.96) -> dict:
    return {
        "measured": {"top1_correct": correct, "n": 10_000, "total_sparsity": sparsity},
        "packed": {"bytes": round(1_066_440 / rate), "compression_rate": rate},
    }


def cards(**changed: list[dict]) -> dict:
    return {**{name: [card()] * 3 for name in TITLES}, **changed}


def test_every_training_is_a_command_that_parses():
    for training in study().trainings.values():
        make_parser().parse_args(list(training.flags))


def test_soft_weight_sharing_is_tested_before_its_schedule_quantizes_and_after():
    trainings = study().trainings
    before, after = trainings["mixture"].flags, trainings["quantized"].flags
    at = before.index("--epochs") + 1
    assert int(before[at]) == quantized_in() < int(after[at])
    assert (*before[:at], after[at], *before[at + 1 :], "--pack", "model.dsz") == after


def test_bars_hold_where_files_are_small_and_little_is_lost():
    assert bars(cards()) == []


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"prune_share": [card(), card(rate=39.9), card()]}, "seed 2: 39.9x, loses 0.00 points"),
        ({"prune_share": [card(), card(), card(8799)]}, "seed 3: 50.0x, loses 1.01 points"),
        (
            {"quantized": [card(sparsity=0.94), card(), card()]},
            "soft weight sharing, seed 1: sparsity 94.00 %",
        ),
        ({"dense": [card()]}, "not all seeds are measured"),
    ],
)
def test_bars_are_missed_by_each_seed_for_itself(changed, missed):
    (found,) = bars(cards(**changed))
    assert found.endswith(missed)


def test_the_page_gives_bytes_and_rates_of_each_seed():
    assert "| 96.00 %, 96.00 %, 96.00 % | 21,329, 21,329, 21,329 | 50.0x, 50.0x, 50.0x |" in page(cards())


def test_the_committed_page_is_that_of_the_committed_cards():
    trainings = study()
    found = {name: trainings.cards(name) for name in (*trainings.trainings, "just_quantized")}
    assert PAGE.read_text(encoding="utf-8") == page(found)
    assert bars(found) == []
