"""Rewinding: which weights come back when, under which masks, and what else begins anew."""

from __future__ import annotations

import copy
import io
import logging
from itertools import pairwise

import pytest
import torch
from torch import nn

from distiller.apputils.checkpoint import save_checkpoint
from distiller.apputils.rewind import WeightRewinder, kept_weights, put_back
from distiller.config import dict_config
from distiller.errors import CheckpointError, DistillerError, ScheduleError
from distiller.interfaces import EpochWindow, StepContext
from distiller.masks import MaskStore
from distiller.policy import PruningPolicy
from distiller.pruning import SparsityLevelParameterPruner
from distiller.scheduler import CompressionScheduler
from tests.doubles import train


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def states_at_first_batch(model, scheduler, optimizer, epochs):
    """The model's state right before the first forward pass of each epoch; trains on."""
    seen = {}

    def look(epoch):
        def hook(module, inputs):
            seen.setdefault(epoch, {name: value.clone() for name, value in module.state_dict().items()})

        return hook

    for epoch in epochs:
        handle = model.register_forward_pre_hook(look(epoch))
        train(model, scheduler, [epoch], optimizer)
        handle.remove()
    return seen


def same(state, other) -> bool:
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def scheduled(model, rewinder, epochs, levels=(), level_epochs=()):
    """A scheduler with the rewinder before the pruner: their order in the schedule does not matter."""
    scheduler = CompressionScheduler(model)
    scheduler.add_policy(rewinder, epochs=epochs)
    for level, epoch in zip(levels, level_epochs, strict=True):
        pruner = SparsityLevelParameterPruner("p", {"conv2.weight": level})
        scheduler.add_policy(PruningPolicy(pruner), epochs=[epoch])
    return scheduler


def test_each_epoch_of_its_policy_begins_with_the_weights_of_the_beginning(tiny_cnn):
    before = copy.deepcopy(tiny_cnn.state_dict())
    scheduler = scheduled(tiny_cnn, WeightRewinder("r", tiny_cnn), [1, 3])
    seen = states_at_first_batch(tiny_cnn, scheduler, sgd(tiny_cnn), range(4))
    assert [same(seen[epoch], before) for epoch in range(4)] == [True, True, False, True]


def test_statistics_of_batch_norms_go_back_too(tiny_cnn):
    scheduler = scheduled(tiny_cnn, WeightRewinder("r", tiny_cnn), [2])
    seen = states_at_first_batch(tiny_cnn, scheduler, sgd(tiny_cnn), range(3))
    assert int(seen[1]["bn1.num_batches_tracked"]) == 2
    assert int(seen[2]["bn1.num_batches_tracked"]) == 0
    assert seen[2]["bn1.running_mean"].eq(0).all()


