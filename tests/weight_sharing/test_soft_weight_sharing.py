"""Soft weight sharing in a schedule: what it adds to the loss, what it learns, and its state."""

from __future__ import annotations

import copy

import pytest
import torch

from distiller.config import dict_config
from distiller.errors import CheckpointError, DistillerError, ScheduleError, UnknownNameError
from distiller.interfaces import EpochWindow, StepContext
from distiller.masks import MaskStore
from distiller.scheduler import CompressionScheduler
from distiller.weight_sharing import SoftWeightSharing
from distiller.weight_sharing.mixture import plain_mixture_penalty
from tests.doubles import train

SMALL = {"components": 4, "initial_std": 0.1, "tau": 1e-3, "mean_lr": 0.01, "precision_lr": 0.05}


def make(model, **settings):
    return SoftWeightSharing("m", model, **{**SMALL, **settings})


def context(model, minibatch=0):
    return StepContext(model, MaskStore(model), None, EpochWindow((0, 1)), 0, minibatch, 4)


def run(model, policy, epochs=3):
    scheduler = CompressionScheduler(model)
    scheduler.add_policy(policy, epochs=range(epochs))
    train(model, scheduler, range(epochs))
    return scheduler


def test_it_takes_every_parameter_of_two_or_more_dimensions(tiny_cnn):
    params = dict(tiny_cnn.named_parameters())
    assert make(tiny_cnn).param_names == tuple(name for name, param in params.items() if param.dim() >= 2)
    assert make(tiny_cnn, weights="*").param_names == tuple(params)
    assert make(tiny_cnn, weights=["fc.weight"]).param_names == ("fc.weight",)


def test_the_loss_is_added_tau_times_the_penalty(tiny_cnn):
    policy = make(
        tiny_cnn, weights="fc.weight", prior={"alpha": 3, "beta": 0.1}, zero_prior={"mean": 9, "variance": 3}
    )
    learned = policy.learned["all"]
    penalty = plain_mixture_penalty(
        tiny_cnn.fc.weight.double(), learned.means(), learned.log_precisions, learned.log_mixing()
    )
    gamma = learned.log_precisions
    priors = (-2 * gamma + 0.1 * gamma.exp())[1:].sum() + (1 - 27) * gamma[0] + 3 * gamma[0].exp()
    added = policy.before_backward_pass(context(tiny_cnn), torch.ones(()))
    assert added is not None
    assert added.overall_loss.item() == pytest.approx(1 + 1e-3 * (penalty + priors).item(), rel=1e-5)
    assert [part.name for part in added.loss_components] == ["SoftWeightSharing_loss"]


def test_the_penalty_may_come_every_few_steps_and_counts_so_much_more(tiny_cnn):
    once, often = make(tiny_cnn), make(tiny_cnn, every=2)
    zero = torch.zeros(())
    first = once.before_backward_pass(context(tiny_cnn), zero)
    due = often.before_backward_pass(context(tiny_cnn, 2), zero)
    assert first is not None
    assert due is not None
    assert due.overall_loss.item() == pytest.approx(2 * first.overall_loss.item())
    assert often.before_backward_pass(context(tiny_cnn, 1), zero) is None


def test_the_mixture_learns_and_zero_stays(tiny_cnn):
    policy = make(tiny_cnn)
    before = policy.mixture_of("fc.weight")
    run(tiny_cnn, policy)
    after = policy.mixture_of("fc.weight")
    assert after.means[0] == 0
    assert not torch.equal(after.means[1:], before.means[1:])
    assert not torch.equal(after.precisions, before.precisions)
    assert after.mixing[0].item() == pytest.approx(0.99)


def test_a_learning_rate_of_zero_keeps_what_it_is_of(tiny_cnn):
    policy = make(tiny_cnn, mean_lr=0.0)
    before = policy.mixture_of("fc.weight")
    run(tiny_cnn, policy)
    after = policy.mixture_of("fc.weight")
    assert torch.equal(after.means, before.means)
    assert not torch.equal(after.precisions, before.precisions)


def test_weights_come_to_the_components(tiny_cnn):
    policy = make(tiny_cnn, weights="fc.weight", tau=0.01, initial_std=0.05, precision_lr=0.0, mixing_lr=0.0)

    def distance():
        means = policy.mixture_of("fc.weight").means.float()
        return (tiny_cnn.fc.weight.detach().unsqueeze(-1) - means).abs().amin(-1).mean().item()

    before = distance()
    run(tiny_cnn, policy, epochs=8)
    assert distance() < 0.7 * before


