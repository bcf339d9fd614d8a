from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distiller.sensitivity.decisions import Decisions, Tally, right_answers


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
    assert Decisions.of(torch.tensor([row]), torch.tensor([label])).could_be_others(1e-4) == is_near


def test_fewer_than_five_classes():
    logits = torch.tensor([[1.0, 0.0, -2.0]])
    assert not Decisions.of(logits, torch.tensor([0])).could_be_others(1e-4)
    assert not Decisions.of(logits, torch.tensor([2])).could_be_others(1e-4)
    assert Tally.of(logits, torch.tensor([2])).top5 == 1


def test_decisions_of_parts_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(4)
    logits, labels = torch.randn(20, 7, generator=generator), torch.randint(7, (20,), generator=generator)
    whole = Decisions.of(logits, labels)
    found = Decisions.together(
        [Decisions.of(x, y) for x, y in zip(logits.split(6), labels.split(6), strict=True)]
    )
    assert torch.equal(found.is_right, right_answers(logits, labels))
    assert (found.distance, found.largest) == (whole.distance, whole.largest)
    assert replace(found.tally, loss=0.0) == replace(Tally.of(logits, labels), loss=0.0)
    assert found.tally.loss == pytest.approx(whole.tally.loss)


def test_the_largest_logit_of_all_images_is_what_an_error_is_relative_to():
    near, large = torch.tensor([[1.0, 0.999, 0.0]]), torch.tensor([[100.0, 0.0, 0.0]])
    label = torch.tensor([0])
    parts = [Decisions.of(logits, label) for logits in (near, large)]
    assert not parts[0].could_be_others(1e-4)
    assert Decisions.together(parts).could_be_others(1e-4)
    nan = Decisions.of(torch.tensor([[float("nan"), 1.0, 0.0]]), label)
    assert Decisions.together([nan, parts[1]]).could_be_others(1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_are_of_its_values_in_float32(dtype):
    logits = torch.tensor([[3.0, 1, 2], [0.0, 5, 4]]).to(dtype)
    labels = torch.tensor([1, 0])
    assert Tally.of(logits, labels) == Tally.of(logits.float(), labels)
