from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import entropy

from distiller.distillation.losses import (
    attention_loss,
    attention_map,
    blended_log_probabilities,
    distillation_loss,
    divergence,
    hint_loss,
    softened_log_probabilities,
    teacher_label_loss,
)
from distiller.errors import DistillerError

STUDENT = np.array([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0], [1.0, 1.0, 1.0], [-4.0, 0.25, 4.0]])
TEACHER = np.array([[1.0, 0.0, -1.0], [0.5, 2.5, 0.0], [3.0, 0.0, 0.0], [-1.0, 0.0, 2.0]])
LABELS = np.array([0, 1, 0, 2])


def tensors():
    return torch.tensor(STUDENT), torch.tensor(TEACHER)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 15.0])
def test_kl_is_scipys_relative_entropy_over_the_classes(temperature):
    student, teacher = tensors()
    expected = np.mean(
        [
            entropy(softmax(t / temperature), softmax(s / temperature))
            for s, t in zip(STUDENT, TEACHER, strict=True)
        ]
    )
    ours = distillation_loss(student, teacher, temperature, scale_by_temperature_squared=False)
    assert ours.item() == pytest.approx(expected, rel=1e-12)
    squared = distillation_loss(student, teacher, temperature)
    assert squared.item() == pytest.approx(temperature**2 * expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_cross_entropy_is_kl_and_the_teachers_entropy(temperature):
    student, teacher = tensors()
    expected = -(softmax(TEACHER / temperature, 1) * log_softmax(STUDENT / temperature, 1)).sum(1).mean()
    ours = distillation_loss(student, teacher, temperature, "cross_entropy", False)
    assert ours.item() == pytest.approx(expected, rel=1e-12)
    kl = distillation_loss(student, teacher, temperature, "kl", False)
    own = entropy(softmax(TEACHER / temperature, 1), axis=1).mean()
    assert (ours - kl).item() == pytest.approx(own, rel=1e-12)


def test_the_softmax_is_over_the_classes_not_over_the_batch():
    """Defect of okz12's DistillationLoss: softmax over dimension 0, and a mean over all elements."""
    student, teacher = tensors()
    alone = [distillation_loss(student[i : i + 1], teacher[i : i + 1], 2.0).item() for i in range(4)]
    assert distillation_loss(student, teacher, 2.0).item() == pytest.approx(np.mean(alone), rel=1e-12)
    assert min(alone) > 0.01
    of_the_batch = softmax(TEACHER / 2, 0)
    defective = 2 * 4 * (of_the_batch * (np.log(of_the_batch) - log_softmax(STUDENT / 2, 0))).mean()
    assert distillation_loss(student, teacher, 2.0).item() != pytest.approx(defective, rel=0.01)


def test_the_loss_of_okz_by_our_settings():
    """alpha * cross-entropy with the softened teacher + (1 - alpha) * cross-entropy with the labels, no T^2."""
    student, teacher = tensors()
    alpha, temperature = 0.8, 5.0
    soft = -(softmax(TEACHER / temperature, 1) * log_softmax(STUDENT / temperature, 1)).sum(1).mean()
    hard = -log_softmax(STUDENT, 1)[np.arange(4), LABELS].mean()
    ours = alpha * distillation_loss(student, teacher, temperature, "cross_entropy", False) + (
        1 - alpha
    ) * torch.nn.functional.cross_entropy(student, torch.tensor(LABELS))
    assert ours.item() == pytest.approx(alpha * soft + (1 - alpha) * hard, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-30, 30), min_size=3, max_size=3),
    st.lists(st.floats(-30, 30), min_size=3, max_size=3),
    st.floats(0.5, 20),
)
def test_kl_is_never_negative_and_0_for_the_same_answers(student, teacher, temperature):
    a, b = torch.tensor([student], dtype=torch.float64), torch.tensor([teacher], dtype=torch.float64)
    assert distillation_loss(a, b, temperature) >= -1e-10
    assert abs(distillation_loss(a, a + 3, temperature)) < 1e-9


@settings(max_examples=20, deadline=None)
@given(st.floats(1.0, 10.0))
def test_gradients_are_the_difference_of_probabilities(temperature):
    student, teacher = tensors()
    for kind in ("kl", "cross_entropy"):
        leaf = student.clone().requires_grad_(True)
        distillation_loss(leaf, teacher, temperature, kind, False).backward()
        expected = (softmax(STUDENT / temperature, 1) - softmax(TEACHER / temperature, 1)) / temperature / 4
        np.testing.assert_allclose(leaf.grad.numpy(), expected, atol=1e-14)


