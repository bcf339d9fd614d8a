from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from distiller.config import file_config
from distiller.errors import CheckpointError, DistillerError, ScheduleError
from distiller.policy import PruningPolicy
from distiller.pruning import TaylorFORankedFilterPruner
from distiller.regularization import L0Regularizer
from distiller.regularization.hard_concrete import sampled_gates, steady_gates
from distiller.scheduler import CompressionScheduler
from tests.doubles import HalfPruner, every_other, train

REGIMES = {"conv2.weight": [0.01, "Filters"], "fc.weight": [0.002, "Elements"]}


def scheduled(model, regimes=REGIMES, last=3, **settings):
    regularizer = L0Regularizer("l0", model, regimes, **settings)
    scheduler = CompressionScheduler(model)
    scheduler.add_policy(regularizer, epochs=list(range(last + 1)))
    return regularizer, scheduler


def step(model, scheduler, images, optimizer, epoch=0):
    scheduler.on_minibatch_begin(epoch, 0, 1, optimizer)
    loss = model(images).square().mean()
    loss = scheduler.before_backward_pass(epoch, 0, 1, loss, optimizer)
    optimizer.zero_grad()
    loss.backward()
    scheduler.before_parameter_optimization(epoch, 0, 1, optimizer)
    gradients = {name: param.grad.clone() for name, param in model.named_parameters()}
    optimizer.step()
    scheduler.on_minibatch_end(epoch, 0, 1, optimizer)
    return loss.detach(), gradients


def test_the_penalty_is_the_expected_number_of_open_gates_times_lambda(tiny_cnn):
    regularizer = L0Regularizer("l0", tiny_cnn, REGIMES, keep_probability=0.8)
    assert regularizer.penalty().item() == pytest.approx(0.8 * (0.01 * 6 + 0.002 * 24))


def test_the_penalty_follows_the_locations(tiny_cnn):
    regularizer = L0Regularizer("l0", tiny_cnn, REGIMES)
    state = regularizer.state_dict()
    state["locations"] = {name: torch.randn_like(value) for name, value in state["locations"].items()}
    regularizer.load_state_dict(state)
    expected = sum(
        strength * np.sum(1 / (1 + np.exp(-(state["locations"][name].numpy() - 2 / 3 * math.log(0.1 / 1.1)))))
        for name, (strength, _) in REGIMES.items()
    )
    assert regularizer.penalty().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("group", "shape"),
    [
        ("Elements", (6, 4, 3, 3)),
        ("2D", (6, 4, 1, 1)),
        ("Filters", (6, 1, 1, 1)),
        ("3D", (6, 1, 1, 1)),
        ("Channels", (1, 4, 1, 1)),
        ("4D", (1, 1, 1, 1)),
    ],
)
def test_there_is_one_gate_for_each_group(tiny_cnn, group, shape):
    regularizer = L0Regularizer("l0", tiny_cnn, {"conv2.weight": [0.1, group]})
    assert regularizer.gates()["conv2.weight"].shape == shape
    _, scheduler = scheduled(tiny_cnn, {"conv2.weight": [0.1, group]})
    train(tiny_cnn, scheduler, range(1))


def test_one_step_is_that_of_automatic_differentiation_through_the_gates(tiny_cnn):
    """Against a functional call with weight * gate, of the loss plus the penalty."""
    reference = copy.deepcopy(tiny_cnn)
    images = torch.randn(4, 1, 8, 8)
    regularizer, scheduler = scheduled(tiny_cnn, keep_probability=0.7, gate_lr=0.05)
    before = regularizer.state_dict()["locations"]
    generator_state = torch.get_rng_state()
    loss, gradients = step(tiny_cnn, scheduler, images, torch.optim.SGD(tiny_cnn.parameters(), lr=0.1))

    torch.set_rng_state(generator_state)
    locations = {name: value.clone().requires_grad_() for name, value in before.items()}
    weights = dict(reference.named_parameters())
    gated = {
        name: weights[name] * sampled_gates(location, torch.rand_like(location))
        for name, location in locations.items()
    }
    expected = functional_call(reference, gated, (images,)).square().mean()
    for name, location in locations.items():
        expected = expected + REGIMES[name][0] * torch.sigmoid(location - 2 / 3 * math.log(0.1 / 1.1)).sum()
    expected.backward()
    gate_optimizer = torch.optim.Adam(locations.values(), lr=0.05)
    gate_optimizer.step()

    torch.testing.assert_close(loss, expected.detach())
    for name, weight in weights.items():
        torch.testing.assert_close(gradients[name], weight.grad)
        torch.testing.assert_close(
            dict(tiny_cnn.named_parameters())[name].detach(), weight.detach() - 0.1 * gradients[name]
        )
    after = regularizer.state_dict()["locations"]
    for name, location in locations.items():
        torch.testing.assert_close(after[name], location.detach())
        assert not torch.equal(after[name], before[name])


