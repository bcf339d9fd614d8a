import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distiller.errors import DistillerError
from distiller.interfaces import EpochWindow, StepContext
from distiller.masks import MaskStore
from distiller.pruning.rnn import BaiduRNNPruner, rising_threshold


def context(window: EpochWindow, epoch: int) -> StepContext:
    model = nn.Linear(2, 2)
    return StepContext(model, MaskStore(model), None, window, epoch)


def narang(epoch, start, end, freq, q, offset, mult):
    """Distiller's formulas, written out with the frequency."""
    ramp = start + offset
    theta = 2 * q * freq / (2 * (ramp - start) + 3 * (end - ramp))
    if epoch < ramp:
        return theta * (epoch - start + 1) / freq
    return (theta * (ramp - start + 1) + mult * theta * (epoch - ramp + 1)) / freq


def test_thresholds_worked_by_hand():
    """Epochs 0..9, ramp at 4: slope 2*0.26 / (8 + 18) = 0.02, then 0.03 an epoch."""
    window = EpochWindow.spanning(0, 10)
    found = [rising_threshold(epoch, window, 0.26, 4, 1.5) for epoch in range(10)]
    assert found == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.13, 0.16, 0.19, 0.22, 0.25, 0.28])


@given(
    start=st.integers(0, 20),
    count=st.integers(1, 12),
    freq=st.integers(1, 5),
    q=st.floats(0, 2),
    offset=st.integers(0, 12),
    mult=st.floats(0, 4),
)
def test_agrees_with_distillers_formulas(start, count, freq, q, offset, mult):
    end = start + count * freq  # as written, which the last active epoch may lie well before
    offset = min(offset, end - start)
    window = EpochWindow.spanning(start, end, freq)
    for epoch in window.epochs:
        assert rising_threshold(epoch, window, q, offset, mult) == pytest.approx(
            narang(epoch, start, end, freq, q, offset, mult)
        )


def test_a_multiplier_of_1_5_comes_to_q_in_the_last_epoch():
    window = EpochWindow.spanning(3, 50, 2)
    slope = 2 * 0.4 / (2 * 12 + 3 * (50 - 15))
    assert rising_threshold(49, window, 0.4, 12, 1.5) == pytest.approx(0.4 + slope)


def test_an_offset_past_the_window_means_no_ramp():
    window = EpochWindow.spanning(2, 7)
    assert [rising_threshold(epoch, window, 1.0, 99, 5) for epoch in range(2, 7)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0]
    )


def test_defect_a_list_of_epochs_has_thresholds_too():
    """DEFECT of Distiller: an `epochs:` list gave the pruner the frequency None, on which it failed."""
    weight = torch.linspace(-1, 1, 41).view(1, -1)
    pruner = BaiduRNNPruner("rnn", q=0.5, ramp_epoch_offset=2, ramp_slope_mult=2, weights="weight")
    for epoch in (1, 2, 6, 9):
        mask = pruner.compute_masks({"weight": weight}, context(EpochWindow((1, 2, 6, 9)), epoch))["weight"]
        threshold = narang(epoch, 1, 10, 1, 0.5, 2, 2)
        assert np.array_equal(mask.numpy(), (np.abs(weight.numpy()) > np.float32(threshold)))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"q": -0.1}, "q must be 0 or more, got -0.1"),
        ({"ramp_epoch_offset": -1}, "ramp_epoch_offset must be 0 or more, got -1"),
        ({"ramp_slope_mult": float("nan")}, "ramp_slope_mult must be 0 or more, got nan"),
        ({"weights": []}, "weights: at least one parameter name or pattern is wanted, got []"),
    ],
)
def test_arguments_are_checked(settings, text):
    good = {"q": 0.1, "ramp_epoch_offset": 1, "ramp_slope_mult": 2.0, "weights": "weight"}
    with pytest.raises(DistillerError) as error:
        BaiduRNNPruner("rnn", **{**good, **settings})
    assert str(error.value) == text
