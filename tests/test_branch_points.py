from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distiller import modules
from distiller.branch_points import (
    BranchPoint,
    attach_exits,
    detach_exits,
    every_exit,
    exit_names,
    exits_of,
    final_output,
)
from distiller.errors import UnknownNameError, UsageError
from tests.early_exit.nets import Chain, images, seeded


def branch(features: int = 4 * 8 * 8) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 10))


@pytest.fixture
def model() -> nn.Module:
    model = seeded(Chain)
    attach_exits(model, [("relu1", branch()), ("relu2", branch(6 * 4 * 4))])
    return model


def test_all_outputs_come_out_in_training_mode_and_the_final_one_in_evaluation_mode(model):
    plain = seeded(Chain).eval()
    assert torch.equal(model.eval()(images(3)), plain(images(3)))
    outputs = model.train()(images(3))
    assert isinstance(outputs, list)
    assert [x.shape for x in outputs] == [(3, 10)] * 3


def test_branches_are_not_computed_when_nobody_asks(model):
    ran = []
    for point in exits_of(model):
        point.branch_net.register_forward_hook(lambda *_: ran.append(1))
    model.eval()(images(2))
    assert not ran
    with every_exit(model):
        exits = model(images(2))
    assert len(ran) == 2
    assert len(exits) == 3
    assert isinstance(model(images(2)), torch.Tensor)


def test_an_exit_is_its_branch_on_what_the_layer_gives(model):
    model.eval()
    plain = seeded(Chain).eval()
    x = plain.relu1(plain.bn1(plain.conv1(images(2))))
    with every_exit(model):
        first, *_ = model(images(2))
    assert torch.equal(first, exits_of(model)[0].branch_net(x))


def test_the_trunk_keeps_the_names_of_its_parameters(model):
    names = [name for name, _ in model.named_parameters()]
    plain = [name for name, _ in Chain().named_parameters()]
    assert [name for name in names if "branch_net" not in name] == plain
    assert [name for name in names if "branch_net" in name][:2] == [
        "relu1.branch_net.1.weight",
        "relu1.branch_net.1.bias",
    ]
    assert exit_names(model) == ("relu1", "relu2")


def test_a_copy_has_exits_of_its_own(model):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for param in exits_of(twin)[0].branch_net.parameters():
            param.zero_()
    assert twin.train()(images(2))[0].abs().max() == 0
    assert model.train()(images(2))[0].abs().max() > 0


def test_a_state_round_trips(model):
    other = seeded(Chain)
    attach_exits(other, [("relu1", branch()), ("relu2", branch(96))])
    other.load_state_dict(model.state_dict())
    for ours, theirs in zip(model.eval().train()(images(2)), other.train()(images(2)), strict=True):
        assert torch.equal(ours, theirs)


def test_gradients_reach_branches_and_trunk(model):
    sum(x.sum() for x in model.train()(images(2))).backward()
    assert all(param.grad is not None for param in model.parameters())


def test_a_pass_that_fails_half_way_leaves_nothing(model):
    model.train()
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 1, 9, 9))
    copy.deepcopy(model)
    model.eval()
    assert isinstance(model(images(2)), torch.Tensor)
    assert all(point.answers is None for point in exits_of(model))


def test_detached_a_model_is_what_it_was(model):
    detach_exits(model)
    assert exits_of(model) == ()
    assert [type(module) for module in model.modules()] == [type(module) for module in Chain().modules()]
    assert isinstance(model.train()(images(2)), torch.Tensor)


def test_a_frozen_layer_does_not_close_its_exit(model):
    model.train()
    model.relu1.eval()
    assert len(model(images(2))) == 3


def test_distillers_name_is_in_modules():
    assert modules.BranchPoint is BranchPoint


def test_final_output_is_the_last_of_a_list():
    x = torch.zeros(1)
    assert final_output(x) is x
    assert final_output([None, x]) is x


@pytest.mark.parametrize(
    "exits, kind, told",
    [
        ([], UsageError, "early exit: no layer is named; give at least one"),
        ([("relu9", branch())], UnknownNameError, "no module 'relu9' in the model; did you mean 'relu3'?"),
        ([("", branch())], UsageError, "early exit: '' is the whole model; name another layer"),
        ([("relu1", branch()), ("relu1", branch())], UsageError, "early exit: 'relu1' has one already; name another layer"),
        ([("relu1", 3)], UsageError, "early exit: branch of 'relu1': must be a torch.nn.Module, got int"),
    ],
)  # fmt: skip
def test_what_cannot_be_attached_is_refused_and_changes_nothing(exits, kind, told):
    model = seeded(Chain)
    with pytest.raises(kind) as caught:
        attach_exits(model, exits)
    assert str(caught.value) == told
    assert exits_of(model) == ()


def test_exits_are_attached_once(model):
    with pytest.raises(UsageError) as caught:
        attach_exits(model, [("relu3", branch())])
    assert str(caught.value) == "early exit: the model has exits already; attach all of them at once"


def test_a_layer_of_several_names_is_refused():
    model = seeded(Chain)
    model.relu2 = model.relu1
    with pytest.raises(UsageError) as caught:
        attach_exits(model, [("relu1", branch())])
    assert str(caught.value) == "early exit: 'relu1' is used under several names; name another layer"


def test_a_layer_that_does_not_run_is_told():
    model = seeded(Chain)

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.chain, self.idle = model, nn.ReLU()

        def forward(self, x):
            return self.chain(x)

    idle = Idle()
    attach_exits(idle, [("idle", branch())])
    with pytest.raises(UsageError) as caught:
        idle.train()(images(2))
    assert str(caught.value) == (
        "early exit: 'idle' did not run in the forward pass; attach the exit to a layer that does"
    )


def in_place_behind(branch: nn.Module, inplace: bool) -> nn.Module:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=inplace), nn.Linear(8, 3))
    attach_exits(net, [("0", branch)])
    return net


def test_what_the_layers_behind_write_in_place_is_not_what_the_branch_reads():
    torch.manual_seed(4)
    branch, x = nn.Linear(8, 3), torch.randn(5, 6)
    found = []
    for inplace in (True, False):
        net = in_place_behind(copy.deepcopy(branch), inplace)
        sum(output.sum() for output in net(x)).backward()
        found.append([param.grad for param in net.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_what_the_branch_writes_in_place_is_not_what_the_layers_behind_read():
    torch.manual_seed(4)
    last, x = nn.Linear(8, 3), torch.randn(5, 6)
    nets = [
        in_place_behind(nn.Sequential(nn.ReLU(inplace), copy.deepcopy(last)), False).eval()
        for inplace in (True, False)
    ]
    for net in nets:
        net[1] = nn.Tanh()
    with torch.no_grad():
        for net in nets:
            with every_exit(net):
                all_outputs = net(x)
            assert torch.equal(all_outputs[1], net(x))
        assert torch.equal(nets[0](x), nets[1](x))
