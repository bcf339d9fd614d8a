"""The study of distillation: its trainings, and what its page says of their cards."""

from __future__ import annotations

from compress_classifier import make_parser
from docs.measure_distillation import PAGE, TITLES, page, study


def card(correct: int) -> dict:
    return {"measured": {"top1_correct": correct, "n": 10_000, "parameters": 100_026}}


def test_every_training_is_a_command_that_parses():
    for training in study().trainings.values():
        make_parser().parse_args(list(training.flags))


def test_every_training_has_its_row():
    assert set(study().trainings) == set(TITLES)


def test_students_are_trained_alike():
    trainings = study().trainings
    alone = trainings["alone"].flags
    for name in ("distilled", "unlabelled", "chained"):
        assert trainings[name].flags[: len(alone)] == alone


def test_gains_are_between_runs_of_the_same_seed():
    cards = {name: [card(9000), card(9100), card(9000)] for name in TITLES}
    cards["distilled"] = [card(9050), card(9090), card(9020)]
    assert "| 9,050, 9,090, 9,020 | +0.50, -0.10, +0.20; mean +0.20 points |" in page(cards)
    cards["alone"] = cards["alone"][1:]
    cards["distilled"] = cards["distilled"][:2]
    assert "mean +" not in page(cards)  # of which seeds they are is not known


def test_what_was_not_measured_is_said_to_be():
    assert page({name: [] for name in TITLES}).count("not measured") == len(TITLES)


def test_the_committed_page_is_that_of_the_committed_cards():
    trainings = study()
    assert PAGE.read_text(encoding="utf-8") == page({name: trainings.cards(name) for name in TITLES})
