from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy

from distiller.early_exit import CRITERIA, ExitRule, certainty, check_count
from distiller.early_exit.rules import rule_of_bounds
from distiller.errors import UsageError


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=12))
def test_certainties_are_those_of_scipy(values):
    p = softmax(np.array(values))
    logits = torch.tensor([values])
    assert certainty(logits, "confidence").item() == pytest.approx(p.max(), abs=1e-5)
    assert -certainty(logits, "entropy").item() == pytest.approx(entropy(p), abs=1e-5)


def test_a_certain_answer_has_no_entropy_and_a_uniform_one_the_most():
    logits = torch.tensor([[200.0, 0.0, -200.0, -math.inf], [1.0, 1.0, 1.0, 1.0]])
    assert certainty(logits, "entropy").tolist() == pytest.approx([0, -math.log(4)])
    assert certainty(logits, "confidence").tolist() == [1, 0.25]


def test_sure_answers_leave_and_the_threshold_itself_does():
    logits = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    assert ExitRule("confidence", (0.5,)).leaves(0, logits).tolist() == [True, True]
    assert ExitRule("confidence", (0.8,)).leaves(0, logits).tolist() == [False, True]
    assert ExitRule("entropy", (0.4,)).leaves(0, logits).tolist() == [False, True]
    assert ExitRule("entropy", (0.7,)).leaves(0, logits).tolist() == [True, True]
    assert ExitRule("entropy", (None,)).leaves(0, logits).tolist() == [False, False]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_an_answer_that_is_no_number_does_not_leave(criterion):
    highest = {"confidence": 0.0, "entropy": 100.0}[criterion]
    assert not ExitRule(criterion, (highest,)).leaves(0, torch.full((1, 3), math.nan)).any()


def test_a_rule_of_bounds_has_thresholds_as_they_are_given():
    assert rule_of_bounds("entropy", (-0.123456789, math.inf)).text() == "0.123457 never"
    assert rule_of_bounds("confidence", (0.5, 0.0)).thresholds == (0.5, 0.0)
    assert ExitRule("entropy", (0.5, None)).bound(0) == -0.5
    assert ExitRule("entropy", (0.5, None)).bound(1) == math.inf


@pytest.mark.parametrize(
    "criterion, thresholds, told",
    [
        ("loss", (1.0,), "early exit: the criterion is entropy or confidence, got 'loss'"),
        ("confidence", (1.5,), "early exit: a confidence is a number from 0 to 1, got 1.5"),
        ("entropy", (-1.0,), "early exit: an entropy is a number from 0, got -1"),
        ("entropy", (math.nan,), "early exit: an entropy is a number from 0, got nan"),
    ],
)
def test_a_threshold_that_cannot_be_is_refused(criterion, thresholds, told):
    with pytest.raises(UsageError) as caught:
        ExitRule(criterion, thresholds)
    assert str(caught.value) == told


def test_a_rule_is_checked_against_the_model():
    ExitRule("entropy", (math.log(10), None)).check(2, 10)
    with pytest.raises(UsageError) as caught:
        ExitRule("entropy", (2.4,)).check(1, 10)
    assert str(caught.value) == (
        "early exit: no entropy of 10 classes is above ln(10) = 2.303 nats, got the threshold 2.4, at which every "
        "image would leave"
    )
    with pytest.raises(UsageError) as caught:
        check_count("thresholds", 1, 2)
    assert str(caught.value) == (
        "early exit: the model has 2 exits, got 1 thresholds; give one for each exit, none for the final output"
    )


@pytest.mark.parametrize(
    ("thresholds", "told"),
    [
        (("a",), "ExitRule: thresholds: must be numbers or None, got str"),
        (None, "ExitRule: thresholds: must be a tuple of numbers or None, got NoneType"),
    ],
)
def test_thresholds_that_are_no_numbers_are_refused(thresholds, told):
    with pytest.raises(UsageError) as error:
        ExitRule("entropy", thresholds)
    assert str(error.value) == told
