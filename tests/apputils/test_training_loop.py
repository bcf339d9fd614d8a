from __future__ import annotations

import pytest
import torch
from torch import nn

from distiller.apputils.training_loop import evaluate, train_epoch
from distiller.errors import DivergenceError, UsageError
from distiller.interfaces import LossComponent, Policy, PolicyLoss
from distiller.policy import PruningPolicy, RegularizationPolicy
from distiller.regularization.regularizers import L1Regularizer
from distiller.scheduler import CompressionScheduler
from tests.doubles import HalfPruner


@pytest.fixture
def optimizer(tiny_cnn):
    return torch.optim.SGD(tiny_cnn.parameters(), lr=0.05, momentum=0.9)


def test_an_epoch_does_what_a_plain_loop_does(tiny_cnn, tiny_loader, optimizer):
    import copy

    plain = copy.deepcopy(tiny_cnn)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    plain.train()
    losses, correct = [], 0
    for images, labels in tiny_loader:
        logits = plain(images)
        loss = nn.functional.cross_entropy(logits, labels)
        plain_optimizer.zero_grad()
        loss.backward()
        plain_optimizer.step()
        losses.append(loss.item())
        correct += int((logits.argmax(1) == labels).sum())

    result = train_epoch(tiny_cnn, tiny_loader, optimizer, CompressionScheduler(tiny_cnn), 3)
    assert tiny_loader.epoch == 3
    assert all(
        torch.equal(a, b)
        for a, b in zip(tiny_cnn.state_dict().values(), plain.state_dict().values(), strict=True)
    )
    assert result.loss == pytest.approx(sum(losses) / 3)
    assert result.top1_correct == correct
    assert result.n == 24


def test_masks_are_in_force_in_every_forward_pass(tiny_cnn, tiny_loader, optimizer):
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(PruningPolicy(HalfPruner("conv2.weight")), epochs=[0])
    zeros = []
    tiny_cnn.conv2.register_forward_pre_hook(lambda m, _: zeros.append((m.weight == 0).float().mean().item()))
    scheduler.on_epoch_begin(0, optimizer)
    train_epoch(tiny_cnn, tiny_loader, optimizer, scheduler, 0)
    assert zeros == [0.5] * 3


class Penalty(Policy):
    """Adds 2, 3, 4, ... to the loss of one mini-batch after the other."""

    def before_backward_pass(self, ctx, loss):
        assert ctx.minibatch is not None
        value = torch.tensor(2.0 + ctx.minibatch)
        return PolicyLoss(loss + value, (LossComponent("Penalty_loss", value),))


def test_progress_is_reported_with_the_parts_of_the_loss(tiny_cnn, tiny_loader, optimizer):
    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(Penalty(), epochs=[0])
    seen = []
    train_epoch(tiny_cnn, tiny_loader, optimizer, scheduler, 0, report=seen.append)
    assert [(progress.phase, progress.step, progress.steps) for progress in seen] == [
        ("train", s, 3) for s in (1, 2, 3)
    ]
    assert list(seen[0].read_parts()) == ["Objective Loss", "Penalty_loss"]


def test_overall_objective_and_penalties_are_means_over_the_same_mini_batches(
    tiny_cnn, tiny_loader, optimizer
):
    """The objective was once that of the last mini-batch, and stood beside a mean overall loss."""
    tiny_loader.batches[2] = tuple(part[:2] for part in tiny_loader.batches[2])  # a small last mini-batch
    objectives = []

    def criterion(logits, labels):
        objectives.append(nn.functional.cross_entropy(logits, labels))
        return objectives[-1]

    scheduler = CompressionScheduler(tiny_cnn)
    scheduler.add_policy(Penalty(), epochs=[0])
    read = []
    result = train_epoch(
        tiny_cnn, tiny_loader, optimizer, scheduler, 0, criterion=criterion,
        report=lambda progress: read.append((progress.read(), progress.read_parts())),
    )  # fmt: skip
    first, second, third = (loss.item() for loss in objectives)
    means = [first, (first + second) / 2, (8 * first + 8 * second + 2 * third) / 18]
    penalties = [2, 2.5, (8 * 2 + 8 * 3 + 2 * 4) / 18]
    for (overall, parts), objective, penalty in zip(read, means, penalties, strict=True):
        assert parts == pytest.approx({"Objective Loss": objective, "Penalty_loss": penalty})
        assert overall.loss == pytest.approx(objective + penalty)
    assert result.loss == pytest.approx(means[2] + penalties[2])  # what is returned is the overall loss


def test_an_evaluation_has_no_parts_of_the_loss(tiny_cnn, tiny_loader):
    seen = []
    evaluate(tiny_cnn, tiny_loader, report=seen.append)
    assert seen[-1].read_parts() == {}


