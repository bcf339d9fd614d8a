"""The schedule extensions that thin: when they act, on what, and what they refuse."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from distiller.config import dict_config
from distiller.errors import DistillerError, ScheduleError
from distiller.registry import EXTENSIONS
from distiller.scheduler import CompressionScheduler
from distiller.thinning import ChannelRemover, FilterRemover, StructureRemover
from tests.doubles import train

PRUNER = {
    "class": "L1RankedStructureParameterPruner",
    "group_type": "Filters",
    "desired_sparsity": 0.5,
    "weights": ["conv1.weight"],
}


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def schedule(model, optimizer, remover, epochs, pruner=PRUNER, pruning_epochs=(0,)):
    """The remover stands first in the file: pruners of its epoch come before it all the same."""
    return dict_config(
        model,
        optimizer,
        {
            "pruners": {"halve": pruner},
            "extensions": {"thin": remover},
            "policies": [
                {"extension": {"instance_name": "thin"}, "epochs": list(epochs)},
                {"pruner": {"instance_name": "halve"}, "epochs": list(pruning_epochs)},
            ],
        },
    )


@pytest.mark.parametrize("name", ["FilterRemover", "ChannelRemover", "StructureRemover"])
@pytest.mark.parametrize("function", ["remove_filters", "contract_model"])
def test_what_the_pruner_of_the_same_epoch_masks_is_removed_before_its_first_minibatch(
    tiny_cnn, name, function
):
    """All three names stand for the same, as in Distiller: the function says what is removed."""
    optimizer = sgd(tiny_cnn)
    remover = {"class": name, "thinning_func_str": function, "arch": "simplenet_cifar", "dataset": "cifar10"}
    scheduler = schedule(tiny_cnn, optimizer, remover, [0])
    scheduler.on_epoch_begin(0, optimizer)
    assert tiny_cnn.conv1.weight.shape == (4, 1, 3, 3)
    scheduler.on_minibatch_begin(0, 0, 2, optimizer)
    assert tiny_cnn.conv1.weight.shape == (2, 1, 3, 3)
    assert tiny_cnn.conv2.weight.shape == (6, 2, 3, 3)
    assert scheduler.masks["conv1.weight"].mask.shape == (2, 1, 3, 3)


def test_it_acts_once_in_each_of_its_epochs(tiny_cnn, caplog):
    optimizer = sgd(tiny_cnn)
    scheduler = schedule(tiny_cnn, optimizer, {"class": "FilterRemover"}, [1, 3], pruning_epochs=(0,))
    with caplog.at_level(logging.INFO, "distiller.thinning.thin_model"):
        train(tiny_cnn, scheduler, range(4), optimizer)
    told = [r.getMessage() for r in caplog.records if "->" in r.getMessage() or "nothing" in r.getMessage()]
    assert tiny_cnn.conv1.weight.shape == (2, 1, 3, 3)
    assert [text.split(":")[1].split()[0] for text in told] == [
        "conv1.weight",
        "parameters",
        "MACs",
        "nothing",
    ]


def test_nothing_to_remove_is_a_warning_that_says_why(tiny_cnn, caplog):
    optimizer = sgd(tiny_cnn)
    scheduler = CompressionScheduler(tiny_cnn)
    remover = FilterRemover("thin")
    scheduler.add_policy(remover, epochs=[0])
    train(tiny_cnn, scheduler, [0], optimizer)
    assert remover.report is not None
    assert not remover.report.has_removed
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "remove_filters: nothing was removed: no filter of the weights is zero"
    ]


@pytest.mark.parametrize(
    ("remover", "shape"),
    [(FilterRemover, (3, 1, 3, 3)), (ChannelRemover, (3, 1, 3, 3)), (StructureRemover, (2, 1, 3, 3))],
)
def test_the_names_stand_for_what_they_say_unless_told_otherwise(tiny_cnn, remover, shape):
    with torch.no_grad():
        tiny_cnn.conv1.weight[0] = 0
        tiny_cnn.conv2.weight[:, 3] = 0
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(remover("thin"), epochs=[0])
    scheduler.on_epoch_begin(0, optimizer := sgd(tiny_cnn))
    scheduler.on_minibatch_begin(0, 0, 1, optimizer)
    assert tiny_cnn.conv1.weight.shape == shape


def test_training_goes_on_after_the_removal_with_a_pruner_that_is_not_done(tiny_cnn):
    """Distiller's pruners and masks had to be done by then."""
    optimizer = sgd(tiny_cnn)
    elements = {
        "class": "AutomatedGradualPruner",
        "initial_sparsity": 0.0,
        "final_sparsity": 0.5,
        "weights": ["conv2.weight"],
    }
    scheduler = schedule(tiny_cnn, optimizer, {"class": "FilterRemover"}, [2], elements, range(5))
    with torch.no_grad():
        tiny_cnn.conv1.weight[1] = 0
        tiny_cnn.bn1.weight[1] = tiny_cnn.bn1.bias[1] = 0
    sparsities = train(tiny_cnn, scheduler, range(5), optimizer)
    assert tiny_cnn.conv2.weight.shape == (6, 3, 3, 3)
    assert sparsities[-1] == pytest.approx(0.5, abs=0.01)


