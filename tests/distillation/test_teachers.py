from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import nn

from distiller.distillation.teachers import Teacher, Teachers, final_logits
from distiller.errors import DistillerError, UnknownNameError

IMAGES = torch.randn(6, 1, 8, 8)


class Noisy(nn.Module):
    """Dropout and a batch norm: another answer each time, unless it is in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.fc = nn.BatchNorm2d(1), nn.Dropout(0.5), nn.Linear(64, 4)

    def forward(self, x):
        return self.fc(self.drop(self.norm(x)).flatten(1))


def test_a_teacher_is_in_evaluation_mode_and_its_batch_norms_never_move():
    """Distiller's defect: its teacher stayed in training mode, and its batch norms drifted."""
    model = Noisy().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    teachers = Teachers([Teacher(model)])
    first = teachers.answers(IMAGES)
    model.train()  # somebody else's doing
    assert torch.equal(teachers.answers(IMAGES), first)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(first[:, 0], model.eval()(IMAGES))


def test_its_answers_have_no_gradients_and_its_parameters_ask_for_none():
    model = Noisy()
    answers = Teachers([Teacher(model)]).answers(IMAGES.clone().requires_grad_(True))
    assert not answers.requires_grad
    assert not any(param.requires_grad for param in model.parameters())


def test_several_answer_side_by_side(tiny_cnn):
    other = Noisy()
    answers = Teachers([Teacher(tiny_cnn, 2), Teacher(other)]).answers(IMAGES)
    assert answers.shape == (6, 2, 4)
    with torch.no_grad():
        assert torch.equal(answers[:, 0], tiny_cnn(IMAGES))
        assert torch.equal(answers[:, 1], other(IMAGES))


def test_half_precision_takes_and_gives_float32(tiny_cnn):
    with torch.no_grad():
        exact = tiny_cnn.eval()(IMAGES)
    teachers = Teachers([Teacher(tiny_cnn)], half=True)
    whole = teachers.fingerprint
    answers = teachers.answers(IMAGES)
    assert tiny_cnn.fc.weight.dtype == torch.bfloat16
    assert answers.dtype == torch.float32
    assert not torch.equal(answers[:, 0], exact)
    assert torch.allclose(answers[:, 0], exact, atol=0.02)
    assert torch.equal(tiny_cnn(IMAGES), answers[:, 0])  # by itself, as an evaluation calls it
    assert teachers.fingerprint == whole


def test_features_are_what_a_layer_gave_not_what_was_written_over_it():
    torch.manual_seed(6)
    net, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True)), torch.randn(5, 4)
    _, features = Teachers([Teacher(net)]).answers_and_features(("0",), x)
    assert torch.equal(features["0"], net[0](x))
    assert bool((features["0"] < 0).any())


def test_features_of_layers_come_with_the_answers_and_no_hook_stays(tiny_cnn):
    teachers = Teachers([Teacher(tiny_cnn)])
    answers, features = teachers.answers_and_features(("relu1", "conv2"), IMAGES)
    assert torch.equal(answers, teachers.answers(IMAGES))
    assert {name: value.shape for name, value in features.items()} == {
        "relu1": (6, 4, 8, 8),
        "conv2": (6, 6, 8, 8),
    }
    assert not any(module._forward_hooks for module in tiny_cnn.modules())
    with pytest.raises(UnknownNameError, match="no module 'conv9' in the model; did you mean 'conv"):
        teachers.answers_and_features(("conv9",), IMAGES)


def test_the_fingerprint_tells_other_weights(tiny_cnn):
    before = Teachers([Teacher(tiny_cnn)]).fingerprint
    assert Teachers([Teacher(tiny_cnn)]).fingerprint == before
    with torch.no_grad():
        tiny_cnn.conv1.weight[0, 0, 0, 0] += 1e-6
    assert Teachers([Teacher(tiny_cnn)]).fingerprint != before


@pytest.mark.parametrize(
    "teachers, told",
    [
        ([], "teachers: at least one is wanted"),
        ([Teacher(nn.Linear(1, 1), 0)], "teachers: the weight of the teacher must be above 0, got 0"),
    ],
)
def test_what_cannot_teach_is_refused(teachers, told):
    with pytest.raises(DistillerError) as error:
        Teachers(teachers)
    assert str(error.value) == told


def test_images_are_wanted(tiny_cnn):
    with pytest.raises(DistillerError, match="the student was called without a tensor; give it one"):
        Teachers([Teacher(tiny_cnn)]).answers("a cat")


Auxiliary = namedtuple("Auxiliary", ["logits", "aux_logits"])
LOGITS, OTHER = torch.ones(2, 3), torch.zeros(2, 3)


@pytest.mark.parametrize("output", [LOGITS, [OTHER, OTHER, LOGITS], Auxiliary(LOGITS, OTHER)])
def test_the_final_logits_are_the_last_exits_or_the_main_ones(output):
    assert final_logits(output, "it") is LOGITS


@pytest.mark.parametrize(
    "output, got", [((LOGITS, OTHER), "tuple"), ({"logits": LOGITS}, "dict"), ([], "list")]
)
def test_other_outputs_are_refused(output, got):
    with pytest.raises(DistillerError) as error:
        final_logits(output, "the student")
    assert str(error.value) == (
        "distillation: the student must answer with logits (a tensor, a list of exits, or a tuple with a field "
        f"'logits'), got {got}"
    )


class Masking(nn.Module):
    """Says that a class cannot be."""

    def forward(self, x):
        return torch.full((len(x), 3), 0.5).index_fill(1, torch.tensor([1]), -torch.inf)


@pytest.mark.parametrize(
    "half, remedy",
    [(False, "give another teacher"), (True, "let it compute in 32 bits (half: false, or no --kd-half)")],
)
def test_answers_that_are_not_finite_are_refused_by_the_name_of_the_teacher(tiny_cnn, half, remedy):
    """Of a logit of -inf the loss was NaN, whatever the student answered."""
    teachers = Teachers([Teacher(Masking(), 1, "teacher 'm'")], half)
    with pytest.raises(DistillerError) as error:
        teachers.answers(IMAGES)
    assert str(error.value) == (
        "distillation: teacher 'm' answers with logits that are not finite, 6 of 18 are NaN or infinite; "
        f"{remedy}"
    )
