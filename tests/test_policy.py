from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distiller.errors import DistillerError
from distiller.interfaces import DataDrivenPruner, EpochWindow, StepContext
from distiller.masks import MaskStore
from distiller.names import resolve_all
from distiller.policy import LRPolicy, PruningArgs, PruningPolicy, QuantizationPolicy, RegularizationPolicy
from distiller.pruning import BernoulliFilterPruner, SparsityLevelParameterPruner
from distiller.scheduler import CompressionScheduler
from tests.doubles import HalfPruner, every_other, train


class Ridge:
    """0.5 * sum(w^2), and a threshold on |w|."""

    def __init__(self, *weights: str, threshold: float | None = None) -> None:
        self.name = "ridge"
        self.weights, self.threshold = weights, threshold

    def select(self, param_names):
        return resolve_all(self.weights, param_names)

    def penalty(self, params):
        return 0.5 * sum(param.square().sum() for param in params.values())

    def threshold_masks(self, params):
        if self.threshold is None:
            return {}
        return {name: (param.abs() > self.threshold).to(param.dtype) for name, param in params.items()}


def context(model, epoch=0, last=0, **more: Any) -> StepContext:
    return StepContext(model, MaskStore(model), None, EpochWindow(tuple(range(last + 1))), epoch, **more)


def test_a_regularizers_penalty_joins_the_loss(tiny_cnn):
    policy = RegularizationPolicy(Ridge("fc.weight"))
    result = policy.before_backward_pass(context(tiny_cnn), torch.tensor(1.0))
    expected = 0.5 * tiny_cnn.fc.weight.square().sum()
    assert torch.equal(result.overall_loss, 1.0 + expected)
    assert result.loss_components[0].name == "Ridge_loss"
    assert torch.equal(result.loss_components[0].value, expected)


def test_a_threshold_zeroes_weights_which_may_grow_again(tiny_cnn):
    ctx = context(tiny_cnn, minibatch=0, minibatches_per_epoch=1)
    RegularizationPolicy(Ridge("fc.weight", threshold=0.2)).on_minibatch_end(ctx)
    weight = tiny_cnn.fc.weight.detach()
    assert (weight == 0).any()
    assert (weight[weight != 0].abs() > 0.2).all()
    assert ctx.masks.masked() == {}


@pytest.mark.parametrize(("epoch", "minibatch", "kept"), [(0, 1, False), (1, 0, False), (1, 1, True)])
def test_keep_mask_keeps_the_mask_of_the_very_last_minibatch(tiny_cnn, epoch, minibatch, kept):
    ctx = context(tiny_cnn, epoch, last=1, minibatch=minibatch, minibatches_per_epoch=2)
    RegularizationPolicy(Ridge("fc.weight", threshold=0.2), keep_mask=True).on_minibatch_end(ctx)
    assert ("fc.weight" in ctx.masks.masked()) == kept


def test_a_pruners_and_a_regularizers_mask_multiply(tiny_cnn):
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(PruningPolicy(HalfPruner("fc.weight")), epochs=[0])
    scheduler.add_policy(RegularizationPolicy(Ridge("fc.weight", threshold=0.3), keep_mask=True), epochs=[0])
    train(tiny_cnn, scheduler, range(2))
    pruned = scheduler.masks["fc.weight"].slots
    assert set(pruned) == {"pruner", "regularizer ridge"}
    kept = pruned["pruner"] * pruned["regularizer ridge"]
    assert torch.equal(tiny_cnn.fc.weight != 0, kept != 0)


def test_a_quantizer_prepares_at_once_and_quantizes_after_each_step(tiny_cnn):
    calls = []

    class Recorder:
        def prepare_model(self, dummy_input=None):
            calls.append("prepare")

        def quantize_params(self):
            calls.append("quantize")

    policy = QuantizationPolicy(Recorder())
    assert calls == ["prepare", "quantize"]
    policy.on_minibatch_end(context(tiny_cnn))
    assert calls == ["prepare", "quantize", "quantize"]


def learning_rates(model, policy_of, epochs, **window):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = CompressionScheduler(model)
    scheduler.add_policy(LRPolicy(policy_of(optimizer)), **window)
    rates = []
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.on_epoch_end(epoch, optimizer, {"loss": 1.0, "top1": 10.0})
    return rates


def test_a_learning_rate_is_a_function_of_the_absolute_epoch(tiny_cnn):
    def step_lr(optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.1)

    rates = learning_rates(tiny_cnn, step_lr, 9, starting_epoch=2, ending_epoch=20)
    assert rates == pytest.approx([1.0] * 4 + [0.1] * 4 + [0.01])
    late = learning_rates(tiny_cnn, step_lr, 9, starting_epoch=6, ending_epoch=20)
    assert late == pytest.approx([1.0] * 7 + [0.1] + [0.01])


@pytest.mark.parametrize("mode", ["min", "max"])
def test_reduce_on_plateau_watches_loss_or_top1(tiny_cnn, mode):
    def plateau(optimizer):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode=mode, factor=0.5, patience=1)

    rates = learning_rates(tiny_cnn, plateau, 5, starting_epoch=0, ending_epoch=20)
    assert rates == [1.0, 1.0, 1.0, 0.5, 0.5]