def test_components_do_not_collapse_onto_pruned_weights(tiny_cnn):
    with torch.no_grad():
        tiny_cnn.fc.weight.zero_()
    policy = make(tiny_cnn, weights="fc.weight", precision_lr=100.0)
    run(tiny_cnn, policy)
    assert policy.mixture_of("fc.weight").stds.min() >= 4e-5
    assert torch.isfinite(tiny_cnn.fc.weight).all()


def test_each_parameter_may_have_a_mixture_of_its_own(tiny_cnn):
    policy = make(tiny_cnn, per_parameter=True)
    run(tiny_cnn, policy)
    assert set(policy.learned) == set(policy.param_names)
    first, last = (policy.mixture_of(name).means for name in (policy.param_names[0], policy.param_names[-1]))
    assert not torch.equal(first, last)


def test_layers_may_have_a_scale(tiny_cnn):
    policy = make(tiny_cnn, scaling=True)
    first, *others = policy.param_names
    assert len(policy.log_scales) == len(others)
    with torch.no_grad():
        next(iter(policy.log_scales.values())).fill_(0.5)
    plain, scaled = policy.mixture_of(first), policy.mixture_of(others[0])
    factor = torch.tensor(0.5).exp().item()
    assert scaled.means.tolist() == pytest.approx((plain.means * factor).tolist())
    assert scaled.stds.tolist() == pytest.approx((plain.stds * factor).tolist())
    params = dict(tiny_cnn.named_parameters())
    wanted = sum(
        plain_mixture_penalty(params[name].double(), m.means, m.precisions.log(), m.mixing.log()).item()
        for name in policy.param_names
        for m in [policy.mixture_of(name)]
    )
    assert policy.penalty(params).item() == pytest.approx(wanted, rel=1e-5)
    before = {layer: scale.item() for layer, scale in policy.log_scales.items()}
    run(tiny_cnn, policy)
    assert all(scale.item() != before[layer] for layer, scale in policy.log_scales.items())


def test_the_history_has_each_epoch(tiny_cnn):
    policy = make(tiny_cnn, history=50)
    begun = {name: param.detach().clone() for name, param in tiny_cnn.named_parameters()}
    run(tiny_cnn, policy, epochs=2)
    assert [entry.epoch for entry in policy.history.epochs] == [0, 1]
    assert set(policy.history.epochs[0].figures) == {"loss", "top1", "sparsity"}
    assert torch.isin(policy.history.before["fc.weight"], begun["fc.weight"].flatten()).all()
    assert torch.isin(
        policy.history.epochs[1].weights["fc.weight"], tiny_cnn.fc.weight.detach().flatten()
    ).all()


@pytest.mark.parametrize(
    "settings", [{}, {"per_parameter": True}, {"scaling": True}, {"learn_pi_zero": True}]
)
def test_its_state_comes_back_bit_for_bit(tiny_cnn, settings, tmp_path):
    twin = copy.deepcopy(tiny_cnn)
    policy, fresh = make(tiny_cnn, **settings), make(twin, **settings)
    run(tiny_cnn, policy)
    torch.save(policy.state_dict(), tmp_path / "state")
    fresh.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    twin.load_state_dict(tiny_cnn.state_dict())
    for model, one in ((tiny_cnn, policy), (twin, fresh)):
        torch.manual_seed(5)
        run(model, one)
    assert all(torch.equal(a, b) for a, b in zip(tiny_cnn.parameters(), twin.parameters(), strict=True))
    for name in policy.param_names:
        assert torch.equal(policy.mixture_of(name).means, fresh.mixture_of(name).means)
    assert len(fresh.history.epochs) == len(policy.history.epochs) == 6


