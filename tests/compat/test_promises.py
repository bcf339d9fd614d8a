"""What the tests of Distiller's schedules measure by: groups, promises and the epochs that matter."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import nn

from distiller.interfaces import Policy
from distiller.scheduler import CompressionScheduler
from tests.compat.distiller_schedules import DistillerSchedule
from tests.compat.promises import DroppedFilters, Level, Rates, SameChannels, Window, groups_of, zero_groups
from tests.compat.schedule_runs import epochs_that_matter

HEADER = """\
# Prunes filters.
# time python3 compress_classifier.py -a=resnet20_cifar ../../../data.cifar10 -p=50 --compress=../imagenet/x.yaml
#
# |    | Name                | Shape         |   NNZ (dense) |   NNZ (sparse) |   Cols (%) |
# |  0 | module.conv1.weight | (16, 3, 3, 3) |           432 |            400 |    0.00000 |
# |  1 | Total sparsity:     | -             |           432 |            400 |    0.00000 |
version: 1
"""
WINDOW = Window(range(0, 4, 2), 4)


def schedule_of(text: str, folder: Path) -> DistillerSchedule:
    path = folder / "schedule.yaml"
    path.write_text(text, encoding="utf-8")
    return DistillerSchedule(path)


def test_a_header_says_architecture_data_set_and_non_zeros(tmp_path):
    schedule = schedule_of(HEADER, tmp_path)
    assert (schedule.arch, schedule.dataset) == ("resnet20_cifar", "cifar10")
    assert schedule.header_table() == {"conv1.weight": ((16, 3, 3, 3), 400)}


def test_a_language_model_is_known_by_its_program_and_has_the_sizes_of_the_command(tmp_path):
    schedule = schedule_of("# python3 main.py --cuda --emsize 150 --nhid 150 --tied\n", tmp_path)
    assert (schedule.arch, schedule.dataset) == ("word_language_model", "wikitext2")
    shapes = {name: tuple(param.shape) for name, param in schedule.true_model().named_parameters()}
    assert shapes["encoder.weight"] == (33_278, 150)
    assert shapes["rnn.weight_hh_l1"] == (600, 150)
    assert "decoder.weight" not in shapes


def test_a_header_without_a_command_says_so(tmp_path):
    with pytest.raises(AssertionError, match="no command in the header"):
        _ = schedule_of("# Prunes filters.\n", tmp_path).arch


@pytest.mark.parametrize(
    ("kind", "block", "shape"),
    [
        ("elements", 1, (144, 1)),
        ("Filters", 1, (4, 36)),
        ("Channels", 1, (4, 36)),
        ("2D", 1, (16, 9)),
        ("4D", 1, (1, 144)),
        ("Blocks", 2, (72, 2)),
    ],
)
def test_groups_are_rows(kind, block, shape):
    assert groups_of(torch.zeros(4, 4, 3, 3), kind, block).shape == shape


@pytest.mark.parametrize(
    ("kind", "zeroed", "group"),
    [
        ("Filters", (2,), 2),
        ("Channels", (slice(None), 3), 3),
        ("2D", (1, 2), 6),
        # Kernels 2 and 3 of filter 1 at position (1, 1): the fourth pair of kernels, the fifth of 9 positions.
        ("Blocks", (1, slice(2, 4), 1, 1), 3 * 9 + 4),
    ],
)
def test_the_group_that_was_made_zero_is_the_one_that_is_counted(kind, zeroed, group):
    weight = torch.ones(4, 4, 3, 3)
    weight[zeroed] = 0
    assert zero_groups(weight, kind, 2).nonzero().flatten().tolist() == [group]


def test_rows_are_the_input_features_of_a_linear_layer():
    weight = torch.ones(2, 3)
    weight[:, 1] = 0
    assert zero_groups(weight, "Rows").tolist() == [False, True, False]


@pytest.mark.parametrize(("fraction", "promised"), [("0.29", 29), ("0.7", 70), ("0.005", 0), ("0.999", 99)])
def test_a_level_promises_the_whole_number_below(fraction, promised):
    assert Level(["w"], WINDOW, Fraction(fraction), "Filters").promised(torch.zeros(100, 2)) == promised


def test_a_broken_promise_is_seen():
    weight = torch.ones(10, 2)
    weight[:4] = 0
    (measured,) = Level(["w"], WINDOW, Fraction("0.5"), "Filters").measure({"w": weight})
    assert (measured.zero, measured.promised, measured.tolerance) == (4, 5, 0)


def test_a_follower_that_differs_from_its_leader_is_seen():
    leader, follower = torch.ones(2, 4), torch.ones(2, 4)
    leader[:, :2] = 0
    follower[:, 1:3] = 0
    promise = SameChannels(["a", "b"], WINDOW, Fraction("0.5"), "Channels")
    *levels, differing = promise.measure({"a": leader, "b": follower})
    assert [(row.zero, row.promised) for row in levels] == [(2, 2), (2, 2)]
    assert (differing.zero, differing.promised) == (2, 0)


def test_filters_that_stay_dropped_are_seen():
    promise = DroppedFilters(["w"], WINDOW, 0.25, 0.5)
    weight = torch.ones(100, 2)
    weight[:50] = 0
    for epoch in WINDOW.epochs:
        promise.forward(epoch, 0, {"w": weight})
    first, last, end = promise.measure({"w": weight})
    assert abs(first.zero - first.promised) > first.tolerance
    assert abs(last.zero - last.promised) <= last.tolerance
    assert (end.zero, end.promised) == (50, 0)


def test_rates_follow_the_absolute_epoch_and_stay_after_the_window():
    rates = Rates(
        {
            "lr_schedulers": {"lr": {"class": "StepLR", "step_size": 10, "gamma": 0.5}},
            "policies": [
                {
                    "lr_scheduler": {"instance_name": "lr"},
                    "starting_epoch": 9,
                    "ending_epoch": 20,
                    "frequency": 1,
                }
            ],
        }
    )
    assert [rates.after(epoch) for epoch in (8, 9, 18, 19, 40)] == [1, 0.5, 0.5, 0.25, 0.25]


def test_first_and_last_epochs_matter_and_the_one_after_the_last_promise():
    scheduler = CompressionScheduler(nn.Linear(2, 2))
    scheduler.add_policy(Policy(), starting_epoch=3, ending_epoch=100, frequency=10)
    scheduler.add_policy(Policy(), epochs=[20])
    assert epochs_that_matter(scheduler, []) == [3, 20, 93]
    assert epochs_that_matter(scheduler, [Level(["w"], WINDOW, Fraction(0))]) == [3, 20, 93]
    after = Level(["w"], Window([20], 21), Fraction(0))
    assert epochs_that_matter(scheduler, [after]) == [3, 20, 21, 93]
