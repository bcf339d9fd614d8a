from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from distiller.distillation.hints import Hint, Hints, features_alike
from distiller.distillation.losses import attention_loss
from distiller.errors import CheckpointError, DistillerError, UnknownNameError

IMAGES = torch.randn(4, 1, 8, 8)


def looked_at(hints, student, images=IMAGES):
    """The hints after a forward pass of the student."""
    hints.attach(student)
    student(images)
    return hints


def test_features_as_wide_as_the_teachers_are_compared_as_they_are(tiny_cnn):
    hints = looked_at(Hints([Hint("a", "conv2", 2.0)]), tiny_cnn)
    theirs = torch.randn(4, 6, 8, 8)
    (loss,) = hints.losses({"a": theirs})
    seen = tiny_cnn.conv2(tiny_cnn.relu1(tiny_cnn.bn1(tiny_cnn.conv1(IMAGES))))
    assert loss.item() == pytest.approx(((seen - theirs) ** 2).mean().item(), rel=1e-5)
    assert hints.state_dict() == {}


def test_a_regressor_learns_to_bring_the_channels_to_the_teachers(tiny_cnn):
    hints = Hints([Hint("a", "relu1")], regressor_lr=0.05)
    with torch.no_grad():
        theirs = nn.Conv2d(4, 9, 1)(tiny_cnn.eval().relu1(tiny_cnn.bn1(tiny_cnn.conv1(IMAGES))))
    losses = []
    for _ in range(200):
        (loss,) = looked_at(hints, tiny_cnn).losses({"a": theirs})
        loss.backward()
        hints.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
    assert hints.state_dict()["0"]["weight"].shape == (9, 4)


def test_vectors_and_sequences_have_regressors_too():
    student = nn.Sequential(nn.Linear(5, 3))
    for shape in ((7, 5), (7, 2, 5)):
        hints = looked_at(Hints([Hint("a", "0")]), student, torch.randn(shape))
        (loss,) = hints.losses({"a": torch.randn(*shape[:-1], 8)})
        assert loss.isfinite()


def test_larger_maps_are_averaged_down_to_the_smaller():
    ours, theirs = features_alike(torch.ones(2, 3, 4, 4), torch.rand(2, 3, 8, 2), Hint("a", "b"))
    assert ours.shape == theirs.shape == (2, 3, 4, 2)


def test_attention_needs_no_regressor(tiny_cnn):
    hints = looked_at(Hints([Hint("a", "relu2", kind="attention")]), tiny_cnn)
    theirs = torch.rand(4, 11, 8, 8)
    (loss,) = hints.losses({"a": theirs})
    seen = tiny_cnn.relu2(tiny_cnn.conv2(tiny_cnn.relu1(tiny_cnn.bn1(tiny_cnn.conv1(IMAGES)))))
    assert loss.item() == pytest.approx(attention_loss(seen, theirs).item(), rel=1e-5)
    assert hints.state_dict() == {}


def trained(hints, student, steps, channels=9):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        theirs = torch.randn(4, channels, 8, 8, generator=generator)
        (loss,) = looked_at(hints, student).losses({"a": theirs})
        loss.backward()
        hints.step()
    return hints


def test_regressors_go_on_through_a_restart(tiny_cnn):
    hints = trained(Hints([Hint("a", "conv2")]), tiny_cnn, 3)
    file = io.BytesIO()
    torch.save(hints.state_dict(), file)
    file.seek(0)
    again = Hints([Hint("a", "conv2")])
    again.load_state_dict(torch.load(file, weights_only=True))
    ours, theirs = (trained(each, tiny_cnn, 2).state_dict()["0"] for each in (hints, again))
    assert torch.equal(ours["weight"], theirs["weight"])
    assert torch.equal(ours["bias"], theirs["bias"])