def test_fold_batchnorm_ranks_by_the_gain_of_the_batch_norm_that_follows(tiny_cnn):
    seen = {}

    class Noting(HalfPruner):
        def compute_masks(self, params, ctx):
            seen.update(params)
            return super().compute_masks(params, ctx)

    with torch.no_grad():
        tiny_cnn.bn1.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tiny_cnn.bn1.running_var.copy_(torch.tensor([4.0, 4.0, 1.0, 1.0]))
    weights = {name: param.detach().clone() for name, param in tiny_cnn.named_parameters()}
    policy = PruningPolicy(Noting("conv?.weight"), {"fold_batchnorm": True})
    policy.on_epoch_begin(context(tiny_cnn))
    gain = torch.tensor([0.5, 1.0, 3.0, 4.0]).view(4, 1, 1, 1)
    torch.testing.assert_close(seen["conv1.weight"], weights["conv1.weight"] * gain, rtol=1e-4, atol=0)
    assert torch.equal(seen["conv2.weight"], weights["conv2.weight"])  # no batch norm follows
    assert torch.equal(tiny_cnn.conv1.weight, weights["conv1.weight"])


@pytest.mark.parametrize("is_function", [True, False])
def test_fold_batchnorm_leaves_weights_alone_that_no_norm_of_their_filters_follows(is_function):
    """Behind a linear layer on sequences the norm's channels are places; a function has no gain to look up."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input_shape = (2, 4, 3)
            self.layer, self.norm = nn.Linear(3, 5), nn.BatchNorm1d(4)

        def forward(self, x):
            x = self.layer(x)
            return (
                F.batch_norm(x, self.norm.running_mean, self.norm.running_var)
                if is_function
                else self.norm(x)
            )

    seen = {}

    class Noting(HalfPruner):
        def compute_masks(self, params, ctx):
            seen.update(params)
            return super().compute_masks(params, ctx)

    model = Net()
    PruningPolicy(Noting("layer.weight"), {"fold_batchnorm": True}).on_epoch_begin(context(model))
    assert torch.equal(seen["layer.weight"], model.layer.weight)


def test_fold_batchnorm_takes_nothing_from_the_global_random_numbers(tiny_cnn):
    """A resumed run looks at the graph again; the uninterrupted one did so once, earlier."""
    before = torch.get_rng_state()
    PruningPolicy(HalfPruner("conv1.weight"), {"fold_batchnorm": True}).on_epoch_begin(context(tiny_cnn))
    assert torch.equal(torch.get_rng_state(), before)


def test_fold_batchnorm_needs_the_shape_of_the_input():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    with pytest.raises(DistillerError, match="'fold_batchnorm' needs the shape of the model's input"):
        PruningPolicy(HalfPruner("0.weight"), {"fold_batchnorm": True}).on_epoch_begin(context(model))


def test_fold_batchnorm_needs_running_statistics_and_says_so_before_training(tiny_cnn):
    tiny_cnn.bn1 = nn.BatchNorm2d(tiny_cnn.bn1.num_features, track_running_stats=False)
    policy = PruningPolicy(HalfPruner("conv1.weight"), {"fold_batchnorm": True})
    with pytest.raises(DistillerError) as caught:
        policy.check(tiny_cnn)
    assert str(caught.value) == (
        "fold_batchnorm: 'bn1' keeps no running statistics to fold; "
        "make it with track_running_stats=True, or leave fold_batchnorm out"
    )


def test_a_policys_levels_stand_in_for_the_pruners_in_that_policy_only():
    """The pruner may serve several policies; a resumed run must not depend on which was asked last."""
    pruner = SparsityLevelParameterPruner("p", {"fc.weight": 0.25})
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(4, 4))
    with_levels, without = PruningPolicy(pruner, {"levels": {"*": 0.5}}), PruningPolicy(pruner)
    ctx = context(model)
    with_levels.on_epoch_begin(ctx)
    assert set(ctx.masks.masked()) == {"fc.weight", "fc.bias"}
    assert (ctx.masks["fc.weight"].mask == 0).sum() == 8
    assert with_levels.target_sparsity(ctx) == {"*": 0.5}
    without.on_epoch_begin(ctx)
    assert (ctx.masks["fc.weight"].mask == 0).sum() == 4
    assert pruner.levels == {"fc.weight": 0.25}


def test_levels_are_for_pruners_that_have_levels():
    with pytest.raises(DistillerError, match="'levels' is for pruners that have levels; HalfPruner has none"):
        PruningPolicy(HalfPruner("fc.weight"), {"levels": {"*": 0.5}})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"mask_gradients": True}, "'mask_gradients' needs 'mask_on_forward_only: true'"),
        (
            {"use_double_copies": True},
            "'use_double_copies' needs 'mask_on_forward_only: true'; without it masks act after each step too, "
            "and nothing is left of the dense copies",
        ),
        (
            {"keep_mask": True, "discard_masks_at_minibatch_end": True},
            "'keep_mask' has no mask to keep with 'discard_masks_at_minibatch_end'; leave one of them out",
        ),
        (
            {"mini_batch_pruning_frequency": 10**12},
            "'mini_batch_pruning_frequency' must be at most 1000000000, got 1000000000000",
        ),
        ({"mini_batch_pruning_frequency": -1}, "'mini_batch_pruning_frequency' must be 0 or more, got -1"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, text):
    with pytest.raises(DistillerError) as caught:
        PruningArgs(**arguments)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("frequency", "start", "last", "is_told"),
    [
        (3, 0, 0, False),
        (4, 0, 5, True),
        (7, 0, 0, True),
        (7, 0, 1, False),
        (7, 2, 2, True),
        (100, 0, 5, True),
    ],
)
def test_a_frequency_that_never_comes_is_told_when_the_policy_begins(
    tiny_cnn, caplog, frequency, start, last, is_told
):
    """Of 4 mini-batches an epoch, the first of which has new masks anyhow."""
    scheduler = CompressionScheduler(tiny_cnn)
    policy = PruningPolicy(HalfPruner("conv2.weight"), {"mini_batch_pruning_frequency": frequency})
    scheduler.add_policy(policy, epochs=list(range(start, last + 1)))
    train(tiny_cnn, scheduler, range(start, last + 1), batches=4)
    assert [record.getMessage() for record in caplog.records] == [
        f"HalfPruner: mini_batch_pruning_frequency {frequency}: never comes in epochs {start}..{last}, of 4 "
        "mini-batches each; masks are computed once an epoch"
    ] * is_told


class Watcher(DataDrivenPruner):
    """Masks every other element once it has seen something; doubles what stays."""

    def __init__(self, *weights: str) -> None:
        self.name, self.weights = "watcher", weights
        self.diary: list[tuple[str, Any]] = []

    def select(self, param_names):
        return resolve_all(self.weights, param_names)

    def attach(self, model):
        self.diary.append(("attach", self.seen))

    def detach(self):
        self.diary.append(("detach", self.seen))

    def reset(self):
        self.seen = 0

    def after_backward(self, params, ctx):
        assert all(param.grad is not None for param in params.values())
        self.seen += 1

    def compute_masks(self, params, ctx):
        self.diary.append(("masks", ctx.minibatch))
        return {name: every_other(param) for name, param in params.items()}

    def refitted(self, params, masks):
        return {name: 2 * params[name] * mask for name, mask in masks.items()}


@pytest.mark.parametrize(
    ("batches", "diary"),
    [
        # few mini-batches: the first masks come after the last of them, the next at the epoch's beginning
        (3, ["attach 0", "masks 2", "detach 0", "attach 0", "masks 2", "detach 0"]),
        (12, ["attach 0", "masks 10", "detach 2", "attach 2", "masks None", "detach 12"]),
    ],
)
def test_a_data_driven_pruner_is_asked_when_it_has_seen_data(tiny_cnn, batches, diary):
    scheduler, pruner = CompressionScheduler(tiny_cnn), Watcher("conv2.weight")
    scheduler.add_policy(PruningPolicy(pruner), epochs=[0, 2])
    assert train(tiny_cnn, scheduler, range(4), batches=batches) == [0.5] * 4
    assert [f"{word} {number}" for word, number in pruner.diary] == diary


def test_weights_are_refitted_with_new_masks(tiny_cnn):
    scheduler, pruner = CompressionScheduler(tiny_cnn), Watcher("conv2.weight")
    scheduler.add_policy(PruningPolicy(pruner), epochs=[0])
    before = tiny_cnn.conv2.weight.detach().clone()
    pruner.seen = 1
    scheduler.on_epoch_begin(0)
    assert torch.equal(tiny_cnn.conv2.weight, 2 * before * every_other(before))


@pytest.mark.parametrize("args", [{}, {"mask_on_forward_only": True}])
def test_masks_that_rescale_must_not_act_on_the_weights_for_good(tiny_cnn, args):
    policy = PruningPolicy(BernoulliFilterPruner("b", "Filters", 0.5, ["conv2.weight"]), args)
    with pytest.raises(DistillerError) as caught:
        policy.check(tiny_cnn)
    assert str(caught.value) == (
        "BernoulliFilterPruner scales up what it keeps, which would grow at every step; "
        "it needs args: {use_double_copies: true, mask_on_forward_only: true}"
    )


@pytest.mark.parametrize(("keeps", "final"), [(True, [False, False, True]), (False, [True] * 3)])
def test_a_regularizer_has_its_final_sparsity_when_the_mask_that_it_keeps_is_found(tiny_cnn, keeps, final):
    scheduler = CompressionScheduler(tiny_cnn)
    policy = RegularizationPolicy(Ridge("fc.weight", threshold=0.1), keep_mask=keeps)
    scheduler.add_policy(policy, starting_epoch=0, ending_epoch=3)
    assert [scheduler.pruning_is_complete(epoch) for epoch in range(3)] == final
