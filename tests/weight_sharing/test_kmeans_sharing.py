"""The extension that shares weights by k-means: in a training loop, beside masks, across a restart."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distiller.config import dict_config
from distiller.errors import CheckpointError, DistillerError, ScheduleError
from distiller.quantization.codebook.kmeans_1d import kmeans_1d
from distiller.scheduler import CompressionScheduler
from distiller.weight_sharing.kmeans_sharing import KMeansWeightSharing

X, Y = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def schedule(start: int = 0, end: int = 4, **sharing) -> dict:
    return {
        "version": 1,
        "extensions": {"share": {"class": "KMeansWeightSharing", "bits": {"*.weight": 2}, **sharing}},
        "policies": [
            {
                "extension": {"instance_name": "share"},
                "starting_epoch": start,
                "ending_epoch": end,
                "frequency": 1,
            }
        ],
    }


def train(model, scheduler, optimizer, epochs, steps=3):
    for epoch in epochs:
        scheduler.on_epoch_begin(epoch, optimizer)
        for step in range(steps):
            scheduler.on_minibatch_begin(epoch, step, steps, optimizer)
            loss = nn.functional.cross_entropy(model(X), Y)
            loss = scheduler.before_backward_pass(epoch, step, steps, loss, optimizer)
            optimizer.zero_grad()
            loss.backward()
            scheduler.before_parameter_optimization(epoch, step, steps, optimizer)
            optimizer.step()
            scheduler.on_minibatch_end(epoch, step, steps, optimizer)
        scheduler.on_epoch_end(epoch, optimizer, {"loss": 1.0, "top1": 50.0})


def set_up(plan):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    return model, optimizer, dict_config(model, optimizer, plan)


def distinct(tensor):
    return len(tensor.detach().unique())


def test_weights_have_few_values_from_the_first_epoch_on_and_biases_as_many_as_before():
    model, optimizer, scheduler = set_up(schedule(start=1))
    train(model, scheduler, optimizer, [0])
    assert distinct(model[0].weight) == 48
    train(model, scheduler, optimizer, [1, 2])
    assert [distinct(model[index].weight) for index in (0, 2)] == [4, 4]
    assert distinct(model[0].bias) == 8


def test_values_are_those_of_kmeans():
    model, optimizer, scheduler = set_up(schedule())
    before = model[0].weight.detach().clone()
    scheduler.on_epoch_begin(0, optimizer)
    scheduler.on_minibatch_begin(0, 0, 3, optimizer)
    expected = kmeans_1d(before.flatten().double().numpy()[None], 4)[0]
    torch.testing.assert_close(model[0].weight.detach().unique().double(), torch.from_numpy(expected))


def test_training_is_that_of_centroids_whose_gradient_is_divided_by_their_elements():
    model, optimizer, scheduler = set_up(schedule())
    scheduler.on_epoch_begin(0, optimizer)
    scheduler.on_minibatch_begin(0, 0, 3, optimizer)
    reference = copy.deepcopy(model)
    values, places = reference[0].weight.detach().unique(return_inverse=True)
    centroids, counts = values.clone().requires_grad_(), places.flatten().bincount()
    steps = 3
    velocity = torch.zeros_like(centroids)
    # The second layer is left as it is: its steps are not of interest here.
    model[2].requires_grad_(False)
    model[0].bias.requires_grad_(False)
    for step in range(steps):
        scheduler.on_minibatch_begin(0, step, steps, optimizer)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        scheduler.before_parameter_optimization(0, step, steps, optimizer)
        optimizer.step()
        scheduler.on_minibatch_end(0, step, steps, optimizer)

        hidden = nn.functional.linear(X, centroids[places], reference[0].bias)
        loss = nn.functional.cross_entropy(reference[2](hidden.relu()), Y)
        (gradient,) = torch.autograd.grad(loss, centroids)
        with torch.no_grad():
            velocity = 0.9 * velocity + gradient / counts + 1e-3 * centroids
            centroids -= 0.1 * velocity
    torch.testing.assert_close(model[0].weight.detach(), centroids.detach()[places])


def test_what_is_pruned_after_sharing_counts_no_more():
    model, optimizer, scheduler = set_up(schedule())
    train(model, scheduler, optimizer, [0])
    mask = torch.ones_like(model[0].weight)
    mask[:4] = 0
    scheduler.masks.put("0.weight", mask)
    train(model, scheduler, optimizer, [1])
    with scheduler.masked():
        weight = model[0].weight.detach()
        assert (weight[:4] == 0).all()
        assert distinct(weight[4:]) <= 4
        (policy,) = [entry.policy for entry in scheduler.policies]
        shared = policy.shared["0.weight"]
        expected = shared.values.float()[shared.codes["0.weight"].long()]
        assert torch.equal(weight[4:], expected[4:])


def test_what_is_masked_stays_zero_and_is_no_value():
    plan = schedule(start=1)
    plan["pruners"] = {"level": {"class": "SparsityLevelParameterPruner", "levels": {"0.weight": 0.5}}}
    plan["policies"].append(
        {"pruner": {"instance_name": "level"}, "starting_epoch": 0, "ending_epoch": 4, "frequency": 1}
    )
    model, optimizer, scheduler = set_up(plan)
    train(model, scheduler, optimizer, range(3))
    with scheduler.masked():
        weight = model[0].weight.detach()
        assert int((weight == 0).sum()) == 24
        assert distinct(weight[weight != 0]) == 4


def test_a_resumed_training_is_bit_equal():
    whole, optimizer, scheduler = set_up(schedule())
    train(whole, scheduler, optimizer, range(4))
    first, first_optimizer, first_scheduler = set_up(schedule())
    train(first, first_scheduler, first_optimizer, range(2))
    second, second_optimizer, second_scheduler = set_up(schedule())
    second.load_state_dict(first.state_dict())
    second_optimizer.load_state_dict(first_optimizer.state_dict())
    second_scheduler.load_state_dict(first_scheduler.state_dict())
    train(second, second_scheduler, second_optimizer, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_codes_follow_thinning():
    model = make_model()
    sharing = KMeansWeightSharing("share", model, {"0.weight": 1})
    scheduler = CompressionScheduler(model)
    scheduler.add_policy(sharing, [0, 1])
    scheduler.on_minibatch_begin(0, 0, 1, torch.optim.SGD(model.parameters(), lr=0.1))
    codes = sharing.shared["0.weight"].codes["0.weight"]
    sharing.follow_thinning({"0.weight": {0: (1, 3)}, "2.weight": {1: (1, 3)}})
    assert torch.equal(sharing.shared["0.weight"].codes["0.weight"], codes[[1, 3]])


def test_more_bits_than_codes_have_are_refused_with_their_line():
    with pytest.raises(ScheduleError, match=r"must be at most 7, got 8"):
        set_up(schedule(bits={"*.weight": 8}))


def test_an_unknown_name_is_refused():
    with pytest.raises(ScheduleError, match="'0.wieght'"):
        set_up(schedule(bits={"0.wieght": 2}))


def test_bits_out_of_range_are_refused_from_python():
    with pytest.raises(DistillerError, match=r"^bits\['\*'\] must be 1 or more, got 0$"):
        KMeansWeightSharing("share", make_model(), {"*": 0})


def test_weights_that_are_not_finite_are_refused():
    model, optimizer, scheduler = set_up(schedule())
    model[0].weight.data[0, 0] = float("nan")
    scheduler.on_epoch_begin(0, optimizer)
    message = "'share': '0.weight' has values that are not finite, which have no nearest value; "
    with pytest.raises(DistillerError, match=message):
        scheduler.on_minibatch_begin(0, 0, 3, optimizer)


def test_codes_of_another_schedule_are_refused():
    sharing = KMeansWeightSharing("share", make_model(), {"0.weight": 1})
    with pytest.raises(CheckpointError, match=r"has codes of '2.weight', which 'share' does not share"):
        sharing.load_state_dict({"shared": {"2.weight": {}}})


def test_describe_tells_the_widths():
    _, optimizer, scheduler = set_up(schedule())
    (line,) = scheduler.describe(0, optimizer)
    assert line.endswith("KMeansWeightSharing: 0.weight (2 bits), 2.weight (2 bits)")
