"""The schedule extension: when it acts, what policies of other epochs may name, and what is refused."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from distiller.config import dict_config
from distiller.errors import PolicyConflictError, ScheduleError
from distiller.factorization import LowRankFactorization, LowRankPlusSparse
from distiller.factorization.replacement import factorizations_of
from distiller.names import named_parameters
from distiller.policy import PruningPolicy
from distiller.scheduler import CompressionScheduler
from tests.doubles import HalfPruner, train


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


LOW_RANK = {"class": "LowRankFactorization", "layers": {"conv2": {"rank": 3}, "fc": {"rank": 2}}}


def schedule(model, optimizer, epochs=(1,), low_rank=LOW_RANK, policies=(), **sections):
    return dict_config(
        model,
        optimizer,
        {
            "extensions": {"low_rank": low_rank, **sections.pop("extensions", {})},
            **sections,
            "policies": [
                *policies,
                {"extension": {"instance_name": "low_rank"}, "epochs": list(epochs)},
            ],
        },
    )


def faults(*args, **kwargs):
    with pytest.raises(ScheduleError) as error:
        schedule(*args, **kwargs)
    return [fault.text for fault in error.value.faults]


def level(name, value=0.5):
    return {"class": "SparsityLevelParameterPruner", "levels": {name: value}}


def prune(name, *epochs):
    return {"pruner": {"instance_name": name}, "epochs": list(epochs)}


def test_it_acts_when_its_first_epoch_begins_and_never_again(tiny_cnn, caplog):
    optimizer = adam(tiny_cnn)
    scheduler = schedule(tiny_cnn, optimizer, [1, 2])
    train(tiny_cnn, scheduler, [0], optimizer)
    whole = copy.deepcopy(tiny_cnn)
    with caplog.at_level(logging.INFO, "distiller.factorization"):
        scheduler.on_epoch_begin(1, optimizer)
    assert [type(own) for own in tiny_cnn.conv2] == [nn.Conv2d, nn.Conv2d]
    assert "conv2: channel of rank 3" in caplog.text
    x = torch.randn(2, 1, 8, 8)
    tiny_cnn.eval(), whole.eval()
    difference = (tiny_cnn(x) - whole(x)).norm() / whole(x).norm()
    assert 0 < difference < 1
    names = [name for name, _ in tiny_cnn.named_parameters()]
    scheduler.on_epoch_begin(2, optimizer)
    assert [name for name, _ in tiny_cnn.named_parameters()] == names
    assert len(factorizations_of(tiny_cnn)) == 1


def test_what_the_optimizer_keeps_of_other_parameters_stays(tiny_cnn):
    optimizer = adam(tiny_cnn)
    scheduler = schedule(tiny_cnn, optimizer)
    tiny_cnn(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    kept = optimizer.state[tiny_cnn.conv1.weight]["exp_avg"].clone()
    steps = optimizer.state[tiny_cnn.fc.bias]["step"]
    scheduler.on_epoch_begin(1, optimizer)
    assert torch.equal(optimizer.state[tiny_cnn.conv1.weight]["exp_avg"], kept)
    assert optimizer.state[tiny_cnn.fc.second.bias]["step"] is steps
    assert list(optimizer.param_groups[0]["params"]) == list(tiny_cnn.parameters())


def test_policies_before_and_after_name_the_parameters_of_their_epochs(tiny_cnn):
    optimizer = torch.optim.SGD(tiny_cnn.parameters(), lr=0.1, momentum=0.9)
    scheduler = schedule(
        tiny_cnn,
        optimizer,
        policies=[prune("after", 1, 2), prune("before", 0)],
        pruners={"before": level("conv2.weight"), "after": level("conv2.first.weight")},
        lr_schedulers={"lr": {"class": "StepLR", "step_size": 1, "gamma": 0.5}},
    )
    assert scheduler.idle_notes(0, 3) == []
    assert "conv2.first.weight" in scheduler.describe(1)[0]
    scheduler.on_epoch_begin(0, optimizer)
    assert set(scheduler.masks.masked()) == {"conv2.weight"}
    scheduler.on_epoch_begin(1, optimizer)
    assert set(scheduler.masks.masked()) == {"conv2.first.weight"}
    scheduler.on_minibatch_begin(1, 0, 2, optimizer)
    assert float((tiny_cnn.conv2.first.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.05)


def test_a_name_of_later_that_is_not_foreseen_is_refused(tiny_cnn):
    assert faults(
        tiny_cnn,
        adam(tiny_cnn),
        policies=[prune("after", 1, 2)],
        pruners={"after": level("conv2.third.weight")},
    ) == [
        "no parameter 'conv2.third.weight' in the model; did you mean 'conv2.first.weight'? (of epoch 1: "
        "'low_rank' replaces layers in epoch 1)"
    ]


GONE = "no parameter 'conv2.weight' in the model; did you mean 'conv2.first.weight'?"


def test_a_name_that_is_gone_by_then_is_refused(tiny_cnn):
    assert faults(
        tiny_cnn, adam(tiny_cnn), policies=[prune("after", 2)], pruners={"after": level("conv2.weight")}
    ) == [f"{GONE} (of epoch 2: 'low_rank' replaces layers in epoch 1)"]


def test_a_policy_on_both_sides_of_what_is_replaced_is_refused(tiny_cnn):
    for name in ("conv2.weight", "*.weight"):
        texts = faults(tiny_cnn, adam(tiny_cnn), policies=[prune("p", 0, 1)], pruners={"p": level(name)})
        assert texts[-1] in (
            f"{GONE} (of epoch 1: 'low_rank' replaces layers in epoch 1)",
            "'pruner p' (epochs 0..1) acts on 'conv2.weight', and 'low_rank' replaces layers in epoch 1; let "
            "it end before epoch 1, and give what comes after a policy of its own, which names the new "
            "parameters",
        )


def test_a_policy_on_both_sides_of_other_layers_goes_on(tiny_cnn):
    optimizer = adam(tiny_cnn)
    scheduler = schedule(
        tiny_cnn,
        optimizer,
        policies=[prune("p", 0, 1, 2)],
        pruners={"p": level("conv1.weight")},
        regularizers={},
    )
    train(tiny_cnn_with_conv2(tiny_cnn), scheduler, range(3), optimizer)
    assert set(scheduler.masks.masked()) == {"conv1.weight"}


def tiny_cnn_with_conv2(model):
    """`train` looks at conv2.weight, which is gone: give it something to look at."""

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model
            self.conv2 = nn.Linear(1, 1)

        def forward(self, x):
            return self.inner(x)

    return Watched()


@pytest.mark.parametrize("first", ["pruner", "low rank"])
def test_from_python_both_orders_of_adding_are_checked(tiny_cnn, first):
    scheduler = CompressionScheduler(tiny_cnn)
    low_rank = LowRankFactorization("low_rank", {"conv2": {"rank": 3}})
    pruning = PruningPolicy(HalfPruner("conv2.weight"))
    with pytest.raises(PolicyConflictError, match=r"acts on 'conv2.weight', and 'low_rank' replaces layers"):
        if first == "pruner":
            scheduler.add_policy(pruning, epochs=[0, 1, 2])
            scheduler.add_policy(low_rank, epochs=[1])
        else:
            scheduler.add_policy(low_rank, epochs=[1])
            scheduler.add_policy(pruning, epochs=[0, 1, 2])


def test_a_quantizer_in_the_same_schedule_is_refused_before_it_touches_the_model(tiny_cnn):
    names = [name for name, _ in tiny_cnn.named_modules()]
    texts = faults(
        tiny_cnn,
        adam(tiny_cnn),
        policies=[{"quantizer": {"instance_name": "q"}, "epochs": [2, 3]}],
        quantizers={"q": {"class": "DorefaQuantizer", "bits_weights": 4}},
    )
    assert texts[0] == (
        "prepares the model when the schedule is read, and 'low_rank' replaces layers later; do it in two "
        "runs: give the checkpoint of 'low_rank' to the quantizer's schedule, with --exp-load-weights-from"
    )
    assert names == [name for name, _ in tiny_cnn.named_modules()]


def test_a_rewinder_of_the_first_weights_is_refused_afterwards(tiny_cnn):
    texts = faults(
        tiny_cnn,
        adam(tiny_cnn),
        extensions={"r": {"class": "WeightRewinder"}},
        policies=[{"extension": {"instance_name": "r"}, "epochs": [2]}],
    )
    assert texts == [
        "the weights that the run started with are of the model before its layers are replaced; give "
        "'late: true', or rewind before that epoch"
    ]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"layers": {"conv3": {"rank": 2}}}, "no layer 'conv3' in the model; did you mean 'conv2'?"),
        ({"layers": {"conv2": {"rank": 9}}}, "layers: 'conv2': rank must be at least 1 and at most 6, got 9"),
        (
            {"layers": {"conv2": {"rank": 6}}, "above_break_even": "refuse"},
            "layers: 'conv2': rank 6 of form channel would not make it smaller; break-even rank 5: give a "
            "lower one, or above_break_even: keep",
        ),
        (
            {"layers": {"conv2": {"form": "cp"}}},
            "'form' must be one of svd, channel, spatial, tucker2, got 'cp'",
        ),
        ({"macs": 0.5, "parameters": 0.5}, "both 'parameters' and 'macs' given; give one"),
        ({"macs": 1.0}, "must be more than 0 and less than 1, got 1.0"),
        (
            {"layers": {"conv2": {"rank": 2, "whitened": True}}},
            "'whitened' needs two epochs, got one: inputs are collected in the first, and layers are factored at "
            "the beginning of the second",
        ),
    ],
)
def test_settings_that_cannot_be_are_told_before_training(tiny_cnn, settings, text):
    (told,) = faults(tiny_cnn, adam(tiny_cnn), low_rank={"class": "LowRankFactorization", **settings})
    assert told == text


def test_whitened_layers_are_factored_in_the_second_epoch_by_what_the_first_has_seen(tiny_cnn):
    optimizer = adam(tiny_cnn)
    low_rank = {
        "class": "LowRankFactorization",
        "layers": {"conv2": {"rank": 2, "whitened": True}},
        "calibration_batches": 1,
    }
    scheduler = schedule(tiny_cnn, optimizer, [0, 1], low_rank)
    seen = []
    tiny_cnn.conv2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    train(tiny_cnn, scheduler, [0], optimizer)
    (moments,) = scheduler.policies[0].policy.state_dict()["moments"].values()
    patches = nn.functional.unfold(seen[0], 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    torch.testing.assert_close(moments, patches.T @ patches, rtol=1e-4, atol=1e-4)
    scheduler.on_epoch_begin(1, optimizer)
    assert tiny_cnn.conv2.first.weight.shape == (2, 4, 3, 3)
    assert scheduler.policies[0].policy.state_dict() == {"moments": {}}


def test_a_resumed_schedule_takes_the_factored_model_as_it_is(tiny_cnn, caplog):
    sections = {
        "policies": [prune("before", 0), prune("after", 2)],
        "pruners": {"before": level("conv2.weight"), "after": level("conv2.*.weight")},
    }
    optimizer = adam(tiny_cnn)
    scheduler = schedule(tiny_cnn, optimizer, **sections)
    scheduler.on_epoch_begin(0, optimizer)
    scheduler.on_epoch_begin(1, optimizer)
    state = scheduler.state_dict()
    before = dict(named_parameters(tiny_cnn))
    again_optimizer = adam(tiny_cnn)
    again = schedule(tiny_cnn, again_optimizer, **sections)
    again.load_state_dict(state)
    with caplog.at_level(logging.INFO, "distiller.factorization"):
        again.on_epoch_begin(1, again_optimizer)
    assert "'low_rank': the layers are factored already, nothing is done" in caplog.text
    assert {name: id(param) for name, param in before.items()} == {
        name: id(param) for name, param in named_parameters(tiny_cnn)
    }
    again.on_epoch_begin(2, again_optimizer)
    assert set(again.masks.masked()) == {"conv2.first.weight", "conv2.second.weight"}


def test_two_factorizations_one_after_the_other(tiny_cnn):
    optimizer = adam(tiny_cnn)
    scheduler = dict_config(
        tiny_cnn,
        optimizer,
        {
            "extensions": {
                "one": {"class": "LowRankFactorization", "layers": {"fc": {"rank": 2}}},
                "two": {"class": "LowRankFactorization", "layers": {"conv2": {"rank": 2, "sparse": 0.1}}},
            },
            "pruners": {"p": level("conv2.sparse.weight", 0.95), "q": level("fc.first.weight")},
            "policies": [
                prune("p", 3),
                prune("q", 1, 2, 3),
                {"extension": {"instance_name": "two"}, "epochs": [2]},
                {"extension": {"instance_name": "one"}, "epochs": [1]},
            ],
        },
    )
    for epoch in range(4):
        scheduler.on_epoch_begin(epoch, optimizer)
    assert isinstance(tiny_cnn.conv2, LowRankPlusSparse)
    assert [[layer.name for layer in own.layers] for own in factorizations_of(tiny_cnn)] == [
        ["fc"],
        ["conv2"],
    ]
    assert set(scheduler.masks["conv2.sparse.weight"].slots) == {"pruner", "sparse part"}


def test_it_describes_what_it_does_in_each_epoch(tiny_cnn):
    scheduler = schedule(
        tiny_cnn,
        adam(tiny_cnn),
        [0, 1, 2],
        {"class": "LowRankFactorization", "layers": {"conv2": {"whitened": True}}, "macs": 0.9},
    )
    assert [scheduler.describe(epoch) for epoch in range(3)] == [
        ["extension low_rank: LowRankFactorization: collects what the layers read, of conv2"],
        [
            "extension low_rank: LowRankFactorization: factors conv2 to 90.0% of the macs before the first "
            "mini-batch"
        ],
        ["extension low_rank: LowRankFactorization: has factored conv2"],
    ]
    assert [scheduler.pruning_is_complete(epoch) for epoch in range(3)] == [False, True, True]
