"""`--plot-mixture`: from a run folder to pictures."""

from __future__ import annotations

import pytest
import torch

from distiller.apputils.checkpoint import save_checkpoint
from distiller.apputils.mixture_plot_job import plot_mixture
from distiller.errors import CheckpointError, UsageError
from distiller.scheduler import CompressionScheduler
from distiller.weight_sharing import QuantizeToMixture, SoftWeightSharing
from tests.doubles import train


def finish(model, folder, epochs=3, learn=(0, 1), **settings):
    """A training of so many epochs, whose weights are quantized in epoch 2; its checkpoint."""
    scheduler = CompressionScheduler(model)
    learner = SoftWeightSharing("m", model, components=4, **settings)
    scheduler.add_policy(learner, epochs=list(learn), name="extension m")
    scheduler.add_policy(QuantizeToMixture("q", model), epochs=[2], name="extension q")
    train(model, scheduler, range(epochs))
    with scheduler.masked():
        return save_checkpoint(epochs - 1, "tiny", model, None, scheduler, dir=folder)


def test_the_pictures_lie_in_the_run_folder(tiny_cnn, tmp_path):
    finish(tiny_cnn, tmp_path)
    written = plot_mixture(tmp_path)
    wanted = [
        "mixture_joint.png",
        "mixture_histogram.png",
        "mixture_evolution.png",
        "mixture.gif",
        "mixture_layers.png",
    ]
    assert [path.name for path in written] == wanted
    assert all(path.stat().st_size > 1000 for path in written)


def test_parameters_of_their_own_mixture_have_their_own_pictures(tiny_cnn, tmp_path):
    finish(tiny_cnn, tmp_path, weights=["conv2.weight", "fc.weight"], per_parameter=True)
    names = {path.name for path in plot_mixture(tmp_path)}
    assert {"mixture_joint_fc.weight.png", "mixture_conv2.weight.gif", "mixture_layers.png"} <= names
    assert len(names) == 9


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UsageError) as refusal:
        plot_mixture(tmp_path)
    assert str(refusal.value) == (
        f"--plot-mixture {tmp_path}: there is no *checkpoint.pth.tar in it; give the run folder of a training"
    )


def test_another_training_is_refused(tiny_cnn, tmp_path):
    save_checkpoint(0, "tiny", tiny_cnn, None, CompressionScheduler(tiny_cnn), dir=tmp_path)
    with pytest.raises(UsageError) as refusal:
        plot_mixture(tmp_path)
    assert str(refusal.value) == (
        f"--plot-mixture {tmp_path}: checkpoint.pth.tar is not of a training with SoftWeightSharing; "
        "give the run folder of one"
    )


def test_a_training_that_has_not_come_to_it_is_refused(tiny_cnn, tmp_path):
    finish(tiny_cnn, tmp_path, epochs=1, learn=(1,))
    with pytest.raises(UsageError) as refusal:
        plot_mixture(tmp_path)
    assert str(refusal.value) == (
        f"--plot-mixture {tmp_path}: no epoch of SoftWeightSharing is finished yet; train on first"
    )


def test_a_damaged_history_is_refused(tiny_cnn, tmp_path):
    path = finish(tiny_cnn, tmp_path)
    document = torch.load(path, weights_only=True)
    del document["scheduler"]["policies"][0]["state"]["history"]["places"]
    torch.save(document, path)
    with pytest.raises(CheckpointError, match="damaged"):
        plot_mixture(tmp_path)


def test_a_file_in_the_place_of_the_run_folder_is_refused(tiny_cnn, tmp_path):
    """Of a checkpoint it was said that there is no checkpoint in it."""
    remedy = (
        "give the run folder of a training with SoftWeightSharing, with the *checkpoint.pth.tar in it that the "
        "training ended with"
    )
    file = finish(tiny_cnn, tmp_path)
    for path, what in ((file, "is a file"), (tmp_path / "none", "there is no such folder")):
        with pytest.raises(UsageError) as refusal:
            plot_mixture(path)
        assert str(refusal.value) == f"--plot-mixture {path}: {what}; {remedy}"