def test_evaluations_see_the_gates_without_noise_and_training_goes_on_with_dense_weights(tiny_cnn):
    regularizer, scheduler = scheduled(tiny_cnn, keep_probability=0.5)
    step(tiny_cnn, scheduler, torch.randn(4, 1, 8, 8), torch.optim.SGD(tiny_cnn.parameters(), lr=0.1))
    dense = tiny_cnn.conv2.weight.detach().clone()
    locations = regularizer.state_dict()["locations"]
    with scheduler.masked():
        assert torch.equal(tiny_cnn.conv2.weight, dense * steady_gates(locations["conv2.weight"]))
    assert torch.equal(tiny_cnn.conv2.weight, dense)
    assert (dense != 0).all()


def test_at_the_end_the_gates_are_in_the_weights_and_what_is_closed_stays_masked(tiny_cnn):
    images = torch.randn(4, 1, 8, 8)
    optimizer = torch.optim.SGD(tiny_cnn.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    regularizer, scheduler = scheduled(tiny_cnn, {"conv2.weight": [1.0, "Filters"]}, last=0, gate_lr=0.5)
    tiny_cnn.eval()
    for _ in range(8):
        step(tiny_cnn, scheduler, images, optimizer)
    with scheduler.masked():
        last_evaluation = tiny_cnn(images)
    scheduler.on_epoch_end(0, optimizer, {})
    torch.testing.assert_close(tiny_cnn(images), last_evaluation)
    is_open = regularizer.gates()["conv2.weight"].flatten() != 0
    assert not is_open.all()
    assert set(scheduler.masks.masked()["conv2.weight"].unique().tolist()) <= {0.0, 1.0}
    gates = regularizer.gates()
    for epoch in (1, 2):
        step(tiny_cnn, scheduler, images, optimizer, epoch)
    assert torch.equal((tiny_cnn.conv2.weight != 0).flatten(1).any(1), is_open)
    assert torch.equal(regularizer.gates()["conv2.weight"], gates["conv2.weight"])


def test_between_active_epochs_the_gates_stand_still_and_hold(tiny_cnn):
    regularizer = L0Regularizer("l0", tiny_cnn, REGIMES, keep_probability=0.5)
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(regularizer, epochs=[0, 3])
    optimizer = torch.optim.SGD(tiny_cnn.parameters(), lr=0.05)
    train(tiny_cnn, scheduler, range(1), optimizer)
    gates, dense = regularizer.gates(), tiny_cnn.conv2.weight.detach().clone()
    train(tiny_cnn, scheduler, range(1, 3), optimizer)
    assert all(torch.equal(gates[name], now) for name, now in regularizer.gates().items())
    with scheduler.masked():
        evaluated = tiny_cnn.conv2.weight.detach().clone()
    assert not torch.equal(tiny_cnn.conv2.weight, dense)
    assert torch.equal(evaluated, tiny_cnn.conv2.weight * gates["conv2.weight"])


def test_names_of_parameters_and_of_the_models_state_stay_as_they_are(tiny_cnn):
    names = list(tiny_cnn.state_dict())
    _, scheduler = scheduled(tiny_cnn)
    train(tiny_cnn, scheduler, range(2))
    assert list(tiny_cnn.state_dict()) == names


def test_a_resumed_run_is_bit_equal(tiny_cnn):
    resumed = copy.deepcopy(tiny_cnn)

    def optimizer_of(model):
        return torch.optim.Adam(model.parameters(), lr=0.01)

    regularizer, scheduler = scheduled(tiny_cnn, gate_lr=0.1)
    optimizer = optimizer_of(tiny_cnn)
    train(tiny_cnn, scheduler, range(2), optimizer)
    stored = io.BytesIO()
    with scheduler.masked():
        torch.save([tiny_cnn.state_dict(), scheduler.state_dict(), optimizer.state_dict()], stored)
    generator_state = torch.get_rng_state()
    train(tiny_cnn, scheduler, range(2, 6), optimizer)

    stored.seek(0)
    weights, state, optimizer_state = torch.load(stored, weights_only=True)
    another, another_scheduler = scheduled(resumed, gate_lr=0.1)
    resumed.load_state_dict(weights)
    another_scheduler.load_state_dict(state)
    another_optimizer = optimizer_of(resumed)
    another_optimizer.load_state_dict(optimizer_state)
    torch.set_rng_state(generator_state)
    train(resumed, another_scheduler, range(2, 6), another_optimizer)

    for (name, value), other in zip(
        tiny_cnn.state_dict().items(), resumed.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name
    for name, gates in regularizer.gates().items():
        assert torch.equal(gates, another.gates()[name])


def test_gates_of_other_parameters_are_refused(tiny_cnn):
    state = L0Regularizer("l0", tiny_cnn, {"fc.weight": [0.1, "Rows"]}).state_dict()
    with pytest.raises(CheckpointError) as caught:
        L0Regularizer("l0", tiny_cnn, {"fc.weight": [0.1, "Cols"]}).load_state_dict(state)
    assert str(caught.value) == (
        "the checkpoint's gates of 'l0' are of {'fc.weight': (4, 1)}, this schedule's of "
        "{'fc.weight': (1, 6)}; resume with the same schedule"
    )


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 2)

    def forward(self, x):
        return self.fc(x)


def kept_inputs(strength: float) -> list[bool]:
    """Which inputs a regression keeps whose targets depend on the first four, ever less."""
    torch.manual_seed(3)
    model = Regression()
    x = torch.randn(256, 12)
    y = x[:, :4] @ torch.tensor([[2.0, 1.0], [1.0, -1.0], [-0.6, 0.6], [0.3, 0.3]])
    _, scheduler = scheduled(model, {"fc.weight": [strength, "Cols"]}, last=0, gate_lr=0.05)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(300):
        scheduler.on_minibatch_begin(0, 0, 1, optimizer)
        loss = scheduler.before_backward_pass(0, 0, 1, (model(x) - y).square().mean(), optimizer)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        scheduler.before_parameter_optimization(0, 0, 1, optimizer)
        optimizer.step()
        scheduler.on_minibatch_end(0, 0, 1, optimizer)
    scheduler.on_epoch_end(0, optimizer, {})
    return (model.fc.weight != 0).any(0).tolist()


def test_what_the_loss_does_not_need_goes_and_the_rest_stays():
    assert kept_inputs(0.02) == [True] * 4 + [False] * 8


def test_sparsity_rises_with_lambda():
    kept = [sum(kept_inputs(strength)) for strength in (0.0, 0.02, 0.5, 5.0)]
    assert kept[0] == 12
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) >= 3
    assert kept[-1] <= 1


