"""Ranges by clip mode, worked by hand; optimal clipping against the error integrated numerically."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad

from distiller.errors import QuantizationError, StatsError
from distiller.quantization import clipping
from distiller.quantization.clipping import ClipMode, clipped_range, optimal_alpha, tensor_stats

STATS = {"min": -4.0, "max": 10.0, "avg_min": -3.0, "avg_max": 8.0, "mean": 1.0, "std": 2.0, "b": 1.5}


def range_of(clip: ClipMode, bits: int = 8, symmetric: bool = False, stats=STATS, **kwargs) -> list[float]:
    return [end.item() for end in clipped_range(stats, clip, bits, symmetric, **kwargs)]


def squared_error(clip: ClipMode, alpha: float, bits: int) -> float:
    """E (x - q(x))^2 of a unit distribution clipped at alpha: both tails, and the noise of 2^bits steps."""
    if clip is ClipMode.GAUSS:

        def density(x: float) -> float:
            return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    else:

        def density(x: float) -> float:
            return math.exp(-x) / 2

    tail, _ = quad(lambda x: (x - alpha) ** 2 * density(x), alpha, alpha + 40)
    return 2 * tail + (2 * alpha / 2**bits) ** 2 / 12


def test_none_takes_everything() -> None:
    assert range_of(ClipMode.NONE) == [-4, 10]


def test_avg_takes_the_mean_extremes() -> None:
    assert range_of(ClipMode.AVG) == [-3, 8]


def test_n_std_stays_within_the_extremes() -> None:
    assert range_of(ClipMode.N_STD, n_stds=2) == [-3, 5]
    assert range_of(ClipMode.N_STD, n_stds=3) == [-4, 7]


def test_gauss_and_laplace_worked_by_hand() -> None:
    # 4 bits: alpha = 2.55 * std = 5.1; lo = max(-3, 1 - 5.1); hi = lo + 10.2
    assert range_of(ClipMode.GAUSS, 4) == pytest.approx([-3, 7.2])
    # alpha = 5.03 * b = 7.545
    assert range_of(ClipMode.LAPLACE, 4) == pytest.approx([-3, 12.09])
    # symmetric: |mean| + alpha
    assert range_of(ClipMode.GAUSS, 4, symmetric=True) == pytest.approx([-6.1, 6.1])
    assert range_of(ClipMode.LAPLACE, 4, symmetric=True) == pytest.approx([-8.545, 8.545])


def test_half_range_drops_what_a_relu_drops() -> None:
    assert range_of(ClipMode.NONE, half_range=True) == [0, 10]
    assert range_of(ClipMode.AVG, half_range=True) == [0, 8]
    # 4 bits, half: alpha of 5 bits = 2.93 * 2
    assert range_of(ClipMode.GAUSS, 4, half_range=True) == pytest.approx([0, 5.86])
    assert range_of(ClipMode.LAPLACE, 4, half_range=True) == pytest.approx([0, 9.3])


@pytest.mark.parametrize("clip", [ClipMode.GAUSS, ClipMode.LAPLACE])
@pytest.mark.parametrize("half_range", [False, True])
@pytest.mark.parametrize("bits", [*range(2, 9), 10, 12, 16])
def test_alpha_is_of_least_error(clip, half_range, bits) -> None:
    alpha = optimal_alpha(clip, bits, half_range)
    steps = bits + half_range
    least = squared_error(clip, alpha, steps)
    assert least <= squared_error(clip, alpha * 1.02, steps)
    assert least <= squared_error(clip, alpha * 0.98, steps)


@pytest.mark.parametrize(
    ("clip", "table"), [(ClipMode.GAUSS, clipping._GAUSS), (ClipMode.LAPLACE, clipping._LAPLACE)]
)
def test_formula_beyond_8_bits_continues_distillers_table(clip, table) -> None:
    """DEFECT in Distiller: more than 8 bits raised KeyError."""
    steps = [
        later - earlier
        for earlier, later in zip(list(table.values())[5:-1], list(table.values())[6:], strict=True)
    ]
    assert optimal_alpha(clip, 10) - table[9] == pytest.approx(steps[-1], rel=0.1)


@pytest.mark.parametrize("bits", range(1, 9))
def test_half_of_a_distribution_has_the_table_of_one_bit_more(bits) -> None:
    assert (
        optimal_alpha(ClipMode.LAPLACE, bits, half_range=True)
        == {1: 2.83, 2: 3.89, 3: 5.03, 4: 6.2, 5: 7.41, 6: 8.64, 7: 9.89, 8: 11.16}[bits]
    )


def test_missing_b_is_named_with_a_remedy() -> None:
    with pytest.raises(StatsError) as error:
        range_of(ClipMode.LAPLACE, stats={**STATS, "b": None}, where="conv1 output")
    assert str(error.value) == (
        "conv1 output: clip mode LAPLACE needs the statistic 'b', which the file does not have; "
        "collect the statistics anew (--qe-calibration) or choose another clip mode"
    )


@pytest.mark.parametrize("n_stds", [None, 0, -1.0, math.inf, True])
def test_n_std_needs_a_number_of_deviations(n_stds) -> None:
    with pytest.raises(QuantizationError) as error:
        range_of(ClipMode.N_STD, n_stds=n_stds, where="conv1")
    assert str(error.value) == (
        f"conv1: clip mode N_STD needs clip_n_stds, a number of standard deviations > 0, got {n_stds!r}"
    )


@pytest.mark.parametrize("clip", list(ClipMode))
def test_statistics_of_a_tensor_equal_numpys(clip) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    array = x.numpy().reshape(3, -1)
    expected = {
        "min": array.min(),
        "max": array.max(),
        "avg_min": array.min(1).mean(),
        "avg_max": array.max(1).mean(),
        "mean": array.mean(),
        "std": array.std(),
        "b": abs(array - array.mean()).mean(),
    }
    for key, value in tensor_stats(x, clip).items():
        assert value.item() == pytest.approx(expected[key], rel=1e-12)


def test_every_clip_mode_finds_its_statistics_in_a_tensors_own() -> None:
    x = torch.randn(3, 20)
    for clip in ClipMode:
        lo, hi = clipped_range(tensor_stats(x, clip), clip, 4, symmetric=False, n_stds=1)
        assert lo.shape == hi.shape == ()
        assert lo < hi
        lo, hi = clipped_range(tensor_stats(x, clip, per_row=True), clip, 4, symmetric=False, n_stds=1)
        assert lo.shape == hi.shape == (3,)


def test_statistics_per_row_are_those_of_the_rows() -> None:
    x = torch.randn(3, 4, 2)
    for clip in ClipMode:
        together = tensor_stats(x, clip, per_row=True)
        for row in range(3):
            for key, value in tensor_stats(x[row : row + 1], clip).items():
                torch.testing.assert_close(together[key][row], value)


def test_a_vector_is_one_sample() -> None:
    stats = tensor_stats(torch.tensor([1.0, 2.0, 6.0]), ClipMode.AVG)
    assert (stats["avg_min"].item(), stats["avg_max"].item()) == (1, 6)