def test_a_thinned_layers_regressor_reads_the_channels_that_stay(tiny_cnn):
    hints = trained(Hints([Hint("a", "conv2")]), tiny_cnn, 2)
    before = hints.state_dict()["0"]["weight"]
    hints.follow_thinning({"conv2.weight": {0: [0, 3, 4]}, "conv1.weight": {0: [1]}})
    assert torch.equal(hints.state_dict()["0"]["weight"], before[:, [0, 3, 4]])
    tiny_cnn.conv2, tiny_cnn.fc = nn.Conv2d(4, 3, 3, padding=1), nn.Linear(3, 4)
    trained(hints, tiny_cnn, 1)
    assert hints.state_dict()["0"]["weight"].shape == (9, 3)


def test_a_layer_with_other_channels_and_no_weight_begins_anew(tiny_cnn):
    hints = trained(Hints([Hint("a", "relu2")]), tiny_cnn, 2)
    hints.follow_thinning({"conv2.weight": {0: [0, 3, 4]}})
    tiny_cnn.conv2, tiny_cnn.fc = nn.Conv2d(4, 3, 3, padding=1), nn.Linear(3, 4)
    trained(hints, tiny_cnn, 1)
    assert hints.state_dict()["0"]["weight"].shape == (9, 3)


def test_nothing_stays_on_the_student(tiny_cnn):
    hints = looked_at(Hints([Hint("a", "conv2"), Hint("b", "conv2")]), tiny_cnn)
    hints.detach()
    assert not any(module._forward_hooks for module in tiny_cnn.modules())


def test_a_layer_that_the_student_does_not_have(tiny_cnn):
    with pytest.raises(UnknownNameError, match="no module 'conv9' in the model; did you mean 'conv"):
        Hints([Hint("a", "conv9")]).check(tiny_cnn)


def test_a_layer_that_is_not_run(tiny_cnn):
    hints = Hints([Hint("a", "conv2")])
    hints.attach(tiny_cnn)
    with pytest.raises(DistillerError) as error:
        hints.losses({"a": torch.zeros(1)})
    assert str(error.value) == "hints: 'conv2' of the student must give a tensor, got nothing, it is not run"


def test_a_student_on_several_devices_is_refused(tiny_cnn):
    spread = nn.DataParallel(tiny_cnn)
    spread.device_ids = [0, 1]
    Hints([]).check(spread)
    with pytest.raises(DistillerError, match="hints: not with a student that is spread over several devices"):
        Hints([Hint("a", "conv2")]).check(spread)


@pytest.mark.parametrize(
    "ours, theirs, kind, remedy",
    [
        ((2, 3), (2, 3, 4, 4), "fitnets", "give layers whose outputs have as many dimensions, 2 to 4"),
        ((2, 3), (3, 3), "fitnets", "give layers whose outputs have as many dimensions, 2 to 4"),
        ((2, 3), (2, 5), "attention", "attention is of maps: give convolutions, or kind fitnets"),
        ((2, 3, 4), (2, 5, 4), "fitnets", "give layers with as many positions"),
    ],
)
def test_features_that_cannot_be_compared(ours, theirs, kind, remedy):
    with pytest.raises(DistillerError) as error:
        features_alike(torch.zeros(ours), torch.zeros(theirs), Hint("t", "s", kind=kind))
    assert str(error.value) == f"hints: 's' gives {ours}, 't' of the teacher {theirs}; {remedy}"


def test_a_state_of_other_hints(tiny_cnn):
    state = trained(Hints([Hint("a", "conv2")]), tiny_cnn, 1).state_dict()
    with pytest.raises(CheckpointError) as error:
        Hints([]).load_state_dict(state)
    assert str(error.value) == (
        "the checkpoint has regressors of 1 hints, this schedule has 0 hints; resume with the same schedule"
    )


def test_a_layer_learns_from_what_it_gave_not_from_what_was_written_over_it():
    torch.manual_seed(6)
    x, theirs = torch.randn(5, 4), torch.randn(5, 6)
    first = nn.Linear(4, 6)
    losses = [
        looked_at(Hints([Hint("a", "0")]), nn.Sequential(first, nn.ReLU(inplace)), x).losses({"a": theirs})[0]
        for inplace in (True, False)
    ]
    assert torch.equal(losses[0], losses[1])
    assert losses[0].item() == pytest.approx(((first(x) - theirs) ** 2).mean().item(), rel=1e-5)
