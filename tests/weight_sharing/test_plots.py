"""The pictures: they are drawn, whole, and of the right things."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from distiller.errors import UsageError
from distiller.weight_sharing.components import start_mixture
from distiller.weight_sharing.history import EpochOfSharing
from distiller.weight_sharing.plots import (
    evolution_figure,
    histogram_figure,
    joint_figure,
    layers_figure,
    save_animation,
    save_figure,
)

torch.manual_seed(0)
BEFORE = {"fc1.weight": 0.2 * torch.randn(50), "fc2.weight": 0.4 * torch.randn(20)}
MIXTURE = {"all": start_mixture(BEFORE["fc2.weight"], 4)}
EPOCHS = [
    EpochOfSharing(
        epoch,
        MIXTURE,
        {"top1": 80.0 + epoch, "sparsity": 0.5},
        {k: 0.9**epoch * v for k, v in BEFORE.items()},
    )
    for epoch in (1, 2)
]


def test_the_joint_plot_has_weights_bands_and_a_title():
    figure = joint_figure(BEFORE, EPOCHS[1], "all")
    joint, above, beside = figure.axes
    [points] = joint.collections
    assert len(points.get_offsets()) == 70
    assert len(joint.lines) == 4
    assert joint.get_xlim() == joint.get_ylim() == above.get_xlim() == beside.get_ylim()
    assert beside.get_xscale() == "log"
    assert figure.get_suptitle() == (
        "Epoch 2, top-1 of validation 82.00 %, sparsity by the nearest mean 50.00%"
    )


def test_a_parameters_own_mixture_is_drawn_with_its_weights_alone():
    own = EpochOfSharing(0, dict.fromkeys(BEFORE, MIXTURE["all"]), {}, BEFORE)
    [points] = joint_figure(BEFORE, own, "fc2.weight").axes[0].collections
    assert len(points.get_offsets()) == 20


def test_histograms_are_linear_and_logarithmic():
    assert [axes.get_yscale() for axes in histogram_figure(EPOCHS[0], "all").axes] == ["linear", "log"]


def test_each_parameter_has_a_histogram():
    titles = [axes.get_title() for axes in layers_figure(EPOCHS[0]).axes]
    assert titles == ["fc1.weight", "fc2.weight"]


def test_the_evolution_has_a_line_for_each_component():
    means, stds, shares, figures = evolution_figure(EPOCHS, "all").axes
    assert [len(axes.lines) for axes in (means, stds, shares, figures)] == [4, 4, 4, 2]
    assert figures.lines[0].get_ydata().tolist() == [81.0, 82.0]
    assert figures.lines[1].get_ydata().tolist() == [50.0, 50.0]


def test_the_animation_has_a_frame_for_each_epoch(tmp_path):
    path = save_animation(tmp_path / "mixture.gif", BEFORE, EPOCHS, "all", dpi=20)
    with Image.open(path) as image:
        assert image.n_frames == 2
        assert image.size == (160, 160)


def test_figures_are_written_as_png(tmp_path):
    with Image.open(save_figure(evolution_figure(EPOCHS[:1], "all"), tmp_path / "a.png", dpi=20)) as image:
        assert image.format == "PNG"


@pytest.mark.parametrize("draw", [lambda now: joint_figure({}, now, "all"), layers_figure])
def test_without_weights_there_is_nothing_to_draw(draw):
    with pytest.raises(UsageError) as refusal:
        draw(EpochOfSharing(0, MIXTURE, {}, {}))
    assert str(refusal.value) == (
        "mixture plots: no weights were kept; give SoftWeightSharing a 'history' above 0 next time"
    )
