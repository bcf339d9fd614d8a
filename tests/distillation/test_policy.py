from __future__ import annotations

import copy
import io
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import distiller
from distiller.apputils.training_loop import evaluate, train_epoch
from distiller.distillation import Hint, KnowledgeDistillationPolicy, Teacher, distillation_loss
from distiller.distillation.policy import DistillationLossWeights as Weights
from distiller.errors import CheckpointError, DistillerError, PolicyConflictError, UnknownNameError
from distiller.interfaces import LossComponent, Policy, PolicyLoss
from distiller.policy import PruningPolicy, QuantizationPolicy, RegularizationPolicy
from distiller.pruning import AutomatedGradualPruner
from distiller.quantization import DorefaQuantizer
from distiller.quantization.training import LSQQuantizer
from distiller.regularization import L1Regularizer
from distiller.scheduler import CompressionScheduler
from distiller.thinning import apply_recipe, thinning_recipe
from tests.conftest import TinyCnn

IMAGES, LABELS = torch.randn(24, 1, 8, 8), torch.randint(0, 4, (24,))


class Loader:
    """Mini-batches of 8 of the 24 images, in an order of the epoch's own."""

    def __init__(self, labels=LABELS, augmented=False):
        self.labels, self.augmented = labels, augmented
        self.num_samples, self.batch_size = 24, 8

    def set_epoch(self, epoch):
        self.generator = torch.Generator().manual_seed(epoch)

    def __len__(self):
        return 3

    def __iter__(self):
        order = torch.randperm(24, generator=self.generator)
        noise = torch.rand(24, 1, 8, 8, generator=self.generator) if self.augmented else torch.zeros(1)
        images = IMAGES + noise
        for chosen in order.split(8):
            yield images[chosen], self.labels[chosen]


class CountingTeacher(TinyCnn):
    """Counts the images that it sees."""

    def __init__(self):
        super().__init__()
        self.images = 0
        self.modes = set()

    def forward(self, x):
        self.images += len(x)
        self.modes.add(self.training)
        return super().forward(x)


def scheduled(student, *policies, epochs=range(10)):
    scheduler = CompressionScheduler(student)
    for policy in policies:
        scheduler.add_policy(policy, epochs=list(epochs))
    return scheduler


