from __future__ import annotations

import pytest
import torch

from distiller.sensitivity.decisions import Tally, near_ties, right_answers


def test_counts_and_loss_of_a_batch():
    logits = torch.tensor([[3.0, 1, 2, 0, -1, -2, -3], [0.0, 5, 4, 3, 2, 1, 9], [1.0, 2, 3, 4, 5, 6, 7]])
    labels = torch.tensor([0, 3, 0])
    tally = Tally.of(logits, labels)
    assert (tally.n, tally.top1, tally.top5) == (3, 1, 2)
    assert tally.loss == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    )
    assert right_answers(logits, labels).tolist() == [True, False, False]


def test_what_changed_from_the_dense_network():
    dense, now = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, True])
    tally = Tally(4, 3, 4, 1.0).against(dense, now)
    assert (tally.lost, tally.won) == (1, 2)
    assert tally + tally == Tally(8, 6, 8, 2.0, 2, 4)


@pytest.mark.parametrize(
    "row, label, is_near",
    [
        ([2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], 0, False),
        ([2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0], 0, True),
        ([2.0, 1.9999, 0.0, 0.0, 0.0, 0.0, 0.0], 0, True),
        ([2.0, 1.99, 0.0, 0.0, 0.0, 0.0, 0.0], 0, False),
        ([1.99995, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0], 0, True),
        ([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 0.0], 5, False),
        ([9.0, 8.0, 7.0, 6.0, 4.00001, 4.0, 0.0], 5, True),  # the fifth
        ([9.0, 8.99999, 7.0, 6.0, 5.0, 4.0, 0.0], 3, False),  # others are close to each other
        ([0.0] * 7, 3, True),
        ([float("nan"), 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], 1, True),
        ([float("inf"), 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], 1, True),
    ],
)
def test_where_a_small_error_could_change_a_decision(row, label, is_near):
    assert near_ties(torch.tensor([row]), torch.tensor([label]), 1e-4).tolist() == [is_near]


def test_fewer_than_five_classes():
    logits = torch.tensor([[1.0, 0.0, -2.0]])
    assert near_ties(logits, torch.tensor([0]), 1e-4).tolist() == [False]
    assert near_ties(logits, torch.tensor([2]), 1e-4).tolist() == [False]
    assert Tally.of(logits, torch.tensor([2])).top5 == 1
