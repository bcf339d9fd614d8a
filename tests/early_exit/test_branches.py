from __future__ import annotations

import pytest
import torch
from torch import nn

import distiller
from distiller.early_exit import (
    EarlyExitMgr,
    attach_exits_to,
    attach_stored_exits,
    check_branch_points,
    exit_names,
    exits_of,
    stored_exits,
)
from distiller.errors import UnknownNameError, UsageError
from distiller.models import create_model
from tests.early_exit.nets import Chain, Residual, images, seeded


def test_branches_fit_what_the_layers_give():
    model = seeded(Chain)
    attach_exits_to(model, ["relu1", "pool", "flatten", "relu3"])
    branches = [point.branch_net for point in exits_of(model)]
    assert [branch[-1].in_features for branch in branches] == [4 * 4 * 4, 4 * 4 * 4, 96, 12]
    assert [branch[-1].out_features for branch in branches] == [10] * 4
    assert [x.shape for x in model.train()(images(2))] == [(2, 10)] * 5


def test_a_block_is_named_and_the_layer_without_parameters_at_its_end_has_the_exit():
    model = create_model(False, "digits", "resnet20_cifar")
    names = [name for name, _ in model.named_parameters()]
    attach_exits_to(model, ["layer1.2", "layer2"])
    assert exit_names(model) == ("layer1.2.relu2", "layer2.2.relu2")
    assert [name for name, _ in model.named_parameters() if "branch_net" not in name] == names


def test_a_block_that_ends_in_no_module_has_the_exit_itself():
    model = seeded(Residual)
    attach_exits_to(model, ["block1"])
    assert exit_names(model) == ("block1",)
    assert "block1.branched_module.conv.weight" in model.state_dict()
    assert [x.shape for x in model.train()(images(2))] == [(2, 10)] * 2


def test_what_is_stored_attaches_the_same_to_another_copy():
    model, other = seeded(Chain), seeded(Chain)
    attach_exits_to(model, ["relu1", "relu3"])
    assert stored_exits(model) == [{"layer": "relu1", "pool": [4, 4]}, {"layer": "relu3", "pool": None}]
    attach_stored_exits(other, stored_exits(model))
    assert stored_exits(other) == stored_exits(model)
    other.load_state_dict(model.state_dict())


def test_attaching_changes_neither_modes_nor_statistics():
    model = seeded(Chain).train()
    model.bn1.eval()
    before = model.bn1.running_mean.clone()
    attach_exits_to(model, ["relu1"])
    assert torch.equal(model.bn1.running_mean, before)
    assert model.training
    assert not model.bn1.training


@pytest.mark.parametrize(
    "layers, kind, told",
    [
        (["relu2", "relu1"], UsageError,
         "early exit: name the layers in the order of execution: relu1 relu2, got relu2 relu1"),
        (["relu9"], UnknownNameError, "no module 'relu9' in the model; did you mean 'relu3'?"),
        (["fc"], UsageError, "early exit: 'fc' is no place for one, the network has another way past it, or ends there; "
         "name 'relu3'"),
    ],
)  # fmt: skip
def test_layers_that_cannot_be_are_refused_and_change_nothing(layers, kind, told):
    model = seeded(Chain)
    with pytest.raises(kind) as caught:
        attach_exits_to(model, layers)
    assert str(caught.value) == told
    assert exits_of(model) == ()
    assert stored_exits(model) == []


def test_stored_pools_that_do_not_fit_are_refused():
    for pool in (None, [9, 9], [0, 1], [4]):
        with pytest.raises(UsageError, match="^early exit: 'relu1' of shape .* cannot be pooled to"):
            attach_stored_exits(seeded(Chain), [{"layer": "relu1", "pool": pool}])


def test_a_result_of_three_dimensions_has_no_branch():
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc = nn.Linear(8, 4), nn.Linear(4, 10)
            self.input_shape = (1, 1, 8, 8)

        def forward(self, x):
            return self.fc(self.embed(x[:, 0]).mean(1))

    with pytest.raises(UsageError) as caught:
        attach_exits_to(Sequence(), ["embed"])
    assert str(caught.value) == (
        "early exit: 'embed' must give a tensor (batch, channels, height, width) or (batch, features) for an exit, "
        "got shape (2, 8, 4) for a batch of 2"
    )


def test_distillers_manager_attaches_branches_of_ones_own():
    model, manager = seeded(Residual), distiller.EarlyExitMgr()
    assert isinstance(manager, EarlyExitMgr)
    branch = nn.Sequential(nn.Flatten(), nn.Linear(4 * 64, 10))
    manager.attach_exits(model, [("block1", branch)])
    assert manager.exits == ["block1"]
    assert exits_of(model)[0].branch_net is branch
    check_branch_points(model)


def test_an_exit_with_a_way_past_it_is_found_before_images_leave():
    model = seeded(Residual)
    EarlyExitMgr().attach_exits(model, [("block1.act", nn.Sequential(nn.Flatten(), nn.Linear(256, 10)))])
    with pytest.raises(UsageError, match="^early exit: 'block1.act' is no place for one"):
        check_branch_points(model)