def test_an_unknown_function_is_refused_when_the_schedule_is_loaded(tiny_cnn):
    with pytest.raises(ScheduleError) as refusal:
        schedule(tiny_cnn, sgd(tiny_cnn), {"class": "FilterRemover", "thinning_func_str": "remove_all"}, [0])
    assert "extensions.thin.thinning_func_str" in str(refusal.value)
    assert "must be 'remove_filters', 'remove_channels' or 'contract_model', got 'remove_all'" in str(
        refusal.value
    )


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_shape = (1, 1, 8, 8)
        self.conv1 = nn.Conv2d(1, 4, 3)

    def forward(self, x):
        return self.conv1(x if x.sum() > 0 else -x)


def test_a_model_that_cannot_be_traced_is_refused_when_the_schedule_is_loaded():
    """Not in the midst of training, when the policy is due."""
    model = Branching()
    with pytest.raises(ScheduleError, match="torch.export cannot trace it for 'thin'"):
        schedule(model, sgd(model), {"class": "FilterRemover"}, [100])


def test_a_model_of_unknown_input_is_refused_when_the_schedule_is_loaded(tiny_cnn):
    del tiny_cnn.input_shape
    with pytest.raises(ScheduleError, match="'thin': the model has no 'input_shape'; set it"):
        schedule(tiny_cnn, sgd(tiny_cnn), {"class": "FilterRemover"}, [100])


def test_without_an_optimizer_it_refuses(tiny_cnn):
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(FilterRemover("thin"), epochs=[0])
    scheduler.on_epoch_begin(0)
    with pytest.raises(DistillerError) as refusal:
        scheduler.on_minibatch_begin(0, 0, 1)
    assert str(refusal.value) == (
        "'thin': needs the optimizer, whose state becomes smaller with the weights; "
        "pass it to on_minibatch_begin"
    )


def test_a_dry_run_tells_what_it_will_do(tiny_cnn):
    scheduler = schedule(tiny_cnn, sgd(tiny_cnn), {"class": "StructureRemover"}, [0])
    ctx = scheduler._context(scheduler.policies[0], 0, None)
    assert scheduler.policies[0].policy.describe(ctx) == (
        "StructureRemover: removes the filters and channels that are zero before the first mini-batch"
    )


def test_distillers_three_names_are_registered():
    assert {"FilterRemover", "ChannelRemover", "StructureRemover"} <= set(EXTENSIONS)


WATCHERS = {
    "means of activations": {
        "class": "ActivationAPoZRankedFilterPruner_AGP",
        "initial_sparsity": 0.25,
        "final_sparsity": 0.5,
        "group_type": "Filters",
        "weights": ["conv2.weight"],
    },
    "grams of inputs": {
        "class": "FMReconstructionChannelPruner",
        "desired_sparsity": 0.5,
        "group_type": "Channels",
        "weights": ["conv2.weight"],
    },
}


@pytest.mark.parametrize("watcher", WATCHERS.values(), ids=WATCHERS)
def test_a_pruner_that_watches_the_training_does_not_see_what_is_tried_out(tiny_cnn, watcher):
    optimizer = sgd(tiny_cnn)
    scheduler = dict_config(
        tiny_cnn,
        optimizer,
        {
            "pruners": {"watcher": watcher, "halve": PRUNER},
            "extensions": {"thin": {"class": "FilterRemover"}},
            "policies": [
                {"pruner": {"instance_name": "watcher"}, "starting_epoch": 0, "ending_epoch": 3},
                {"pruner": {"instance_name": "halve"}, "epochs": [1]},
                {"extension": {"instance_name": "thin"}, "epochs": [1]},
            ],
        },
    )
    train(tiny_cnn, scheduler, [0], optimizer)
    scheduler.on_epoch_begin(1, optimizer)
    before = scheduler.state_dict()["policies"][0]["state"]
    assert tiny_cnn.conv1.weight.shape[0] == 4
    scheduler.on_minibatch_begin(1, 0, 2, optimizer)
    assert tiny_cnn.conv1.weight.shape[0] == 2
    after = scheduler.state_dict()["policies"][0]["state"]
    assert after["seen"] == before["seen"]
    assert str(after).count("FakeTensor") == 0
    scheduler.on_epoch_end(1, optimizer)
    train(tiny_cnn, scheduler, [2], optimizer)