def test_masks_are_of_the_trained_weights_and_zero_the_early_ones(tiny_cnn):
    before = copy.deepcopy(tiny_cnn.state_dict())
    scheduler = scheduled(tiny_cnn, WeightRewinder("r", tiny_cnn), [1], [0.5], [1])
    optimizer = sgd(tiny_cnn)
    train(tiny_cnn, scheduler, [0], optimizer)
    trained = tiny_cnn.conv2.weight.detach().clone()
    seen = states_at_first_batch(tiny_cnn, scheduler, optimizer, [1])[1]
    mask = trained.abs() > trained.abs().flatten().sort().values[trained.numel() // 2 - 1]
    assert not torch.equal(mask, before["conv2.weight"].abs() > before["conv2.weight"].abs().median())
    assert torch.equal(seen["conv2.weight"], before["conv2.weight"] * mask)
    assert torch.equal(seen["conv1.weight"], before["conv1.weight"])


def test_iterative_magnitude_pruning_prunes_more_from_round_to_round(tiny_cnn):
    before = copy.deepcopy(tiny_cnn.state_dict())
    levels, rounds = [0.25, 0.5, 0.75], [1, 2, 3]
    scheduler = scheduled(tiny_cnn, WeightRewinder("r", tiny_cnn), rounds, levels, rounds)
    seen = states_at_first_batch(tiny_cnn, scheduler, sgd(tiny_cnn), range(5))
    zeros = [seen[epoch]["conv2.weight"] == 0 for epoch in rounds]
    assert [zero.float().mean().item() for zero in zeros] == pytest.approx(levels, abs=0.01)
    for less, more in pairwise(zeros):
        assert not (less & ~more).any()  # a ticket is part of the one before
    for epoch, zero in zip(rounds, zeros, strict=True):
        assert torch.equal(seen[epoch]["conv2.weight"], before["conv2.weight"] * ~zero)
    assert (tiny_cnn.conv2.weight == 0).float().mean().item() == pytest.approx(0.75, abs=0.01)


def test_a_mask_of_an_earlier_epoch_is_on_the_early_weights_in_the_first_forward_pass(tiny_cnn):
    scheduler = scheduled(tiny_cnn, WeightRewinder("r", tiny_cnn), [3], [0.5], [0])
    seen = states_at_first_batch(tiny_cnn, scheduler, sgd(tiny_cnn), range(4))
    assert (seen[3]["conv2.weight"] == 0).float().mean().item() == 0.5


@pytest.mark.parametrize(
    "args", [{"mask_on_forward_only": True}, {"mask_on_forward_only": True, "use_double_copies": True}]
)
def test_dense_copies_behind_a_mask_are_rewound(tiny_cnn, args):
    before = tiny_cnn.conv2.weight.detach().clone()
    scheduler = CompressionScheduler(tiny_cnn)
    pruner = SparsityLevelParameterPruner("p", {"conv2.weight": 0.5})
    scheduler.add_policy(PruningPolicy(pruner, args), starting_epoch=0, ending_epoch=3)
    scheduler.add_policy(WeightRewinder("r", tiny_cnn), epochs=[2])
    optimizer = torch.optim.SGD(tiny_cnn.parameters(), lr=0.0)  # what is put back stays
    with torch.no_grad():
        tiny_cnn.conv2.weight.add_(1)
    train(tiny_cnn, scheduler, range(2), optimizer)
    seen = states_at_first_batch(tiny_cnn, scheduler, optimizer, [2])[2]["conv2.weight"]
    mask = scheduler.masks["conv2.weight"].mask
    assert mask is not None
    assert torch.equal(seen, before * mask)
    dense = before if "use_double_copies" in args else before * mask
    assert torch.equal(tiny_cnn.conv2.weight, dense)


@pytest.mark.parametrize("make", [sgd, lambda model: torch.optim.Adam(model.parameters())])
def test_the_optimizer_begins_anew_and_keeps_its_learning_rate(tiny_cnn, make):
    scheduler = scheduled(tiny_cnn, WeightRewinder("r", tiny_cnn), [1])
    optimizer = make(tiny_cnn)
    train(tiny_cnn, scheduler, [0], optimizer)
    optimizer.param_groups[0]["lr"] = 0.03125
    assert optimizer.state
    scheduler.on_epoch_begin(1, optimizer)
    scheduler.on_minibatch_begin(1, 0, 2, optimizer)
    assert not optimizer.state
    scheduler.on_minibatch_begin(1, 1, 2, optimizer)
    train(tiny_cnn, scheduler, [1], optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.03125


def test_weights_are_put_back_before_the_first_mini_batch_only(tiny_cnn):
    scheduler = scheduled(tiny_cnn, WeightRewinder("r", tiny_cnn), [0])
    before = copy.deepcopy(tiny_cnn.state_dict())
    train(tiny_cnn, scheduler, [0], sgd(tiny_cnn))
    assert not same(tiny_cnn.state_dict(), before)


def test_late_rewinding_goes_back_to_the_beginning_of_the_first_epoch_of_the_policy(tiny_cnn):
    scheduler = scheduled(tiny_cnn, WeightRewinder("r", tiny_cnn, late=True), [1, 2, 4])
    seen = states_at_first_batch(tiny_cnn, scheduler, sgd(tiny_cnn), range(5))
    assert [same(seen[epoch], seen[1]) for epoch in range(5)] == [False, True, True, False, True]


def test_the_weights_of_a_checkpoint_are_put_back(tiny_cnn, tmp_path):
    path = save_checkpoint(0, "tiny", tiny_cnn, dir=tmp_path, name="untrained")
    early = copy.deepcopy(tiny_cnn.state_dict())
    with torch.no_grad():
        for param in tiny_cnn.parameters():
            param.add_(1)
    rewinder = WeightRewinder("r", tiny_cnn, checkpoint=str(path))
    assert not same(tiny_cnn.state_dict(), early)  # not before its epoch
    path.unlink()
    seen = states_at_first_batch(tiny_cnn, scheduled(tiny_cnn, rewinder, [0]), sgd(tiny_cnn), [0])
    assert same(seen[0], early)


def test_a_wrapped_model_is_rewound(tiny_cnn):
    wrapped = nn.DataParallel(tiny_cnn, device_ids=[])
    weights = kept_weights(wrapped)
    assert list(weights) == list(tiny_cnn.state_dict())
    before = copy.deepcopy(tiny_cnn.state_dict())
    with torch.no_grad():
        tiny_cnn.fc.weight.zero_()
    put_back(wrapped, weights)
    assert same(tiny_cnn.state_dict(), before)


def test_kept_weights_are_copies(tiny_cnn):
    weights = kept_weights(tiny_cnn)
    with torch.no_grad():
        tiny_cnn.fc.weight.zero_()
    assert weights["fc.weight"].abs().sum() > 0
    assert not any(value.requires_grad for value in weights.values())


# ------------------------------------------------------------------------- the state


def saved_and_read(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("resumed_at", [1, 2, 3])
def test_a_resumed_training_goes_on_as_if_it_had_not_been_interrupted(tiny_cnn, late, resumed_at):
    def parts(model):
        rewinder = WeightRewinder("r", model, late=late)
        return scheduled(model, rewinder, [1, 2, 3], [0.5], [2]), sgd(model)

    whole = copy.deepcopy(tiny_cnn)
    scheduler, optimizer = parts(whole)
    torch.manual_seed(3)
    train(whole, scheduler, range(4), optimizer)

    killed = copy.deepcopy(tiny_cnn)
    scheduler, optimizer = parts(killed)
    torch.manual_seed(3)
    train(killed, scheduler, range(resumed_at), optimizer)
    states = saved_and_read([killed.state_dict(), optimizer.state_dict(), scheduler.state_dict()])

    resumed = copy.deepcopy(tiny_cnn)
    resumed.load_state_dict(states[0])  # before the schedule is loaded, as the program does
    scheduler, optimizer = parts(resumed)
    optimizer.load_state_dict(states[1])
    scheduler.load_state_dict(states[2])
    train(resumed, scheduler, range(resumed_at, 4), optimizer)
    assert same(resumed.state_dict(), whole.state_dict())


def test_before_late_weights_are_kept_its_state_says_that_there_are_none(tiny_cnn):
    rewinder = WeightRewinder("r", tiny_cnn, late=True)
    assert rewinder.state_dict() == {"weights": None}
    other = WeightRewinder("r", tiny_cnn)
    other.load_state_dict(rewinder.state_dict())
    assert other.state_dict() == {"weights": None}


def test_a_state_of_another_model_is_refused(tiny_cnn):
    rewinder = WeightRewinder("r", tiny_cnn)
    for wrong in ({}, rewinder.state_dict()["weights"] | {"fc.weight": torch.zeros(1)}):
        with pytest.raises(CheckpointError) as caught:
            rewinder.load_state_dict({"weights": wrong})
        assert str(caught.value) == (
            "the weights that 'r' puts back are of another model than this one; resume with the same model"
        )


# --------------------------------------------------------------------------- messages


def context(model, epoch, *epochs):
    return StepContext(model, MaskStore(model), None, EpochWindow(epochs), epoch, 0, 2)


@pytest.mark.parametrize(
    "late, epoch, epochs, told",
    [
        (False, 4, (4, 8), "begins with the weights that the run started with"),
        (True, 4, (4, 8), "keeps the weights that it begins with, for the policy's later epochs"),
        (True, 8, (4, 8), "begins with the weights that epoch 4 began with"),
        (True, 4, (4,), "keeps weights that no later epoch puts back; give its policy more epochs"),
    ],
)
def test_a_dry_run_tells_what_it_does_in_an_epoch(tiny_cnn, late, epoch, epochs, told):
    rewinder = WeightRewinder("r", tiny_cnn, late=late)
    assert rewinder.describe(context(tiny_cnn, epoch, *epochs)) == f"WeightRewinder: {told}"


def test_the_file_is_named_in_a_dry_run(tiny_cnn, tmp_path):
    path = save_checkpoint(0, "tiny", tiny_cnn, dir=tmp_path)
    rewinder = WeightRewinder("r", tiny_cnn, checkpoint=str(path))
    described = rewinder.describe(context(tiny_cnn, 0, 0))
    assert described == f"WeightRewinder: begins with the weights of {path}"


def test_what_happens_is_logged_and_keeping_for_nothing_is_a_warning(tiny_cnn, caplog):
    caplog.set_level(logging.INFO)
    train(tiny_cnn, scheduled(tiny_cnn, WeightRewinder("r", tiny_cnn), [1]), range(2))
    train(tiny_cnn, scheduled(tiny_cnn, WeightRewinder("late", tiny_cnn, late=True), [1]), range(2))
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("INFO", "'r': epoch 1 begins with the weights that the run started with"),
        (
            "WARNING",
            "'late': epoch 1 keeps weights that no later epoch puts back; give its policy more epochs",
        ),
    ]


def test_it_needs_the_optimizer(tiny_cnn):
    scheduler = scheduled(tiny_cnn, WeightRewinder("r", tiny_cnn), [0])
    with pytest.raises(DistillerError) as caught:
        scheduler.on_minibatch_begin(0, 0, 2)
    assert str(caught.value) == "'r': needs the optimizer, which begins anew; pass it to on_minibatch_begin"


def schedule(**settings):
    return {
        "extensions": {"r": {"class": "WeightRewinder", **settings}},
        "policies": [{"extension": {"instance_name": "r"}, "epochs": [0, 2]}],
    }


def test_a_schedule_names_it(tiny_cnn):
    scheduler = dict_config(tiny_cnn, sgd(tiny_cnn), schedule(late=True))
    assert isinstance(scheduler.policies[0].policy, WeightRewinder)


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"checkpoint": "gone.pth.tar"}, "gone.pth.tar: "),
        ({"checkpoint": "c", "late": True}, "both 'checkpoint' and 'late' given; give one"),
        ({"late": "yes"}, "extensions.r.late: must be true or false, got 'yes'"),
        ({"epoch": 3}, "extensions.r.epoch: unknown to WeightRewinder; it takes checkpoint, late"),
    ],
)
def test_what_is_wrong_with_its_settings_is_told_when_the_schedule_is_loaded(tiny_cnn, settings, told):
    with pytest.raises(ScheduleError) as caught:
        dict_config(tiny_cnn, sgd(tiny_cnn), schedule(**settings))
    assert told in str(caught.value)


def test_a_checkpoint_of_another_model_is_told_when_the_schedule_is_loaded(tiny_cnn, tmp_path):
    path = save_checkpoint(0, "other", nn.Linear(2, 2), dir=tmp_path)
    with pytest.raises(ScheduleError, match="is of another model"):
        dict_config(tiny_cnn, sgd(tiny_cnn), schedule(checkpoint=str(path)))
