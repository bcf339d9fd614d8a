"""Figures of streams of tensors against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from distiller.quantization.report_rows import Levels, RunningFigures, TensorFigures, decibels


def levels(scale: float, lowest: float, highest: float) -> Levels:
    return Levels(*(torch.tensor(value, dtype=torch.float64) for value in (scale, lowest, highest)))


VALUES = st.floats(-4, 4, width=32)


@settings(max_examples=50, deadline=None)
@given(
    pieces=st.lists(arrays.arrays(np.float32, st.integers(1, 12), elements=VALUES), min_size=1, max_size=4)
)
def test_pieces_of_a_stream_give_the_figures_of_the_whole(pieces) -> None:
    running = RunningFigures()
    for piece in pieces:
        running.add(torch.from_numpy(piece), torch.from_numpy(np.round(piece)), levels(1.0, -2.0, 3.0))
    whole = np.concatenate(pieces).astype(np.float64)
    noise, signal = np.square(whole - np.round(whole)).sum(), np.square(whole).sum()
    figures = running.result(3)
    assert (figures.bits, figures.min, figures.max) == (3, whole.min(), whole.max())
    assert (figures.grid_min, figures.grid_max, figures.scale_min, figures.scale_max) == (-2, 3, 1, 1)
    assert figures.clipped == np.mean((whole < -2.501) | (whole > 3.501))
    if noise and signal:
        assert figures.sqnr_db == pytest.approx(10 * np.log10(signal / noise))
    elif not noise:
        assert figures.sqnr_db == math.inf


def test_rounding_to_the_end_of_the_grid_is_no_clipping() -> None:
    x = torch.tensor([-0.5, 1.5, 1.52, -0.52])
    running = RunningFigures()
    running.add(x, x.round(), levels(1.0, 0.0, 1.0))
    assert running.result(1).clipped == 0.5


def test_each_channel_is_clipped_at_ends_of_its_own() -> None:
    x = torch.tensor([[0.9, -3.0, 4.0], [9.0, -3.0, 4.0]])
    scale, zero_point = torch.tensor([[1.0], [4.0]]), torch.tensor([[0], [0]], dtype=torch.int32)
    running = RunningFigures()
    running.add(x, x, Levels.of(scale, zero_point, -2, 1))
    figures = running.result(2)
    assert figures.clipped == pytest.approx(3 / 6)  # -3, 4 beyond [-2, 1]; 9 beyond [-8, 4]
    assert (figures.grid_min, figures.grid_max) == (-8, 4)
    assert (figures.scale_min, figures.scale_max) == (1, 4)


def test_grids_of_several_batches_are_taken_together() -> None:
    running = RunningFigures()
    x = torch.tensor([0.25])
    running.add(x, x, levels(1.0, -2.0, 3.0))
    running.add(x, x, levels(0.5, -4.0, 1.0))
    figures = running.result(4)
    assert (figures.grid_min, figures.grid_max, figures.scale_min, figures.scale_max) == (-4, 3, 0.5, 1)


def test_without_a_grid_there_is_a_ratio_and_no_clipping() -> None:
    running = RunningFigures()
    running.add(torch.tensor([3.0, -4.0]), torch.tensor([3.0, -4.5]))
    assert running.result(None) == TensorFigures(
        None, -4.0, 3.0, sqnr_db=pytest.approx(10 * math.log10(25 / 0.25))
    )


def test_nothing_seen_is_not_known() -> None:
    running = RunningFigures()
    running.add(torch.empty(0), torch.empty(0))
    assert running.result(8) == TensorFigures(8)


def test_sums_are_of_double_precision() -> None:
    """In float32 a million squares of 1e-3 on top of 2^24 would be lost."""
    running = RunningFigures()
    running.add(torch.tensor([2.0**12]), torch.tensor([2.0**12]))
    for _ in range(10):
        running.add(torch.full((1000,), 0.03), torch.zeros(1000))
    assert running.result(None).sqnr_db == pytest.approx(10 * math.log10((2.0**24 + 9) / 9), abs=1e-4)


@pytest.mark.parametrize(
    "signal, noise, ratio",
    [(1.0, 0.0, math.inf), (0.0, 0.0, math.inf), (0.0, 1.0, -math.inf), (100.0, 1.0, 20.0)],
)
def test_ratios_of_nothing_are_infinite(signal, noise, ratio) -> None:
    assert decibels(signal, noise) == pytest.approx(ratio)


def test_nan_is_not_lost_in_the_range() -> None:
    running = RunningFigures()
    running.add(torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan]))
    figures = running.result(None)
    assert figures.min is not None
    assert math.isnan(figures.min)
