"""Lottery tickets from two checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distiller.apputils.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from distiller.apputils.lottery import _main, lottery_masks, save_lottery_ticket
from distiller.errors import CheckpointError
from distiller.scheduler import CompressionScheduler


def save(model, folder, name, scheduler=None, extras=None):
    return save_checkpoint(5, "tiny", model, scheduler=scheduler, name=name, dir=folder, extras=extras)


@pytest.fixture
def pair(tiny_cnn, tmp_path):
    """Checkpoints of a network before training, and after training and pruning; the networks."""
    pruned = copy.deepcopy(tiny_cnn)
    with torch.no_grad():
        for param in pruned.parameters():
            param.add_(1)
        pruned.conv2.weight[0] = 0
        pruned.fc.weight[:, 1] = 0
        pruned.conv2.bias[0] = 0  # no sign of pruning
    untrained_file = save(tiny_cnn, tmp_path, "untrained", extras={"seed": 7})
    return untrained_file, save(pruned, tmp_path, "pruned"), tiny_cnn, pruned


def test_a_ticket_has_the_untrained_weights_where_the_pruned_ones_are_not_zero(pair):
    untrained_file, pruned_file, untrained, _ = pair
    path = save_lottery_ticket(untrained_file, pruned_file)
    assert path == untrained_file.parent / "untrained_lottery_checkpoint.pth.tar"
    state, expected = read_checkpoint(path).state_dict, copy.deepcopy(untrained.state_dict())
    expected["conv2.weight"][0] = 0
    expected["fc.weight"][:, 1] = 0
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_its_masks_are_in_force_in_a_training_that_starts_from_it(pair, tiny_cnn):
    path = save_lottery_ticket(*pair[:2])
    model, scheduler, optimizer, _ = load_checkpoint(tiny_cnn, path)
    assert optimizer is None
    assert scheduler is not None
    assert set(scheduler.masks.masked()) == {"conv2.weight", "fc.weight"}
    with torch.no_grad():
        model.conv2.weight.fill_(1)
    scheduler.on_minibatch_end(0, 0, 1)
    assert model.conv2.weight[0].eq(0).all()
    assert model.conv2.weight[1:].eq(1).all()


def test_zeros_of_a_vector_count_where_the_checkpoint_has_a_mask_of_it(pair, tmp_path):
    *_, pruned = pair
    scheduler = CompressionScheduler(pruned)
    assert set(lottery_masks(read_checkpoint(pair[1]))) == {"conv2.weight", "fc.weight"}
    scheduler.masks.put("conv2.bias", (pruned.conv2.bias != 0).float())
    masks = lottery_masks(read_checkpoint(save(pruned, tmp_path, "with_mask", scheduler)))
    assert masks["conv2.bias"].tolist() == [False, True, True, True, True, True]
    assert all(mask.dtype is torch.bool for mask in masks.values())


def test_it_keeps_the_seed_and_what_is_known_of_the_dense_network(pair, tmp_path, tiny_cnn):
    untrained_file, pruned_file, *_ = pair
    assert read_checkpoint(save_lottery_ticket(untrained_file, pruned_file)).extras == {
        "seed": 7, "is_untrained": True, "reference": None,
    }  # fmt: skip
    without_seed = save(tiny_cnn, tmp_path, "b")
    assert "seed" not in read_checkpoint(save_lottery_ticket(without_seed, pruned_file)).extras


@pytest.mark.parametrize(
    "name, ticket",
    [
        ("exp_untrained_checkpoint.pth.tar", "exp_untrained_lottery_checkpoint.pth.tar"),
        ("early.pth.tar", "early_lottery_checkpoint.pth.tar"),
        ("checkpoint.pth.tar", "untrained_lottery_checkpoint.pth.tar"),
    ],
)
def test_the_ticket_is_called_after_the_untrained_checkpoint(pair, tmp_path, name, ticket):
    file = pair[0].rename(pair[0].with_name(name))
    (tmp_path / "here").mkdir()
    assert save_lottery_ticket(file, pair[1], tmp_path / "here") == tmp_path / "here" / ticket


def message(*files) -> str:
    with pytest.raises(CheckpointError) as caught:
        save_lottery_ticket(*files)
    return str(caught.value)


def test_a_network_that_is_not_pruned_is_refused(pair):
    untrained = pair[0]
    assert message(untrained, untrained) == (
        f"{untrained}: has no pruned weights; give a checkpoint of a pruned network"
    )


def test_checkpoints_of_two_networks_are_refused(pair, tmp_path):
    untrained, pruned, *_ = pair
    other = save_checkpoint(0, "other", nn.Linear(2, 2), name="other", dir=tmp_path)
    assert message(other, pruned) == f"{pruned}: is of 'tiny', '{other}' of 'other'; give two of one network"
    missing = save(nn.Linear(2, 2), tmp_path, "missing")
    assert message(missing, pruned) == (
        f"{pruned}: is of another network than '{missing}': 'conv1.weight' is of shape (4, 1, 3, 3) in it, no tensor "
        "there; give two of one network"
    )
    thin = save(nn.ModuleDict({"conv1": nn.Conv2d(1, 3, 3)}), tmp_path, "thin")
    assert message(untrained, thin) == (
        f"{thin}: is of another network than '{untrained}': 'conv1.weight' is of shape (3, 1, 3, 3) in it, "
        "of shape (4, 1, 3, 3) there; give two of one network"
    )


def test_a_quantized_network_is_refused(pair, tmp_path, tiny_cnn):
    description = {"class": "PostTrainLinearQuantizer", "params": {}}
    quantized = save(tiny_cnn, tmp_path, "q", extras={"quantizer_metadata": description})
    told = f"{quantized}: is of a quantized model; give one in floating point"
    assert message(pair[0], quantized) == message(quantized, pair[1]) == told


def test_a_folder_that_is_not_there_is_told_and_nothing_is_left(pair, tmp_path):
    before = sorted(tmp_path.iterdir())
    assert "cannot be written: No such file or directory" in message(*pair[:2], tmp_path / "nowhere")
    assert sorted(tmp_path.iterdir()) == before


# ------------------------------------------------------------------------ the command


def test_the_command_writes_the_ticket_and_says_where(pair, capsys):
    assert _main(list(map(str, pair[:2]))) == 0
    path = pair[0].with_name("untrained_lottery_checkpoint.pth.tar")
    assert capsys.readouterr() == (f"Saved lottery ticket to: {path}\n", "")
    assert path.is_file()


def test_the_command_tells_what_is_wrong_in_one_line(pair, capsys):
    assert _main([str(pair[0]), str(pair[0])]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"CheckpointError: {message(pair[0], pair[0])}\n"


@pytest.mark.parametrize("arguments", [[], ["a"], ["a", "b", "c"], ["--help"], ["-x", "b"]])
def test_the_command_tells_how_it_is_used(capsys, arguments):
    assert _main(arguments) == 2
    assert capsys.readouterr().err == "usage: python -m distiller.apputils.lottery UNTRAINED PRUNED\n"
