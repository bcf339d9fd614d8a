from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distiller.channel_groups import find_channel_groups
from distiller.errors import UsageError
from distiller.greedy import greedy_candidates, greedy_filter_pruning, unit_densities
from tests.channel_groups.cutting import cut

IMAGE = torch.zeros(1, 1, 8, 8)


class Trainer:
    """Does nothing, and remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, float]] = []
        self.models: list[nn.Module] = []

    def __call__(self, model, scheduler, iteration, density):
        assert scheduler.model is model
        self.models.append(model)
        self.calls.append((iteration, density))


def count_filters(name: str):
    """An accuracy that falls only when filters of other layers than `name` are zero."""

    def evaluate(model):
        zeros = sum(
            int((param.flatten(1).abs().sum(1) == 0).sum())
            for other, param in model.named_parameters()
            if param.dim() == 4 and other != name
        )
        return 90.0 - zeros, 99.0, 0.5

    return evaluate


@pytest.fixture
def groups(tiny_cnn):
    return find_channel_groups(tiny_cnn, IMAGE)


def run(model, groups, evaluate, density=0.5, **more):
    trainer = Trainer()
    return list(greedy_filter_pruning(model, groups, density, trainer, evaluate, **more)), trainer


def test_the_group_that_costs_the_least_accuracy_goes_first(tiny_cnn, groups):
    found, _ = run(tiny_cnn, groups, count_filters("conv2.weight"), 0.72)
    assert {step.group for step in found} == {"conv2.weight"}
    assert [len(step.removed["conv2.weight"]) for step in found] == [1, 2]


def test_it_ends_at_the_target_and_not_before(tiny_cnn, groups):
    found, _ = run(tiny_cnn, groups, count_filters("conv1.weight"), 0.5)
    assert found[-1].density <= 0.5 < found[-2].density
    assert [step.iteration for step in found] == list(range(len(found)))


def test_macs_are_those_of_the_network_without_the_masked_units(tiny_cnn, groups):
    from distiller.macs import count_macs

    for step in run(tiny_cnn, groups, count_filters("conv2.weight"), 0.4)[0]:
        smaller = cut(tiny_cnn, groups, step.removed)
        assert step.macs == sum(layer.macs for layer in count_macs(smaller, IMAGE))
        assert step.density == step.macs / groups.macs()


def test_an_iteration_takes_the_weakest_of_what_is_left(tiny_cnn, groups):
    with torch.no_grad():
        for i, scale in enumerate((6, 1, 5, 2, 4, 3)):
            tiny_cnn.conv2.weight[i] = scale
    found, _ = run(tiny_cnn, groups, count_filters("conv2.weight"), 0.4, step=0.5)
    assert [step.removed["conv2.weight"] for step in found[:2]] == [[1, 3, 5], [1, 3, 4, 5]]


def test_the_model_given_stays_and_the_best_copy_is_masked(tiny_cnn, groups):
    before = copy.deepcopy(tiny_cnn.state_dict())
    found, trainer = run(tiny_cnn, groups, count_filters("conv2.weight"), 0.7)
    assert all(torch.equal(before[name], value) for name, value in tiny_cnn.state_dict().items())
    best = found[-1]
    assert best.model is best.scheduler.model
    with best.scheduler.masked():
        zeros = best.model.conv2.weight.flatten(1).abs().sum(1) == 0
    assert zeros.nonzero().flatten().tolist() == best.removed["conv2.weight"]
    assert all(model is not tiny_cnn for model in trainer.models)


def test_each_candidate_of_an_iteration_is_fine_tuned_once(tiny_cnn, groups):
    found, trainer = run(tiny_cnn, groups, count_filters("conv2.weight"), 0.7)
    densities = [1.0, *(step.density for step in found)]
    expected = [
        (step.iteration, density) for step, density in zip(found, densities, strict=False) for _ in range(2)
    ]
    assert trainer.calls == expected


@pytest.mark.parametrize(
    "scores", [[(80, 90, 1), (80, 91, 2)], [(80, 90, 1), (80, 90, 0.5)], [(79, 99, 0), (80, 1, 9)]]
)
def test_top1_decides_then_top5_then_the_loss(tiny_cnn, groups, scores):
    left = iter(scores)
    step = next(greedy_filter_pruning(tiny_cnn, groups, 0.99, Trainer(), lambda model: next(left)))
    assert step.group == "conv2.weight"  # the second candidate
    assert (step.top1, step.top5, step.loss) == scores[1]


def test_one_unit_of_each_group_stays(tiny_cnn, groups):
    found, _ = run(tiny_cnn, groups, count_filters("conv2.weight"), 0.001)
    assert unit_densities(greedy_candidates(tiny_cnn, groups), found[-1].removed) == {
        "conv1.weight": 0.25,
        "conv2.weight": pytest.approx(1 / 6),
    }


def test_going_on_is_the_same_as_never_having_stopped(tiny_cnn, groups):
    whole, _ = run(tiny_cnn, groups, count_filters("conv2.weight"), 0.4)
    begun = whole[1]
    rest, _ = run(begun.model, groups, count_filters("conv2.weight"), 0.4, removed=begun.removed, iteration=2)
    assert [(s.iteration, s.group, s.removed) for s in rest] == [
        (s.iteration, s.group, s.removed) for s in whole[2:]
    ]


@pytest.mark.parametrize("settings", [{"target_density": 0.0}, {"target_density": 1.0}, {"step": 1.0}])
def test_fractions_out_of_range_are_refused(tiny_cnn, groups, settings):
    [(name, value)] = settings.items()
    settings = {"target_density": 0.5, **settings}
    with pytest.raises(UsageError, match=f"greedy pruning: {name} must lie between 0 and 1, got {value:g}"):
        next(
            greedy_filter_pruning(
                tiny_cnn, groups, fine_tune=Trainer(), evaluate=lambda m: (1, 1, 1), **settings
            )
        )


def test_a_network_without_candidates_is_refused_with_the_reasons():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3), nn.Flatten())
    with pytest.raises(UsageError) as error:
        greedy_candidates(model, find_channel_groups(model, IMAGE))
    assert str(error.value) == (
        "greedy pruning: nothing of the network can be pruned: group_norm in 1 does not say which of its "
        "channels belong to which; the network returns it"
    )
