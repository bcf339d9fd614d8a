import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distiller.apputils.scores import Score, ScoreTracker
from distiller.errors import CheckpointError, UsageError


def step(tracker: ScoreTracker, epoch: int, top1: float, *, eligible=True, top5=90.0, loss=1.0, sparsity=0.5):
    return tracker.step(epoch, top1, top5, loss, sparsity, nnz=1000, eligible=eligible)


def best_epochs(tracker: ScoreTracker) -> list[int]:
    return [score.epoch for score in tracker.best()]


def test_most_accurate_epoch_is_best():
    tracker = ScoreTracker()
    assert [step(tracker, e, top1) for e, top1 in enumerate((50, 70, 60))] == [True, True, False]
    assert best_epochs(tracker) == [1]


def test_defect_sparsest_epoch_is_not_best_for_being_sparsest():
    """DEFECT of Distiller: ranked by sparsity first, the latest epoch of a gradual pruning was always "best"."""
    tracker = ScoreTracker()
    step(tracker, 0, top1=91.0, sparsity=0.800)
    step(tracker, 1, top1=85.0, sparsity=0.805)
    assert best_epochs(tracker) == [0]


def test_before_the_final_sparsity_the_most_accurate_epoch_is_best():
    tracker = ScoreTracker()
    step(tracker, 0, top1=80, eligible=False)
    step(tracker, 1, top1=70, eligible=False)
    assert best_epochs(tracker) == [0]


def test_first_epoch_at_the_final_sparsity_replaces_more_accurate_ones_before_it():
    tracker = ScoreTracker()
    step(tracker, 0, top1=95, eligible=False)
    assert step(tracker, 1, top1=60, eligible=True)
    assert not step(tracker, 2, top1=99, eligible=False)
    assert best_epochs(tracker) == [1]


def test_equal_top1_is_decided_by_top5_then_by_loss():
    tracker = ScoreTracker(num_best_scores=3)
    step(tracker, 0, 50, top5=90, loss=1.0)
    step(tracker, 1, 50, top5=90, loss=0.5)
    step(tracker, 2, 50, top5=95, loss=2.0)
    assert best_epochs(tracker) == [2, 1, 0]


def test_earlier_of_two_equal_epochs_stays_best():
    tracker = ScoreTracker(num_best_scores=2)
    assert step(tracker, 0, 50)
    assert not step(tracker, 1, 50)
    assert best_epochs(tracker) == [0, 1]


SCORE = {
    "epoch": 0, "top1": 50.0, "top5": 90.0, "loss": 1.0, "sparsity": 0.5, "nnz": 10, "eligible": True
}  # fmt: skip
epochs = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=12)


@given(epochs, st.integers(1, 4))
def test_keeps_the_best_of_all_epochs_whatever_their_order(scores, keep):
    tracker = ScoreTracker(keep)
    for epoch, (top1, eligible) in enumerate(scores):
        step(tracker, epoch, top1, eligible=eligible)
    expected = sorted(range(len(scores)), key=lambda e: (not scores[e][1], -scores[e][0], e))[:keep]
    assert best_epochs(tracker) == expected


@given(epochs, st.integers(0, 12))
def test_resumed_tracker_goes_on_as_the_uninterrupted_one(scores, killed_after):
    whole, first, second = (ScoreTracker(2) for _ in range(3))
    answers = [step(whole, e, top1, eligible=eligible) for e, (top1, eligible) in enumerate(scores)]

    resumed_answers = []
    for epoch, (top1, eligible) in enumerate(scores):
        if epoch == killed_after:
            file = io.BytesIO()
            torch.save(first.state_dict(), file)
            file.seek(0)
            second.load_state_dict(torch.load(file, weights_only=True))
        tracker = first if epoch < killed_after else second
        resumed_answers.append(step(tracker, epoch, top1, eligible=eligible))
    assert resumed_answers == answers


def test_best_of_no_epochs_is_empty():
    assert ScoreTracker().best() == ()


def test_line_is_distillers():
    score = Score(epoch=7, top1=91.2345, top5=99.5, loss=0.3, sparsity=0.80126, nnz=53322, eligible=True)
    assert (
        score.line()
        == "==> Best [Top1: 91.234   Top5: 99.500   Sparsity:80.13   NNZ-Params: 53322 on epoch: 7]"
    )


def test_rule_says_what_best_means():
    assert ScoreTracker().rule == (
        "best: the epoch with the highest Top1 (then Top5, then the lowest loss) among the epochs in which "
        "pruning is complete (all epochs when nothing is pruned); until there is one, of those so far"
    )


def test_keeping_no_scores_is_refused():
    with pytest.raises(UsageError) as error:
        ScoreTracker(num_best_scores=0)
    assert str(error.value) == "num_best_scores: must be at least 1, got 0"


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({}, "best epochs: 'scores' must be a list of scores by name, got None"),
        ({"scores": [1]}, "best epochs: 'scores' must be a list of scores by name, got [1]"),
        ({"scores": [{}]}, "best epochs: scores[0].epoch: missing; Score needs it"),
        ({"scores": [{**SCORE, "top1": "x"}]}, "best epochs: scores[0].top1: must be a number, got 'x'"),
        (
            {"scores": [{**SCORE, "top2": 1}]},
            "best epochs: scores[0].top2: unknown to Score; did you mean 'top5'?",
        ),
    ],
)
def test_states_made_by_hand_are_refused_and_change_nothing(state, text):
    tracker = ScoreTracker()
    step(tracker, 0, 50)
    before = tracker.best()
    with pytest.raises(CheckpointError) as caught:
        tracker.load_state_dict(state)
    assert str(caught.value) == text
    assert tracker.best() == before
