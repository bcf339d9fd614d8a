"""The study of what sweeps are good for: what its page says."""

from __future__ import annotations

from distiller.sensitivity.curves import Score, SensitivityPoint
from docs import measure_sensitivity
from docs.measure_sensitivity import one_shot_drop, page, verdict


def card(correct: int) -> dict:
    return {
        "measured": {"top1_correct": correct, "n": 10_000, "weight_sparsity": 0.8},
        "reference": {"top1_correct": 9388, "n": 10_000},
    }


CARDS = {"recommended": [card(9310), card(9320), card(9330)], "uniform": [card(9290), card(9300), card(9310)]}
POINTS = [
    SensitivityPoint(axis, "conv1.weight", level, Score(top1, 99.0, 0.1))
    for axis, level, top1 in [
        ("element", 0.0, 93.0), ("element", 0.3, 92.5), ("element", 0.6, 91.0), ("element", 0.9, 92.5),
        ("weight-bits", 32.0, 93.0), ("weight-bits", 8.0, 93.0), ("weight-bits", 4.0, 90.0),
        ("rank", 0.0, 93.0), ("rank", 0.5, 50.0),
    ]
]  # fmt: skip
POINTS += [
    SensitivityPoint("group", "conv1.weight", level, Score(top1, 99.0, 0.1), removed=removed)
    for level, top1, removed in [
        (0.0, 93.0, ""),
        (0.05, 93.0, "0 of 16 channels of conv1"),
        (0.1, 90.0, "1 of 16"),
    ]
]


def test_the_table_says_how_far_each_layer_can_go_without_a_worse_level_before():
    """A level that removes nothing is none."""
    assert "| `conv1.weight` | 0.3 |  |  | - |  | 8 |  | - |" in page(POINTS, CARDS, "")


def test_both_sides_are_told_whichever_way_they_fall():
    text = page(POINTS, CARDS, "a drop of 83.61 points")
    assert "All chosen levels at once, before any training: a drop of 83.61 points." in text
    assert "| dense, as it is | 93.88 % | 9,388 | |" in text
    assert (
        "| levels by the sweep | 93.20 +- 0.25 % | 9,310, 9,320, 9,330 | 80.00 %, 80.00 %, 80.00 % |" in text
    )
    assert (
        "| 80 % in every layer | 93.00 +- 0.25 % | 9,290, 9,300, 9,310 | 80.00 %, 80.00 %, 80.00 % |" in text
    )
    assert verdict(CARDS) == (
        "Levels by the sweep train to a better accuracy: +0.20 +- 0.00 points, seed by seed."
    )
    swapped = {"recommended": CARDS["uniform"], "uniform": CARDS["recommended"]}
    assert verdict(swapped) == (
        "Levels by the sweep train to a worse accuracy: -0.20 +- 0.00 points, seed by seed."
    )


def test_a_difference_within_its_interval_is_not_told_from_none():
    # Differences 0.3, 0.1 and -0.1 points: mean 0.1, standard error 0.2 / sqrt(3), Student's t 4.303.
    noisy = {**CARDS, "recommended": [card(9320), card(9310), card(9300)]}
    assert verdict(noisy) == (
        "In the mean of 3 seeds levels by the sweep train to better accuracy, +0.10 +- 0.50 points, seed by seed: "
        "so few seeds do not tell it from 0."
    )


def test_what_a_verification_found_is_read_from_the_schedule():
    text = "# x\n#\n# In one shot, without training (--verify): top-1 10.27 %, dense 93.88 %: a drop of\n# 83.61 points, "
    assert one_shot_drop(text + "7.28 were predicted.\n#\n# The smallest.\n") == (
        "top-1 10.27 %, dense 93.88 %: a drop of 83.61 points, 7.28 were predicted"
    )


def test_what_is_missing_is_told():
    assert verdict({"recommended": CARDS["recommended"][:2], "uniform": []}) == "Not all seeds are measured."
    assert "| 80 % in every layer | not measured | | |" in page(POINTS, {**CARDS, "uniform": []}, "")
    nothing = page(POINTS, {"recommended": [], "uniform": []}, "")
    assert "| dense, as it is | not measured | | |" in nothing


def refuse(*given):
    raise AssertionError(given)


def test_what_is_kept_is_not_made_again(monkeypatch, tmp_path):
    monkeypatch.setattr(measure_sensitivity, "RESULTS", tmp_path)
    monkeypatch.setattr(measure_sensitivity, "_run", refuse)
    for name in ("sensitivity.csv", "recommended.yaml", "uniform.yaml"):
        (tmp_path / name).touch()
    assert measure_sensitivity.sweep() == tmp_path / "sensitivity.csv"
    measure_sensitivity.schedules()


def test_the_page_alone_runs_nothing_and_is_the_one_that_is_kept(monkeypatch, tmp_path):
    for name in ("_run", "dense_checkpoint", "sweep", "schedules"):
        monkeypatch.setattr(measure_sensitivity, name, refuse)
    kept = measure_sensitivity.PAGE.read_bytes()
    monkeypatch.setattr(measure_sensitivity, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr("sys.argv", ["measure_sensitivity", "--table"])
    measure_sensitivity.main()
    assert (tmp_path / "page.md").read_bytes() == kept