@pytest.mark.parametrize("check_every", [1, 100])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_from_the_start_is_not_blamed_on_the_learning_rate(
    tiny_cnn, tiny_loader, optimizer, value, check_every
):
    with torch.no_grad():
        tiny_cnn.fc.bias.fill_(value)
    with pytest.raises(DivergenceError) as error:
        train_epoch(
            tiny_cnn, tiny_loader, optimizer, CompressionScheduler(tiny_cnn), 2, check_every=check_every
        )
    assert str(error.value) == (
        "epoch 2, mini-batch 0: the training loss is nan before the epoch's first step: the images, the weights or "
        "the model's output are not finite from its start; training stops here"
    )


def test_a_loss_that_is_no_longer_finite_stops_training(tiny_cnn, tiny_loader):
    optimizer = torch.optim.SGD(tiny_cnn.parameters(), lr=1e38)
    with pytest.raises(DivergenceError) as error:
        train_epoch(tiny_cnn, tiny_loader, optimizer, CompressionScheduler(tiny_cnn), 2, check_every=1)
    assert str(error.value) == (
        "epoch 2, mini-batch 1: the training loss is nan; training stops here; try a lower learning rate"
    )


def test_what_is_added_to_the_loss_may_be_why_it_is_no_longer_finite(tiny_cnn, tiny_loader):
    optimizer = torch.optim.SGD(tiny_cnn.parameters(), lr=1e38)
    scheduler = CompressionScheduler(tiny_cnn)
    regularizer = L1Regularizer("small_fc", tiny_cnn, {"fc.weight": 1e-3}, None)
    scheduler.add_policy(RegularizationPolicy(regularizer), epochs=[0])
    with pytest.raises(DivergenceError) as error:
        train_epoch(tiny_cnn, tiny_loader, optimizer, scheduler, 0, check_every=1)
    assert str(error.value).endswith("try a lower learning rate, or a smaller weight for L1Regularizer_loss")


def test_evaluation_leaves_the_model_as_it_was(tiny_cnn, tiny_loader):
    before = {name: value.clone() for name, value in tiny_cnn.state_dict().items()}
    tiny_cnn.train()
    result = evaluate(tiny_cnn, tiny_loader, num_classes=4)
    assert tiny_cnn.training
    assert all(torch.equal(before[name], value) for name, value in tiny_cnn.state_dict().items())
    tiny_cnn.eval()
    logits = torch.cat([tiny_cnn(images) for images, _ in tiny_loader])
    labels = torch.cat([labels for _, labels in tiny_loader])
    assert result.top1_correct == int((logits.argmax(1) == labels).sum())
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert int(result.confusion.sum()) == 24


def test_auxiliary_classifiers_weigh_in_as_in_their_papers(tiny_loader):
    from collections import namedtuple

    outputs = namedtuple("GoogLeNetOutputs", ["logits", "aux_logits2", "aux_logits1"])

    class WithAuxiliaries(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 4)

        def forward(self, x):
            logits = self.fc(x.flatten(1))
            return outputs(logits, 0 * logits, None) if self.training else logits

    model = WithAuxiliaries()
    images, labels = tiny_loader.batches[0]
    loss = nn.functional.cross_entropy(model.fc(images.flatten(1)), labels).item()
    uniform = torch.log(torch.tensor(4.0)).item()
    tiny_loader.batches = tiny_loader.batches[:1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    result = train_epoch(model, tiny_loader, optimizer, CompressionScheduler(model), 0)
    assert result.loss == pytest.approx(loss + 0.3 * uniform, rel=1e-5)


LEFT_OVER = (
    "training: a mini-batch of one image is left over at the end of an epoch (or is asked for), of which a batch "
    "norm over maps of 1x1 sees a single value for each channel, that has no variance; give another --batch-size, "
    "or --effective-train-size"
)


class Pooled(nn.Sequential):
    """Has a batch norm over maps of 1x1."""

    def __init__(self):
        pool, norm = nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(1)
        super().__init__(pool, norm, nn.Dropout(0.5), nn.Flatten(), nn.Linear(1, 2))


class Images(list):
    def set_epoch(self, epoch):
        pass


def test_a_batch_norm_that_sees_a_single_value_is_explained():
    """It was torch's ValueError, as a traceback."""
    model = Pooled()
    scheduler = CompressionScheduler(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = Images((torch.randn(n, 1, 4, 4), torch.zeros(n, dtype=torch.long)) for n in (3, 1))
    with pytest.raises(UsageError) as error:
        train_epoch(model, batches, optimizer, scheduler, 0)
    assert str(error.value) == LEFT_OVER


def test_other_errors_of_a_model_are_its_own():
    class Broken(nn.Module):
        def forward(self, x):
            raise ValueError("mine")

    batches = Images([(torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.long))])
    model = nn.Sequential(Broken(), nn.Linear(1, 1))
    with pytest.raises(ValueError, match="^mine$"):
        train_epoch(model, batches, torch.optim.SGD(model.parameters()), CompressionScheduler(model), 0)
