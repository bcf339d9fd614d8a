from __future__ import annotations

import pytest

from distiller.apputils.meters import EvalResult
from distiller.apputils.recommend_text import Choice, Sources, header, table, verified
from distiller.sensitivity.curves import Score, SensitivityPoint
from distiller.sensitivity.prunables import Amount, Prunable
from distiller.sensitivity.recommend import Goal

DENSE = SensitivityPoint("filter", "a", 0.0, Score(90.0, 99.0, 0.3), 1000, 900)
POINTS = [
    DENSE,
    SensitivityPoint("filter", "a", 0.5, Score(88.5, 99.0, 0.3), 400, 354, None, 87.9, 89.1),
    SensitivityPoint("filter", "b", 0.5, Score(90.2, 99.0, 0.3), 1000, 902),
]
ALONE = Prunable("a", ("a",), ("a",), 80, {0.5: Amount(40, 100, 4)}, 8)
COUPLED = Prunable("a", ("a", "b"), ("a", "b"), 160, {0.5: Amount(80, 100, 4)}, 8)
SOURCES = Sources("sensitivity.csv", "filter", "net", "digits", POINTS, DENSE)


def test_a_row_has_the_measured_drop_and_the_interval():
    assert table(SOURCES, [ALONE], {"a": 0.5}).splitlines()[1] == (
        "      0.5    1.50  88.50 (87.90 to 89.10) a, 4 of 8"
    )


def test_drops_of_what_goes_together_add_up_and_have_no_interval():
    assert table(SOURCES, [COUPLED], {"a": 0.5}).splitlines()[1] == (
        "      0.5    1.30                         a and 1 more, 4 of 8"
    )


def test_what_stays_dense_says_so():
    assert table(SOURCES, [ALONE], {"a": 0.0}).splitlines()[1].split() == ["0", "0.00", "90.00", "a"]


def test_what_was_swept_and_stays_whole_is_told_with_its_reason():
    choice = Choice(
        Goal("max_drop", 2.0), [ALONE], {"b": "its filters follow those of other layers"}, {"a": 0.5}, 1.5, "Reached: x."
    )  # fmt: skip
    paragraphs = header(SOURCES, choice, 10, "agp", "python " + "word " * 30)
    assert "Swept, and left whole:\n  b: its filters follow those of other layers" in paragraphs
    assert "Asked for: max_drop 2. Reached: x." in paragraphs[1]
    assert paragraphs[-1].startswith("  python word")
    assert " \\\n      word" in paragraphs[-1]
    assert "become zero over epochs 0 to 5, gradually" in paragraphs[-2]


@pytest.mark.parametrize(
    "pruner, told", [("agp", "gradually"), ("sensitivity", "sensitivity * standard dev")]
)
def test_the_pruner_says_how_it_prunes(pruner, told):
    sources = Sources("s.csv", "element", "net", "digits", POINTS, DENSE)
    choice = Choice(Goal("max_drop", 2.0), [ALONE], {}, {"a": 0.5}, 1.5, "")
    assert told in header(sources, choice, 10, pruner, "x")[-2]


def test_predicted_and_measured_drop_stand_beside_each_other():
    assert verified(1.5, EvalResult(0.3, 900, 990, 1000), EvalResult(0.4, 880, 990, 1000)) == (
        "In one shot, without training (--verify): top-1 88.00 % (880 of 1,000), dense 90.00 % (900), "
        "of the test images: a drop of 2.00 points, 1.50 were predicted by the images of the sweep."
    )