def test_no_gradient_flows_into_the_teacher():
    student, teacher = tensors()
    teacher.requires_grad_(True)
    distillation_loss(student.requires_grad_(True), teacher).backward()
    assert teacher.grad is None


def test_several_teachers_speak_with_the_mean_of_their_softened_probabilities():
    other = TEACHER[:, ::-1].copy()
    found = blended_log_probabilities([torch.tensor(TEACHER), torch.tensor(other)], [3, 1], 4.0)
    expected = np.log(0.75 * softmax(TEACHER / 4, 1) + 0.25 * softmax(other / 4, 1))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    alone = blended_log_probabilities([torch.tensor(TEACHER)], [7], 4.0)
    np.testing.assert_allclose(alone.numpy(), log_softmax(TEACHER / 4, 1), rtol=1e-12)


def test_the_teachers_label_is_its_most_likely_class():
    student, teacher = tensors()
    targets = blended_log_probabilities([teacher], [1], 1.0)
    expected = -log_softmax(STUDENT, 1)[np.arange(4), TEACHER.argmax(1)].mean()
    assert teacher_label_loss(student, targets).item() == pytest.approx(expected, rel=1e-12)


def test_half_precision_is_computed_in_float32():
    student, teacher = (tensor.to(torch.bfloat16) for tensor in tensors())
    ours = distillation_loss(student, teacher, 4.0)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(
        distillation_loss(student.double(), teacher.double(), 4.0).item(), rel=1e-5
    )


def test_answers_at_several_places_are_averaged():
    student, teacher = tensors()
    places = torch.stack([student, student], 2), torch.stack([teacher, teacher], 2)
    assert torch.allclose(distillation_loss(*places, 2.0), distillation_loss(student, teacher, 2.0))


@pytest.mark.parametrize(
    "call, told",
    [
        (
            lambda: distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4)),
            "distillation: the student answers with (2, 3), the teacher with (2, 4); both must have the same classes",
        ),
        (
            lambda: softened_log_probabilities(torch.zeros(3), 1.0),
            "distillation: logits must have the shape (batch, classes), got (3,)",
        ),
        (
            lambda: distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), 0.0),
            "distillation: temperature must be a number from 0.01 to 1000, got 0.0",
        ),
        (
            lambda: divergence(torch.zeros(2, 3), torch.zeros(3, 3), 1.0),
            "distillation: the student answers with (2, 3), the teacher with (3, 3); both must have the same classes",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(call, told):
    with pytest.raises(DistillerError) as error:
        call()
    assert str(error.value) == told


FEATURES = np.arange(2 * 3 * 2 * 2, dtype=np.float64).reshape(2, 3, 2, 2) / 7 - 1
OTHERS = np.cos(np.arange(2 * 5 * 2 * 2, dtype=np.float64)).reshape(2, 5, 2, 2)


def test_a_hint_is_the_mean_squared_difference():
    others = np.sin(FEATURES)
    ours = hint_loss(torch.tensor(FEATURES), torch.tensor(others))
    assert ours.item() == pytest.approx(((FEATURES - others) ** 2).mean(), rel=1e-12)


def test_attention_is_the_distance_of_normalized_sums_of_squares():
    def mapped(features):
        flat = (features**2).sum(1).reshape(len(features), -1)
        return flat / np.sqrt((flat**2).sum(1, keepdims=True))

    np.testing.assert_allclose(attention_map(torch.tensor(FEATURES)).numpy(), mapped(FEATURES), rtol=1e-12)
    expected = np.sqrt(((mapped(FEATURES) - mapped(OTHERS)) ** 2).sum(1)).mean()
    ours = attention_loss(torch.tensor(FEATURES), torch.tensor(OTHERS))
    assert ours.item() == pytest.approx(expected, rel=1e-12)


def test_attention_to_the_same_places_costs_nothing_and_has_a_gradient_of_0():
    features = torch.tensor(FEATURES, requires_grad=True)
    loss = attention_loss(features, torch.tensor(2 * FEATURES))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-9)
    assert features.grad.isfinite().all()


def test_logsumexp_of_shares_is_exact_for_far_logits():
    far = torch.tensor([[300.0, -300.0]], dtype=torch.float64)
    found = blended_log_probabilities([far, -far], [1, 1], 1.0)
    expected = [math.log(0.5), math.log(0.5)]
    np.testing.assert_allclose(found.numpy()[0], expected, atol=1e-12)
    assert logsumexp(found.numpy()) == pytest.approx(0, abs=1e-12)
