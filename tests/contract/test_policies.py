"""Every kind of policy: what the scheduler may rely on."""

from __future__ import annotations

import io

import pytest
import torch

from distiller.component_kinds import KINDS
from distiller.interfaces import EpochWindow, Policy, StepContext
from distiller.masks import MaskStore
from distiller.policy import LRPolicy, PruningPolicy, QuantizationPolicy, RegularizationPolicy
from tests.doubles import HalfPruner


class NoQuantizer:
    def prepare_model(self, dummy_input=None): ...

    def quantize_params(self): ...


class NoPenalty:
    name = "none"

    def select(self, param_names):
        return ("fc.weight",)

    def penalty(self, params):
        return torch.zeros(())

    def threshold_masks(self, params):
        return {}


MAKERS = {
    "quantizer": lambda model: QuantizationPolicy(NoQuantizer()),
    "pruner": lambda model: PruningPolicy(HalfPruner("fc.weight")),
    "regularizer": lambda model: RegularizationPolicy(NoPenalty()),
    "lr_scheduler": lambda model: LRPolicy(
        torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=0.1), 2)
    ),
    "extension": lambda model: Policy(),
}


def test_every_kind_of_policy_has_a_maker_here():
    assert set(MAKERS) == {kind.word for kind in KINDS}


@pytest.fixture(params=sorted(MAKERS))
def policy(request, tiny_cnn):
    return MAKERS[request.param](tiny_cnn)


@pytest.fixture
def ctx(tiny_cnn):
    optimizer = torch.optim.SGD(tiny_cnn.parameters(), lr=0.1)
    return StepContext(tiny_cnn, MaskStore(tiny_cnn), optimizer, EpochWindow((0, 1)), 0, 0, 2)


def test_every_callback_may_be_called(policy, ctx):
    policy.check(ctx.model)
    policy.on_epoch_begin(ctx)
    policy.on_minibatch_begin(ctx)
    loss = policy.before_backward_pass(ctx, torch.ones(()))
    assert loss is None or loss.overall_loss == 1
    policy.before_parameter_optimization(ctx)
    policy.on_minibatch_end(ctx)
    policy.on_epoch_end(ctx, {"loss": 1.0, "top1": 50.0})


def test_weights_are_changed_by_the_scheduler_only(policy, ctx):
    before = {name: param.detach().clone() for name, param in ctx.model.named_parameters()}
    policy.on_epoch_begin(ctx)
    policy.on_minibatch_begin(ctx)
    policy.before_backward_pass(ctx, torch.ones(()))
    policy.on_minibatch_end(ctx)
    assert all(torch.equal(before[name], param) for name, param in ctx.model.named_parameters())


def test_its_state_is_plain_data_and_comes_back(request, policy, ctx):
    policy.on_epoch_begin(ctx)
    file = io.BytesIO()
    torch.save(policy.state_dict(), file)
    file.seek(0)
    fresh = MAKERS[request.node.callspec.params["policy"]](ctx.model)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert fresh.state_dict() == policy.state_dict()


def test_it_describes_itself_in_one_line(policy, ctx):
    assert policy.describe(ctx)
    assert "\n" not in policy.describe(ctx)