def train(student, scheduler, epochs=range(3), loader=None, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    for epoch in epochs:
        scheduler.on_epoch_begin(epoch, optimizer)
        train_epoch(student, loader or Loader(), optimizer, scheduler, epoch)
        scheduler.on_epoch_end(epoch, optimizer, {"loss": 1.0, "top1": 50.0})
    return optimizer


def one_step(student, *policies, criterion=F.cross_entropy, images=IMAGES[:8], forward=None):
    """The loss of one mini-batch, and its parts."""
    scheduler = scheduled(student, *policies)
    student.train()
    scheduler.on_epoch_begin(0, None)
    scheduler.on_minibatch_begin(0, 0, 1, None)
    loss = criterion((forward or student)(images), LABELS[: len(images)])
    found = scheduler.before_backward_pass(0, 0, 1, loss, None, return_loss_components=True)
    assert isinstance(found, PolicyLoss)
    return loss, found


@pytest.fixture
def teacher():
    torch.manual_seed(5)
    return CountingTeacher()


@pytest.fixture
def student():
    torch.manual_seed(6)
    return TinyCnn()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_loss_is_distillers_and_its_logged_part_is_not_scaled(student, teacher, temperature):
    policy = distiller.KnowledgeDistillationPolicy(
        student, teacher, temperature, distiller.DistillationLossWeights(0.7, 0.3, 0)
    )
    loss, found = one_step(student, policy, forward=policy.forward)
    kl = distillation_loss(
        copy.deepcopy(student)(IMAGES[:8]), teacher.eval()(IMAGES[:8]), temperature, "kl", False
    )
    assert found.overall_loss.item() == pytest.approx(
        (0.3 * loss + 0.7 * temperature**2 * kl).item(), rel=1e-5
    )
    ((name, value),) = [(part.name, part.value) for part in found.loss_components]
    assert name == "Distill Loss"
    assert value.item() == pytest.approx(kl.item(), rel=1e-5)


def test_the_defaults_are_distillers(student, teacher):
    policy = KnowledgeDistillationPolicy(student, teacher)
    assert (policy.temperature, policy.loss_weights) == (1.0, (0.5, 0.5, 0.0))


def test_the_loss_of_haiku_by_our_settings(student, teacher):
    """alpha * labels + (1 - alpha) * KL at T = 1."""
    alpha = 0.3
    policy = KnowledgeDistillationPolicy(student, teacher, 1.0, Weights(1 - alpha, alpha))
    loss, found = one_step(student, policy)
    logits, answers = copy.deepcopy(student)(IMAGES[:8]), teacher.eval()(IMAGES[:8])
    kl = (answers.softmax(1) * (answers.log_softmax(1) - logits.log_softmax(1))).sum(1).mean()
    assert found.overall_loss.item() == pytest.approx((alpha * loss + (1 - alpha) * kl).item(), rel=1e-5)


def test_the_teachers_label_loss_is_here_where_distiller_had_none(student, teacher):
    policy = KnowledgeDistillationPolicy(student, teacher, 3.0, Weights(0.0, 0.0, 2.0))
    _, found = one_step(student, policy)
    expected = F.cross_entropy(copy.deepcopy(student)(IMAGES[:8]), teacher.eval()(IMAGES[:8]).argmax(1))
    assert found.overall_loss.item() == pytest.approx(2 * expected.item(), rel=1e-5)
    assert [part.name for part in found.loss_components] == ["Teacher Labels Loss"]


class Adding(Policy):
    """Adds 100 to the loss, as a penalty would."""

    def before_backward_pass(self, ctx, loss):
        return PolicyLoss(loss + 100, (LossComponent("added", torch.tensor(100.0)),))


@pytest.mark.parametrize("is_first", [True, False])
def test_penalties_are_not_weighed_wherever_they_stand(student, teacher, is_first):
    policy = KnowledgeDistillationPolicy(student, teacher, 1.0, Weights(0.0, 0.25, 1.0))
    order = [Adding(), policy] if is_first else [policy, Adding()]
    loss, found = one_step(student, *order)
    labels = F.cross_entropy(copy.deepcopy(student)(IMAGES[:8]), teacher.eval()(IMAGES[:8]).argmax(1))
    assert found.overall_loss.item() == pytest.approx((0.25 * loss + labels + 100).item(), rel=1e-5)
    assert [part.name for part in found.loss_components] == ["Teacher Labels Loss", "added"]


def test_without_labels_the_penalties_stay(student, teacher):
    policy = KnowledgeDistillationPolicy(student, teacher, uses_labels=False)
    penalty = RegularizationPolicy(L1Regularizer("l1", student, {"fc.weight": 0.5}, None))
    _, found = one_step(student, penalty, policy)
    kl = distillation_loss(copy.deepcopy(student)(IMAGES[:8]), teacher.eval()(IMAGES[:8]))
    expected = 0.5 * kl + 0.5 * student.fc.weight.abs().sum()
    assert found.overall_loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("weights", [Weights(0.9, 0.0, 0.3), Weights(1.0, 0.5)])
def test_without_labels_the_labels_do_not_matter(weights, teacher):
    """Shuffled, or all the same: the training is the same, bit for bit."""
    ended = []
    for labels in (LABELS, LABELS[torch.randperm(24)], torch.zeros_like(LABELS)):
        torch.manual_seed(0)
        student = TinyCnn()
        policy = KnowledgeDistillationPolicy(student, copy.deepcopy(teacher), 4.0, weights, uses_labels=False)
        train(student, scheduled(student, policy), loader=Loader(labels))
        ended.append(student.state_dict())
    for other in ended[1:]:
        assert all(torch.equal(value, other[name]) for name, value in ended[0].items())


def test_the_teacher_stays_as_it_is_and_out_of_the_students_checkpoint(student, teacher):
    before = copy.deepcopy(teacher.train().state_dict())
    policy = KnowledgeDistillationPolicy(student, teacher, 2.0)
    pruner = AutomatedGradualPruner("p", 0.1, 0.5, ["conv2.weight"])
    scheduler = scheduled(student, policy, PruningPolicy(pruner), epochs=range(3))
    train(student, scheduler)
    assert teacher.modes == {False}
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    file = io.BytesIO()
    torch.save(scheduler.state_dict()["policies"][0]["state"], file)
    assert len(file.getvalue()) < 8000  # the answers to 24 images
    assert not any("teacher" in name for name in student.state_dict())


def test_a_student_learns_what_its_teacher_answers(student, teacher):
    policy = KnowledgeDistillationPolicy(student, teacher, 2.0, Weights(1, 0), uses_labels=False)
    before = distillation_loss(student(IMAGES), teacher.eval()(IMAGES)).item()
    train(student, scheduled(student, policy, epochs=range(30)), range(30))
    assert distillation_loss(student.eval()(IMAGES), teacher(IMAGES)).item() < 0.5 * before


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_it_leaves_nothing_behind_and_is_not_there_in_evaluations(student, teacher):
    policy = KnowledgeDistillationPolicy(student, teacher, hints=[Hint("relu1", "relu1")])
    scheduler = scheduled(student, policy, epochs=[0])
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    scheduler.on_epoch_begin(0, optimizer)
    assert hooks_of(student) == 0
    scheduler.on_minibatch_begin(0, 0, 1, optimizer)
    assert hooks_of(student) == 3
    student.eval()(IMAGES)
    with pytest.raises(DistillerError) as error:
        scheduler.before_backward_pass(0, 0, 1, torch.zeros(()), optimizer)
    assert str(error.value) == (
        "distillation: the student was not run in training mode between on_minibatch_begin and "
        "before_backward_pass; call the model that the scheduler has (or the policy's forward)"
    )
    assert hooks_of(student) == 0
    train(student, scheduler, range(1), optimizer=optimizer)
    seen = teacher.images
    evaluate(student, _set(Loader()))
    train(student, scheduler, range(1, 2), optimizer=optimizer)  # its window has closed
    assert teacher.images == seen
    assert hooks_of(student) + hooks_of(teacher) == 0


def _set(loader):
    loader.set_epoch(0)
    return loader


def test_an_exception_in_the_forward_pass_is_survived(student, teacher):
    policy = KnowledgeDistillationPolicy(student, teacher)
    scheduler = scheduled(student, policy)
    scheduler.on_minibatch_begin(0, 0, 1, None)
    with pytest.raises(RuntimeError):
        student(torch.zeros(1, 9, 8, 8))
    scheduler.on_minibatch_begin(0, 0, 1, None)
    assert hooks_of(student) == 2
    scheduler.on_epoch_end(0, None, {"loss": 1.0, "top1": 50.0})
    assert hooks_of(student) == 0


def test_answers_are_computed_once_for_each_image(student, teacher):
    policy = KnowledgeDistillationPolicy(student, teacher, 4.0)
    train(student, scheduled(student, policy), range(5))
    assert teacher.images == 24


def test_of_augmented_images_none_are_kept(student, teacher):
    policy = KnowledgeDistillationPolicy(student, teacher, 4.0)
    train(student, scheduled(student, policy), range(4), Loader(augmented=True))
    assert teacher.images == 4 * 24
    assert policy.state_dict()["answers"]["digests"] is None


def test_kept_answers_train_as_computed_ones_do(teacher):
    ended = []
    for keeps in (True, False):
        torch.manual_seed(0)
        student = TinyCnn()
        policy = KnowledgeDistillationPolicy(student, teacher, 4.0, cache_logits=keeps)
        train(student, scheduled(student, policy), range(4))
        ended.append(student.state_dict())
    for name, value in ended[0].items():
        assert torch.allclose(value, ended[1][name], atol=1e-4), name


def test_hints_join_the_loss_and_need_the_teacher_each_time(student, teacher):
    hints = [Hint("conv2", "conv1", 0.5), Hint("relu2", "relu2", 3.0, "attention")]
    policy = KnowledgeDistillationPolicy(student, teacher, 1.0, Weights(0, 1), hints=hints)
    loss, found = one_step(student, policy)
    parts = {part.name: part.value for part in found.loss_components}
    assert list(parts) == ["Hint Loss conv1 (fitnets)", "Hint Loss relu2 (attention)"]
    expected = loss + 0.5 * parts["Hint Loss conv1 (fitnets)"] + 3 * parts["Hint Loss relu2 (attention)"]
    assert found.overall_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    teacher.images = 0
    train(student, scheduled(student, policy), range(3))
    assert teacher.images == 3 * 24


def test_several_teachers(student, teacher):
    torch.manual_seed(9)
    other = TinyCnn()
    policy = KnowledgeDistillationPolicy(
        student, [Teacher(teacher, 3.0), Teacher(other, 1.0)], 2.0, Weights(1, 0)
    )
    _, found = one_step(student, policy)
    logits = copy.deepcopy(student)(IMAGES[:8])
    with torch.no_grad():
        answers = 0.75 * (teacher.eval()(IMAGES[:8]) / 2).softmax(1) + 0.25 * (other(IMAGES[:8]) / 2).softmax(
            1
        )
    kl = (answers * (answers.log() - (logits / 2).log_softmax(1))).sum(1).mean()
    assert found.overall_loss.item() == pytest.approx(4 * kl.item(), rel=1e-4)


class Exits(TinyCnn):
    """An exit before the final one."""

    def forward(self, x):
        final = super().forward(x)
        return [2 * final, final]


class WithAuxiliary(NamedTuple):
    logits: torch.Tensor
    aux_logits: torch.Tensor


class Inception(TinyCnn):
    def forward(self, x):
        final = super().forward(x)
        return WithAuxiliary(final, 3 * final) if self.training else final


@pytest.mark.parametrize("kind", [Exits, Inception])
def test_of_several_outputs_the_final_one_is_distilled(teacher, kind):
    torch.manual_seed(6)
    student = kind()
    policy = KnowledgeDistillationPolicy(student, teacher, 2.0, Weights(1, 0))
    _, found = one_step(student, policy, criterion=lambda output, labels: output[0].sum())
    plain = TinyCnn()
    plain.load_state_dict(student.state_dict())
    expected = distillation_loss(plain(IMAGES[:8]), teacher.eval()(IMAGES[:8]), 2.0)
    assert found.overall_loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("quantizer", [DorefaQuantizer, LSQQuantizer])
def test_a_student_in_quantization_aware_training_learns_from_a_float_teacher(teacher, quantizer):
    """Apprentice (arXiv 1711.05852)."""
    torch.manual_seed(6)
    student = TinyCnn()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    prepared = quantizer(student, optimizer, bits_activations=4, bits_weights=4)
    prepared.prepare_model()
    policy = KnowledgeDistillationPolicy(student, teacher, 2.0, Weights(1, 0), uses_labels=False)
    scheduler = scheduled(student, QuantizationPolicy(prepared), policy, epochs=range(20))
    train(student, scheduler, range(1), optimizer=optimizer)
    early = distillation_loss(student.eval()(IMAGES), teacher.eval()(IMAGES)).item()
    train(student, scheduler, range(1, 12), optimizer=optimizer)
    assert distillation_loss(student.eval()(IMAGES), teacher(IMAGES)).item() < early
    assert {param.dtype for param in teacher.parameters()} == {torch.float32}
    assert teacher.images == 24 + 2 * 24  # the training, and the two lines above


def test_a_student_that_is_pruned_and_thinned_goes_on_learning(student, teacher):
    from distiller.channel_groups import find_channel_groups

    pruner = AutomatedGradualPruner("p", 0.1, 0.5, ["fc.weight"])
    policy = KnowledgeDistillationPolicy(student, teacher, 2.0, hints=[Hint("conv2", "conv1")])
    scheduler = scheduled(student, PruningPolicy(pruner), policy, epochs=range(4))
    optimizer = train(student, scheduler, range(2))
    groups = find_channel_groups(student, torch.zeros(student.input_shape))
    recipe = thinning_recipe(student, groups, {"conv1.weight": [1], "conv2.weight": [0, 5]})
    apply_recipe(student, recipe, optimizer, scheduler.masks, [policy])
    train(student, scheduler, range(2, 4), optimizer=optimizer)
    assert student.conv2.weight.shape[:2] == (4, 3)
    assert policy.state_dict()["hints"]["0"]["weight"].shape == (6, 3)
    assert (student.fc.weight == 0).float().mean() >= 0.45
    assert teacher.conv2.weight.shape[:2] == (6, 4)


def test_a_student_that_is_wrapped_or_laid_out_otherwise(teacher):
    found = []
    for change in (lambda m: m, nn.DataParallel, lambda m: m.to(memory_format=torch.channels_last)):
        torch.manual_seed(6)
        student = change(TinyCnn())
        policy = KnowledgeDistillationPolicy(student, teacher, 2.0)
        found.append(one_step(student, policy)[1].overall_loss.item())
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_a_restart_changes_nothing(teacher):
    def parts():
        torch.manual_seed(6)
        student = TinyCnn()
        policy = KnowledgeDistillationPolicy(student, copy.deepcopy(teacher), 2.0)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
        return student, policy, optimizer, scheduled(student, policy)

    student, policy, optimizer, scheduler = parts()
    train(student, scheduler, range(2), optimizer=optimizer)
    saved = copy.deepcopy((student.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    train(student, scheduler, range(2, 4), optimizer=optimizer)
    again, policy, optimizer, scheduler = parts()
    for what, state in zip((again, optimizer, scheduler), saved, strict=True):
        what.load_state_dict(state)
    assert policy.state_dict()["answers"]["answers"].shape == (24, 1, 4)
    train(again, scheduler, range(2, 4), optimizer=optimizer)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in student.state_dict().items())


def test_another_teacher_after_a_restart_is_refused(student, teacher):
    state = KnowledgeDistillationPolicy(student, teacher).state_dict()
    told = (
        "distillation: the teacher has other weights than when the checkpoint was written; give the teacher of "
        "that run, or start anew with --reset-optimizer"
    )
    with pytest.raises(CheckpointError) as error:
        KnowledgeDistillationPolicy(student, TinyCnn()).load_state_dict(state)
    assert str(error.value) == told
    late = KnowledgeDistillationPolicy(student, None)
    late.load_state_dict(state)
    with pytest.raises(CheckpointError) as error:
        late.learn_from(TinyCnn())
    assert str(error.value) == told
    late.learn_from(teacher)


def test_two_at_once_are_refused(student, teacher):
    first = KnowledgeDistillationPolicy(student, teacher)
    scheduler = scheduled(student, first, epochs=[0, 1])
    with pytest.raises(PolicyConflictError) as error:
        scheduler.add_policy(KnowledgeDistillationPolicy(student, teacher), epochs=[1])
    assert str(error.value) == (
        "'KnowledgeDistillationPolicy' (epochs 0..1) and 'KnowledgeDistillationPolicy' (epochs 1..1) both weigh "
        "the loss of the labels; let one end before the other begins, or make one of them (a distillation may "
        "have several teachers)"
    )
    scheduler.add_policy(KnowledgeDistillationPolicy(student, teacher), epochs=[2])


class InPlace(TinyCnn):
    def forward(self, x):
        return super().forward(x.mul_(2))


def test_a_student_that_changes_its_inputs_is_refused(teacher):
    student = InPlace()
    with pytest.raises(DistillerError) as error:
        one_step(student, KnowledgeDistillationPolicy(student, teacher), images=IMAGES[:8].clone())
    assert str(error.value) == (
        "distillation: the student changes its inputs in place, so that its teacher would see others; let it work "
        "on a copy"
    )


def test_a_policy_without_a_teacher_does_not_train(student):
    with pytest.raises(DistillerError) as error:
        train(student, scheduled(student, KnowledgeDistillationPolicy(student, None)))
    assert str(error.value) == (
        "distillation: there is no teacher; name it in the schedule (teacher: {arch: ..., checkpoint: ...}), "
        "give --kd-teacher and --kd-resume, or call learn_from"
    )


def test_a_student_does_not_teach_itself(student):
    with pytest.raises(
        DistillerError, match="the teacher has parameters of the student, which would not learn"
    ):
        KnowledgeDistillationPolicy(student, student)
    KnowledgeDistillationPolicy(student, copy.deepcopy(student))


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"temperature": 0}, "temperature must be a number from 0.01 to 1000, got 0"),
        ({"temperature": float("nan")}, "temperature must be a number from 0.01 to 1000, got nan"),
        (
            {"loss_weights": Weights(-1.0, 0.5)},
            "the weight 'distill' of distillation must be 0 or more, got -1.0",
        ),
        ({"hints": [Hint("a", "conv1", 0)]}, "hints: the weight of 'conv1' must be more than 0, got 0"),
        (
            {"loss_weights": Weights(0, 1, 0)},
            "distillation: nothing to learn from the teacher: the weights 'distill' and 'teacher' are 0 and "
            "there are no hints",
        ),
    ],
)
def test_settings_out_of_range(student, teacher, settings, told):
    with pytest.raises(DistillerError) as error:
        KnowledgeDistillationPolicy(student, teacher, **settings)
    assert str(error.value) == told


def test_layers_of_hints_are_looked_up_at_once(student, teacher):
    with pytest.raises(UnknownNameError, match="no module 'conv9'"):
        KnowledgeDistillationPolicy(student, teacher, hints=[Hint("conv9", "conv1")])
    policy = KnowledgeDistillationPolicy(student, teacher, hints=[Hint("conv1", "conv9")])
    with pytest.raises(UnknownNameError, match="no module 'conv9'"):
        scheduled(student, policy)


def test_it_describes_itself(student, teacher):
    policy = KnowledgeDistillationPolicy(
        student, teacher, 4.0, Weights(0.7, 0.3, 0.1), hints=[Hint("relu1", "relu1", kind="attention")]
    )
    assert policy.describe(None) == (
        "KnowledgeDistillationPolicy: from the teacher: 0.3 x labels + 0.7 x distillation at T 4 + 0.1 x its "
        "labels + 1 x relu1 (attention)"
    )