def test_the_state_of_other_parameters_is_refused(tiny_cnn):
    state = make(tiny_cnn, components=5).state_dict()
    with pytest.raises(CheckpointError) as refusal:
        make(tiny_cnn).load_state_dict(state)
    assert str(refusal.value) == (
        "the checkpoint's mixtures of 'm' are of {'all': {'means': 4, 'log_precisions': 5, 'logits': 4}}, this "
        "schedule's of {'all': {'means': 3, 'log_precisions': 4, 'logits': 3}}; resume with the same schedule"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"components": 1}, "components must be 2 or more, got 1"),
        ({"pi_zero": 1.0}, "pi_zero must be in (0, 1), got 1.0"),
        ({"initial_std": 0.0}, "initial_std must be more than 0, got 0.0"),
        ({"tau": -1.0}, "tau must be 0 or more, got -1.0"),
        ({"every": 0}, "every must be 1 or more, got 0"),
        ({"pi_zero_prior": {"alpha": 1, "beta": 1}},
         "pi_zero_prior: does nothing where pi_zero stays; give learn_pi_zero: true"),
        ({"per_parameter": True, "scaling": True},
         "both 'per_parameter' and 'scaling' given: a mixture of its own needs no scale"),
        ({"okz12": True, "learn_pi_zero": True}, "both 'okz12' and 'learn_pi_zero' given: there pi_zero is fixed"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(tiny_cnn, settings, message):
    with pytest.raises(DistillerError) as refusal:
        make(tiny_cnn, **settings)
    assert str(refusal.value) == message


def test_a_name_that_the_model_lacks_is_refused(tiny_cnn):
    with pytest.raises(UnknownNameError, match="did you mean 'fc.weight'"):
        make(tiny_cnn, weights="fc.weigth")


def test_a_model_of_vectors_has_nothing_to_share():
    with pytest.raises(DistillerError) as refusal:
        make(torch.nn.BatchNorm1d(3))
    assert str(refusal.value) == "weights: the model has no parameter of two or more dimensions; name some"


def test_a_schedule_is_told_all_faults_at_once(tiny_cnn):
    schedule = {
        "version": 1,
        "extensions": {
            "m": {"class": "SoftWeightSharing", "pi_zero": 2, "prior": {"alpha": 1}, "initial_means": "x"}
        },
        "policies": [{"extension": {"instance_name": "m"}, "epochs": [0]}],
    }
    with pytest.raises(ScheduleError) as refusal:
        dict_config(tiny_cnn, None, schedule)
    assert "pi_zero: must be in (0, 1), got 2" in str(refusal.value)
    assert "prior: must be {alpha: ..., beta: ...} or {mean: ..., variance: ...}" in str(refusal.value)
    assert "initial_means: " in str(refusal.value)


def test_it_describes_itself(tiny_cnn):
    assert make(tiny_cnn, weights="fc.weight").describe(context(tiny_cnn)) == (
        "SoftWeightSharing: fc.weight: 4 components, tau 0.001"
    )


def test_the_mixture_begins_with_the_weights_of_its_first_epoch(tiny_cnn):
    """Not those of when the schedule was read: training, or a factorization, may have come between."""
    policy = make(tiny_cnn)
    with torch.no_grad():
        for param in tiny_cnn.parameters():
            param.mul_(3)
    expected = make(tiny_cnn)
    policy.on_epoch_begin(context(tiny_cnn))
    for key, tensor in expected.learned["all"].tensors.items():
        assert torch.equal(policy.learned["all"].tensors[key], tensor)
    before = policy.learned["all"].means().detach().clone()
    with torch.no_grad():
        tiny_cnn.fc.weight.mul_(2)
    policy.on_epoch_begin(context(tiny_cnn))
    assert torch.equal(policy.learned["all"].means(), before)


def test_factored_layers_have_a_mixture_of_their_factors(tiny_cnn):
    plan = {
        "version": 1,
        "extensions": {
            "low_rank": {"class": "LowRankFactorization", "layers": {"conv2": {"rank": 1}}},
            "mixture": {"class": "SoftWeightSharing", **SMALL},
        },
        "policies": [
            {"extension": {"instance_name": "low_rank"}, "epochs": [0]},
            {"extension": {"instance_name": "mixture"}, "epochs": [1]},
        ],
    }
    optimizer = torch.optim.SGD(tiny_cnn.parameters(), lr=0.01)
    scheduler = dict_config(tiny_cnn, optimizer, plan)
    scheduler.on_epoch_begin(0, optimizer)
    scheduler.on_epoch_end(0, optimizer, {"loss": 1.0, "top1": 50.0})
    scheduler.on_epoch_begin(1, optimizer)
    (policy,) = [entry.policy for entry in scheduler.policies if isinstance(entry.policy, SoftWeightSharing)]
    assert "conv2.first.weight" in policy.param_names
    fresh = SoftWeightSharing("m", tiny_cnn, **SMALL)
    assert torch.equal(policy.learned["all"].means(), fresh.learned["all"].means())