def test_a_pruners_mask_holds_besides_the_gates(tiny_cnn):
    regularizer = L0Regularizer("l0", tiny_cnn, {"conv2.weight": [0.01, "Filters"]})
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(PruningPolicy(HalfPruner("conv2.weight")), epochs=[0])
    scheduler.add_policy(regularizer, epochs=[0, 1])
    assert train(tiny_cnn, scheduler, range(3))[0] == 0.5
    assert set(scheduler.masks["conv2.weight"].slots) == {"pruner", "regularizer l0"}
    assert (tiny_cnn.conv2.weight[every_other(tiny_cnn.conv2.weight) == 0] == 0).all()


def pruners_of_the_middle_of_an_epoch():
    """Whose masks come after the gates of the mini-batch, where their policy is the later one."""
    taylor = TaylorFORankedFilterPruner("t", "Filters", 0.5, ["conv2.weight"])
    return {"data-driven": PruningPolicy(taylor),
            "every mini-batch": PruningPolicy(HalfPruner("conv2.weight"), {"mini_batch_pruning_frequency": 1})}  # fmt: skip


@pytest.mark.parametrize("gates_first", [True, False])
@pytest.mark.parametrize("which", ["data-driven", "every mini-batch"])
def test_a_pruner_of_the_same_parameter_may_stand_before_or_behind(tiny_cnn, which, gates_first):
    """A pruner's rules replaced those of the gates: training stopped, blaming a policy of the forward pass."""
    regularizer = L0Regularizer("l0", tiny_cnn, {"conv2.weight": [0.01, "Filters"]})
    policies = [regularizer, pruners_of_the_middle_of_an_epoch()[which]]
    scheduler = CompressionScheduler(tiny_cnn)
    for policy in policies if gates_first else reversed(policies):
        scheduler.add_policy(policy, epochs=[0, 1])
    before = regularizer.gates()["conv2.weight"]
    assert train(tiny_cnn, scheduler, range(3), batches=12) == [0.5] * 3
    assert not torch.equal(regularizer.gates()["conv2.weight"], before)
    pruned = scheduler.masks["conv2.weight"].slots["pruner"] == 0
    assert (tiny_cnn.conv2.weight[pruned] == 0).all()