def test_masks_of_one_minibatch_do_not_count_as_zero(tiny_cnn, caplog):
    """Filters that are dropped at random, and dropped otherwise in the next mini-batch."""
    optimizer = sgd(tiny_cnn)
    dropping = {
        "discard_masks_at_minibatch_end": True,
        "use_double_copies": True,
        "mask_on_forward_only": True,
        "mini_batch_pruning_frequency": 1,
    }
    scheduler = dict_config(
        tiny_cnn,
        optimizer,
        {
            "pruners": {
                "drop": {
                    "class": "BernoulliFilterPruner",
                    "desired_sparsity": 0.9,
                    "group_type": "Filters",
                    "weights": ["conv1.weight"],
                }
            },
            "extensions": {"thin": {"class": "FilterRemover"}},
            "policies": [
                {
                    "pruner": {"instance_name": "drop", "args": dropping},
                    "starting_epoch": 0,
                    "ending_epoch": 3,
                },
                {"extension": {"instance_name": "thin"}, "epochs": [1]},
            ],
        },
    )
    with caplog.at_level(logging.INFO, "distiller.thinning.thin_model"):
        train(tiny_cnn, scheduler, range(2), optimizer)
    assert tiny_cnn.conv1.weight.shape[0] == 4
    told = [r.getMessage() for r in caplog.records if "do not count as zero" in r.getMessage()]
    assert [text.split(":")[1] for text in told] == [" conv1.weight"]


@pytest.mark.parametrize("order", [("l0", "thin"), ("thin", "l0")], ids=["gates first", "remover first"])
def test_gates_that_are_closed_by_chance_stay_whatever_the_order_of_the_policies(tiny_cnn, order):
    optimizer = sgd(tiny_cnn)
    gates = {
        "class": "L0Regularizer",
        "keep_probability": 0.4,
        "reg_regims": {"conv1.weight": [0.0, "Filters"]},
    }
    windows = {"l0": {"starting_epoch": 0, "ending_epoch": 3}, "thin": {"epochs": [1]}}
    scheduler = dict_config(
        tiny_cnn,
        optimizer,
        {
            "extensions": {"l0": gates, "thin": {"class": "FilterRemover"}},
            "policies": [{"extension": {"instance_name": name}, **windows[name]} for name in order],
        },
    )
    train(tiny_cnn, scheduler, range(2), optimizer)
    assert tiny_cnn.conv1.weight.shape[0] == 4


def test_gates_that_stay_closed_after_the_regularizer_are_removed(tiny_cnn):
    optimizer = sgd(tiny_cnn)
    gates = {
        "class": "L0Regularizer",
        "keep_probability": 0.2,
        "reg_regims": {"conv1.weight": [0.0, "Filters"]},
    }
    scheduler = dict_config(
        tiny_cnn,
        optimizer,
        {
            "extensions": {"l0": gates, "thin": {"class": "FilterRemover"}},
            "policies": [
                {"extension": {"instance_name": "l0"}, "epochs": [0]},
                {"extension": {"instance_name": "thin"}, "epochs": [1]},
            ],
        },
    )
    train(tiny_cnn, scheduler, range(2), optimizer)
    assert tiny_cnn.conv1.weight.shape[0] == 1


def test_an_unknown_data_set_is_refused_when_the_schedule_is_loaded(tiny_cnn):
    with pytest.raises(ScheduleError, match="cifar11"):
        schedule(tiny_cnn, sgd(tiny_cnn), {"class": "FilterRemover", "dataset": "cifar11"}, [0])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_model_that_cannot_be_copied_is_refused_when_the_schedule_is_loaded(tiny_cnn):
    nn.utils.weight_norm(tiny_cnn.conv1)
    with pytest.raises(ScheduleError, match="'thin': the model cannot be copied: .*remove_weight_norm"):
        schedule(
            tiny_cnn, sgd(tiny_cnn), {"class": "FilterRemover"}, [0], {**PRUNER, "weights": ["conv2.weight"]}
        )
