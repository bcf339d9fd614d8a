from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distiller.errors import UsageError
from distiller.sensitivity.axes.levels import bit_levels, share_levels, sparsity_levels


def test_levels_of_distillers_default_range_include_its_end():
    """DEFECT of Distiller: --sense-range 0 0.95 0.05 tested 19 levels and never 0.95."""
    levels = sparsity_levels(0.0, 0.95, 0.05)

    assert levels == tuple(hundredths / 100 for hundredths in range(0, 100, 5))
    assert len(levels) == 20


@pytest.mark.parametrize(
    "start, stop, step, levels",
    [
        (0.0, 1.0, 0.5, (0.0, 0.5, 1.0)),
        (0.0, 0.95, 0.4, (0.0, 0.4, 0.8, 0.95)),
        (0.3, 0.3, 0.1, (0.3,)),
        (0.2, 0.3, 1.0, (0.2, 0.3)),
        (0.1, 0.7, 0.1, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)),
    ],
)
def test_levels_start_at_the_start_and_end_at_the_end(start, stop, step, levels):
    assert sparsity_levels(start, stop, step) == levels


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 1000))
def test_levels_are_those_of_exact_arithmetic(a, b, step):
    start, stop = sorted((a, b))
    exact = sorted({*range(start, stop + 1, step), stop})

    levels = sparsity_levels(start / 1000, stop / 1000, step / 1000)

    assert levels == tuple(float(Fraction(level, 1000)) for level in exact)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(1e-3, 1))
def test_levels_ascend_within_the_range(a, b, step):
    start, stop = sorted((a, b))

    levels = sparsity_levels(start, stop, step)

    assert list(levels) == sorted(set(levels))
    assert levels[0] == pytest.approx(start, abs=1e-9)
    assert levels[-1] == pytest.approx(stop, abs=1e-9)
    assert all(0 <= level <= 1 for level in levels)
    assert all(np.diff(levels) <= step + 1e-9)


@pytest.mark.parametrize("start, stop", [(-0.1, 0.5), (0.0, 1.5), (0.6, 0.5), (float("nan"), 0.5)])
def test_a_range_outside_of_the_fractions_is_refused(start, stop):
    with pytest.raises(UsageError) as error:
        sparsity_levels(start, stop, 0.1)

    assert str(error.value) == (
        "sensitivity range: start and stop must satisfy 0 <= start <= stop <= 1, "
        f"got {start:g} and {stop:g}; sparsity is a fraction, as in '0 0.95 0.05'"
    )


def test_the_fraction_has_its_name_in_the_error():
    with pytest.raises(UsageError, match="; the share of the rank is a fraction, as in"):
        share_levels(8, 2, 1, "the share of the rank")


@pytest.mark.parametrize("step", [0.0, -0.1, 1e-9, 5.0, float("inf"), float("nan")])
def test_a_step_that_is_not_a_small_fraction_is_refused(step):
    with pytest.raises(UsageError) as error:
        sparsity_levels(0.0, 0.5, step)

    assert str(error.value) == (
        f"sensitivity range: step must lie between 1e-06 and 1, got {step:g}; as in '0 0.95 0.05'"
    )


@pytest.mark.parametrize(
    "start, stop, step, widths",
    [
        (8, 2, 1, (8, 7, 6, 5, 4, 3, 2)),
        (2, 8, 2, (2, 4, 6, 8)),
        (8, 3, 2, (8, 6, 4, 3)),
        (4, 4, 1, (4,)),
        (16, 2, 100, (16, 2)),
    ],
)
def test_widths_go_down_or_up_and_include_both_ends(start, stop, step, widths):
    assert bit_levels(float(start), float(stop), float(step)) == widths


@pytest.mark.parametrize("start, stop", [(8, 1), (17, 2), (7.5, 2), (float("nan"), 2), (8, float("inf"))])
def test_a_range_outside_of_the_widths_is_refused(start, stop):
    with pytest.raises(UsageError) as error:
        bit_levels(start, stop, 1)

    assert str(error.value) == (
        "sensitivity range: start and stop must be whole numbers of bits, 2 to 16, "
        f"got {start:g} and {stop:g}; as in '8 2 1'"
    )


@pytest.mark.parametrize("step", [0.0, -1.0, 0.5, 1.5, float("inf"), float("nan")])
def test_a_step_that_is_no_whole_number_of_bits_is_refused(step):
    with pytest.raises(UsageError) as error:
        bit_levels(8, 2, step)

    assert str(error.value) == (
        f"sensitivity range: step must be a whole number of bits, 1 or more, got {step:g}; as in '8 2 1'"
    )