def test_what_a_pruner_keeps_is_gated_and_trained_as_without_the_pruner(tiny_cnn):
    """One step against automatic differentiation through weight * mask * gate."""
    reference, images = copy.deepcopy(tiny_cnn), torch.randn(4, 1, 8, 8)
    regularizer, scheduler = scheduled(tiny_cnn, {"conv2.weight": [0.0, "Filters"]}, keep_probability=0.7)
    scheduler.add_policy(PruningPolicy(HalfPruner("conv2.weight")), epochs=[0])
    location = regularizer.state_dict()["locations"]["conv2.weight"].requires_grad_()
    scheduler.on_epoch_begin(0)
    state = torch.get_rng_state()
    step(tiny_cnn, scheduler, images, torch.optim.SGD(tiny_cnn.parameters(), lr=0.1))
    torch.set_rng_state(state)
    weight, keep = reference.conv2.weight, every_other(reference.conv2.weight)
    gated = weight * keep * sampled_gates(location, torch.rand_like(location))
    functional_call(reference, {"conv2.weight": gated}, (images,)).square().mean().backward()
    torch.optim.Adam([location], lr=0.01).step()
    expected = (
        weight - 0.1 * weight.grad
    ) * keep  # gradients masked by the gates alone, weights by the pruner
    torch.testing.assert_close(tiny_cnn.conv2.weight * keep, expected)
    assert (tiny_cnn.conv2.weight[keep == 0] == 0).all()
    torch.testing.assert_close(regularizer.state_dict()["locations"]["conv2.weight"], location.detach())


def test_half_precision_weights_are_gated(tiny_cnn):
    model = Regression().bfloat16()
    regularizer, scheduler = scheduled(model, {"fc.weight": [0.1, "Elements"]}, last=0)
    step(model, scheduler, torch.randn(4, 12).bfloat16(), torch.optim.SGD(model.parameters(), lr=0.1))
    scheduler.on_epoch_end(0, None, {})
    assert model.fc.weight.dtype == torch.bfloat16
    assert regularizer.gates()["fc.weight"].dtype == torch.float32


SCHEDULE = """\
extensions:
  l0:
    class: L0Regularizer
    reg_regims:
      module.conv*.weight: [0.01, Filters]
      fc.weight: [0.001, Elements]
    keep_probability: 0.8
policies:
  - extension: {instance_name: l0}
    epochs: [0, 1]
"""


def test_a_schedule_names_it_among_its_extensions(tmp_path, tiny_cnn):
    path = tmp_path / "s.yaml"
    path.write_text(SCHEDULE)
    scheduler = file_config(tiny_cnn, None, path)
    assert scheduler.describe(0) == [
        "extension l0: L0Regularizer: conv1.weight, conv2.weight, fc.weight: 0 of 34 gates closed"
    ]


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (
            "fc.weight",
            "fc.weigth",
            ":6    extensions.l0.reg_regims.fc.weigth: no parameter 'fc.weigth' in the model; did you mean 'fc.weight'?",
        ),
        (
            "Elements",
            "Element",
            ":6    extensions.l0.reg_regims.fc.weight: group must be one of Elements, 2D, Rows,"
            " Cols, Channels, Filters, 3D, 4D, got 'Element'; did you mean 'Elements'?",
        ),
        (
            "0.8",
            "1.0",
            ":7    extensions.l0.keep_probability: keep_probability must be in (0, 1), got 1.0",
        ),
    ],
)
def test_faults_of_a_schedule_are_told_at_their_lines(tmp_path, tiny_cnn, old, new, fault):
    path = tmp_path / "s.yaml"
    path.write_text(SCHEDULE.replace(old, new))
    with pytest.raises(ScheduleError) as caught:
        file_config(tiny_cnn, None, path)
    assert [str(found) for found in caught.value.faults] == [fault]


@pytest.mark.parametrize("gate_lr", [0, -1.0])
def test_a_learning_rate_of_0_is_refused(tiny_cnn, gate_lr):
    with pytest.raises(DistillerError, match=f"^gate_lr must be more than 0, got {gate_lr}$"):
        L0Regularizer("l0", tiny_cnn, REGIMES, gate_lr=gate_lr)
